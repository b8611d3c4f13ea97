//! What this machine's instructions can do at most, in multiply-accumulates per second on one core.

use std::hint::black_box;
use std::time::Instant;

/// Peaks of one core in GMAC/s; `None` where the instruction does not exist.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Peaks {
    /// u8 x i8 into int32 (`vpdpbusd`).
    pub int8: Option<f64>,
    /// bf16 pairs into f32 (`vdpbf16ps`).
    pub bf16: Option<f64>,
    /// f32 fused multiply-add.
    pub f32: Option<f64>,
}

/// Measures all peaks, the best of several short runs each.
pub fn measure() -> Peaks {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f");
        // SAFETY: each function runs only where its instructions were just found.
        unsafe {
            Peaks {
                int8: (avx512 && is_x86_feature_detected!("avx512vnni"))
                    .then(|| best(64 * x86::CHAINS, || x86::int8())),
                bf16: (avx512 && is_x86_feature_detected!("avx512bf16"))
                    .then(|| best(32 * x86::CHAINS, || x86::bf16())),
                f32: avx512.then(|| best(16 * x86::CHAINS, || x86::f32())),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    Peaks { int8: None, bf16: None, f32: None }
}

/// GMAC/s of `run`, which makes `STEPS` steps of `macs` each.
#[cfg(target_arch = "x86_64")]
fn best(macs: usize, mut run: impl FnMut()) -> f64 {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..20).map(|_| time(&mut run)).fold(f64::INFINITY, f64::min);
    (macs * x86::STEPS) as f64 / fastest / 1e9
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::black_box;
    use std::arch::x86_64::*;

    /// Independent accumulators: more than the latency of the instruction.
    pub const CHAINS: usize = 24;
    pub const STEPS: usize = 100_000;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8() {
        let (a, b) = (black_box(_mm512_set1_epi32(1)), black_box(_mm512_set1_epi32(2)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16() {
        let one = black_box(_mm512_set1_ps(1.0));
        let a = _mm512_cvtne2ps_pbh(one, one);
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub fn f32() {
        let (a, b) = (black_box(_mm512_set1_ps(1e-3)), black_box(_mm512_set1_ps(0.5)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
    }
}
