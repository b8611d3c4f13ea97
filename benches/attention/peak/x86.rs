//! The loops for x86-64.

use super::{Loop, Quantity};
use std::arch::asm;
use std::arch::x86_64::*;
use std::f32::consts::LN_2;
use std::hint::black_box;

/// Independent results in a step. Every instruction here takes at most 6 cycles and starts at most
/// twice a cycle; the results and their operands fit the registers (32 of 512 bits, 16 of fewer).
const CHAINS_512: usize = 24;
const CHAINS_256: usize = 12;
const CHAINS_128: usize = 12;
/// Exponentials (vectors of them) in a step; they do not depend on each other at all.
const EXPONENTIALS: usize = 8;

/// Levels of the crate.
const AVX512: &str = "x86_64-avx512-vnni";
const AVX_VNNI: &str = "x86_64-avx-vnni";
const AVX2: &str = "x86_64-avx2";
const SSE2: &str = "portable";

/// Every loop whose instructions this machine has.
pub fn loops() -> Vec<Loop> {
    use Quantity::*;
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq");
    let vnni512 = avx512 && is_x86_feature_detected!("avx512vnni");
    let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let vnni256 = avx2 && is_x86_feature_detected!("avxvnni");
    let mut loops = Vec::new();
    let mut add = |available, level, quantity, instructions, per_step, run| {
        if available {
            loops.push(Loop { quantity, level, instructions, per_step, run });
        }
    };
    let madd_256 = "vpmaddwd + vpaddd, 256 bit";
    let madd_128 = "pmaddwd + paddd, 128 bit";
    // SAFETY: what each function needs was detected, or `add` drops it unused.
    unsafe {
        add(vnni512, AVX512, Int8, "vpdpbusd, 512 bit", 64 * CHAINS_512, |n| vpdpbusd_512(n));
        add(vnni256, AVX_VNNI, Int8, "vpdpbusd, 256 bit", 32 * CHAINS_256, |n| vpdpbusd_256(n));
        add(avx2, AVX2, Int8, madd_256, 16 * CHAINS_256, |n| vpmaddwd_256(n));
        add(vnni512, AVX512, Int16, "vpdpwssd, 512 bit", 32 * CHAINS_512, |n| vpdpwssd_512(n));
        add(vnni256, AVX_VNNI, Int16, "vpdpwssd, 256 bit", 16 * CHAINS_256, |n| vpdpwssd_256(n));
        add(avx2, AVX2, Int16, madd_256, 16 * CHAINS_256, |n| vpmaddwd_256(n));
        add(bf16, AVX512, Bf16, "vdpbf16ps, 512 bit", 32 * CHAINS_512, |n| vdpbf16ps_512(n));
        add(avx512, AVX512, F32, "vfmaddps, 512 bit", 16 * CHAINS_512, |n| vfmaddps_512(n));
        add(avx2, AVX2, F32, "vfmaddps, 256 bit", 8 * CHAINS_256, |n| vfmaddps_256(n));
        let instructions = "vreduceps, 5 vfmaddps, vscalefps, 512 bit";
        add(avx512, AVX512, Exp2, instructions, 16 * EXPONENTIALS, |n| exp2_scalef_512(n));
        let instructions = "3 vaddps, 5 vfmaddps, vpslld, vpaddd, 512 bit";
        add(avx512, AVX512, Exp2, instructions, 16 * EXPONENTIALS, |n| exp2_512(n));
        let instructions = "3 vaddps, 5 vfmaddps, vpslld, vpaddd, 256 bit";
        add(avx2, AVX2, Exp2, instructions, 8 * EXPONENTIALS, |n| exp2_256(n));
    }
    add(true, SSE2, Int8, madd_128, 8 * CHAINS_128, pmaddwd_128);
    add(true, SSE2, Int16, madd_128, 8 * CHAINS_128, pmaddwd_128);
    add(true, SSE2, F32, "mulps + addps, 128 bit", 4 * CHAINS_128, mulps_128);
    let instructions = "8 addps, 5 mulps, pslld, paddd, 128 bit";
    add(true, SSE2, Exp2, instructions, 4 * EXPONENTIALS, exp2_128);
    loops
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn vpdpbusd_512(steps: usize) {
    let (a, b) = (black_box(_mm512_set1_epi32(1)), black_box(_mm512_set1_epi32(2)));
    let mut sums = [_mm512_setzero_si512(); CHAINS_512];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2,avxvnni")]
fn vpdpbusd_256(steps: usize) {
    let (a, b) = (black_box(_mm256_set1_epi32(1)), black_box(_mm256_set1_epi32(2)));
    let mut sums = [_mm256_setzero_si256(); CHAINS_256];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    black_box(sums);
}

/// In assembly, because LLVM makes two instructions of the intrinsic.
#[target_feature(enable = "avx512f,avx512vnni")]
fn vpdpwssd_512(steps: usize) {
    let (a, b) = (black_box(_mm512_set1_epi32(1)), black_box(_mm512_set1_epi32(2)));
    let mut sums = [_mm512_setzero_si512(); CHAINS_512];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `avx512vnni` has.
            unsafe {
                asm!(
                    "vpdpwssd {sum}, {a}, {b}",
                    sum = inout(zmm_reg) *sum,
                    a = in(zmm_reg) a,
                    b = in(zmm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

/// See [`vpdpwssd_512`].
#[target_feature(enable = "avx2,avxvnni")]
fn vpdpwssd_256(steps: usize) {
    let (a, b) = (black_box(_mm256_set1_epi32(1)), black_box(_mm256_set1_epi32(2)));
    let mut sums = [_mm256_setzero_si256(); CHAINS_256];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `avxvnni` has.
            unsafe {
                asm!(
                    "{{vex}} vpdpwssd {sum}, {a}, {b}",
                    sum = inout(ymm_reg) *sum,
                    a = in(ymm_reg) a,
                    b = in(ymm_reg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

/// The exact product without VNNI: `vpmaddubsw` would be twice as fast, but it saturates.
#[target_feature(enable = "avx2")]
fn vpmaddwd_256(steps: usize) {
    let (mut a, b) = (black_box(_mm256_set1_epi32(1)), black_box(_mm256_set1_epi32(2)));
    let mut sums = [_mm256_setzero_si256(); CHAINS_256];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: an empty instruction that reads and writes `a`. Without it, the compiler
            // would multiply once, outside of the loop.
            unsafe { asm!("/* {0} */", inout(ymm_reg) a, options(nomem, nostack, preserves_flags)) }
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(a, b));
        }
    }
    black_box(sums);
}

/// The same with what every x86-64 processor has: the compiler may use no more in portable code.
fn pmaddwd_128(steps: usize) {
    // SAFETY: SSE2 is part of x86-64; the empty instruction is as above.
    unsafe {
        let (mut a, b) = (black_box(_mm_set1_epi32(1)), black_box(_mm_set1_epi32(2)));
        let mut sums = [_mm_setzero_si128(); CHAINS_128];
        for _ in 0..steps {
            for sum in &mut sums {
                asm!("/* {0} */", inout(xmm_reg) a, options(nomem, nostack, preserves_flags));
                *sum = _mm_add_epi32(*sum, _mm_madd_epi16(a, b));
            }
        }
        black_box(sums);
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn vdpbf16ps_512(steps: usize) {
    let one = black_box(_mm512_set1_ps(1.0));
    let a = _mm512_cvtne2ps_pbh(one, one);
    let mut sums = [_mm512_setzero_ps(); CHAINS_512];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, a, a);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx512f")]
fn vfmaddps_512(steps: usize) {
    let (a, b) = (black_box(_mm512_set1_ps(1e-3)), black_box(_mm512_set1_ps(0.5)));
    let mut sums = [_mm512_setzero_ps(); CHAINS_512];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(a, b, *sum);
        }
    }
    black_box(sums);
}

#[target_feature(enable = "avx2,fma")]
fn vfmaddps_256(steps: usize) {
    let (a, b) = (black_box(_mm256_set1_ps(1e-3)), black_box(_mm256_set1_ps(0.5)));
    let mut sums = [_mm256_setzero_ps(); CHAINS_256];
    for _ in 0..steps {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(a, b, *sum);
        }
    }
    black_box(sums);
}

fn mulps_128(steps: usize) {
    // SAFETY: SSE is part of x86-64; the empty instruction reads and writes `a`, see [`vpmaddwd_256`].
    unsafe {
        let (mut a, b) = (black_box(_mm_set1_ps(1e-3)), black_box(_mm_set1_ps(0.5)));
        let mut sums = [_mm_setzero_ps(); CHAINS_128];
        for _ in 0..steps {
            for sum in &mut sums {
                asm!("/* {0} */", inout(xmm_reg) a, options(nomem, nostack, preserves_flags));
                *sum = _mm_add_ps(*sum, _mm_mul_ps(a, b));
            }
        }
        black_box(sums);
    }
}

/// Coefficients of `2^f`, highest power first; their values do not change the speed.
const EXP2: [f32; 6] = [1.327e-3, 9.672e-3, 5.551e-2, 0.240_22, LN_2, 1.0];
/// 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// `2^floor(x) * 2^(x - floor(x))`, with AVX-512's instructions for both.
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2_scalef_512(steps: usize) {
    const FLOOR: i32 = 1;
    let mut x = black_box(_mm512_set1_ps(-1.5));
    let c = black_box(EXP2).map(|c| _mm512_set1_ps(c));
    for _ in 0..steps {
        for _ in 0..EXPONENTIALS {
            // SAFETY: empty instructions: the first makes `x` a new number for the compiler, the
            // second a reader of the result.
            unsafe { asm!("/* {0} */", inout(zmm_reg) x, options(nomem, nostack, preserves_flags)) }
            let f = _mm512_reduce_ps::<FLOOR>(x);
            let mut p = c[0];
            for &c in &c[1..] {
                p = _mm512_fmadd_ps(p, f, c);
            }
            let power = _mm512_scalef_ps(p, x);
            // SAFETY: see above.
            unsafe {
                asm!("/* {0} */", in(zmm_reg) power, options(nomem, nostack, preserves_flags))
            }
        }
    }
}

/// The same from additions: round by a large number, and add the integer to the exponent.
#[target_feature(enable = "avx512f")]
fn exp2_512(steps: usize) {
    let mut x = black_box(_mm512_set1_ps(-1.5));
    let round = black_box(_mm512_set1_ps(ROUND));
    let c = black_box(EXP2).map(|c| _mm512_set1_ps(c));
    for _ in 0..steps {
        for _ in 0..EXPONENTIALS {
            // SAFETY: empty instructions, as above.
            unsafe { asm!("/* {0} */", inout(zmm_reg) x, options(nomem, nostack, preserves_flags)) }
            let shifted = _mm512_add_ps(x, round);
            let f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, round));
            let mut p = c[0];
            for &c in &c[1..] {
                p = _mm512_fmadd_ps(p, f, c);
            }
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
            let power = _mm512_add_epi32(_mm512_castps_si512(p), exponent);
            // SAFETY: see above.
            unsafe {
                asm!("/* {0} */", in(zmm_reg) power, options(nomem, nostack, preserves_flags))
            }
        }
    }
}

/// The same with 256 bits.
#[target_feature(enable = "avx2,fma")]
fn exp2_256(steps: usize) {
    let mut x = black_box(_mm256_set1_ps(-1.5));
    let round = black_box(_mm256_set1_ps(ROUND));
    let c = black_box(EXP2).map(|c| _mm256_set1_ps(c));
    for _ in 0..steps {
        for _ in 0..EXPONENTIALS {
            // SAFETY: empty instructions, as above.
            unsafe { asm!("/* {0} */", inout(ymm_reg) x, options(nomem, nostack, preserves_flags)) }
            let shifted = _mm256_add_ps(x, round);
            let f = _mm256_sub_ps(x, _mm256_sub_ps(shifted, round));
            let mut p = c[0];
            for &c in &c[1..] {
                p = _mm256_fmadd_ps(p, f, c);
            }
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            let power = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
            // SAFETY: see above.
            unsafe {
                asm!("/* {0} */", in(ymm_reg) power, options(nomem, nostack, preserves_flags))
            }
        }
    }
}

/// The same with 128 bits and without fused multiply-adds.
fn exp2_128(steps: usize) {
    // SAFETY: SSE2 is part of x86-64; empty instructions, as above.
    unsafe {
        let mut x = black_box(_mm_set1_ps(-1.5));
        let round = black_box(_mm_set1_ps(ROUND));
        let c = black_box(EXP2).map(|c| _mm_set1_ps(c));
        for _ in 0..steps {
            for _ in 0..EXPONENTIALS {
                asm!("/* {0} */", inout(xmm_reg) x, options(nomem, nostack, preserves_flags));
                let shifted = _mm_add_ps(x, round);
                let f = _mm_sub_ps(x, _mm_sub_ps(shifted, round));
                let mut p = c[0];
                for &c in &c[1..] {
                    p = _mm_add_ps(_mm_mul_ps(p, f), c);
                }
                let exponent = _mm_slli_epi32::<23>(_mm_castps_si128(shifted));
                let power = _mm_add_epi32(_mm_castps_si128(p), exponent);
                asm!("/* {0} */", in(xmm_reg) power, options(nomem, nostack, preserves_flags));
            }
        }
    }
}
