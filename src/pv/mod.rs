//! The second product of attention: probabilities times values, `[M, N] x [N, Dv] -> [M, Dv]`,
//! with f32 sums.
//!
//! The operands are f32, or bf16 where the hardware multiplies it: bf16 halves the memory and
//! doubles the speed, and its rounding of `P` and `V` (2^-9 relative) is smaller than what int8
//! scores cost (see the README's table).
//!
//! `kernel` says what a kernel is, `pack` puts values in the order it reads, and each of the other
//! files is one instruction set's tile.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod kernel;
mod pack;
mod portable;

pub(crate) use kernel::{PvKernel, ValueFormat, bf16_bits};
pub(crate) use pack::PackedValues;

/// Every kernel compiled for this architecture, best first.
static TABLE: &[&dyn PvKernel] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512_bf16::Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    &avx512::Avx512,
    #[cfg(target_arch = "x86_64")]
    &avx2::Avx2,
    &portable::Portable,
];

/// The best available kernel for values stored as `format`, if there is one.
pub(crate) fn select(format: ValueFormat) -> Option<&'static dyn PvKernel> {
    TABLE.iter().copied().find(|kernel| kernel.format() == format && kernel.is_available())
}

#[cfg(test)]
mod tests {
    use super::kernel::bf16_bits;
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// Every kernel that this machine can run; says aloud, once, which it cannot.
    fn runnable() -> Vec<&'static dyn PvKernel> {
        static REPORT: std::sync::Once = std::sync::Once::new();
        let (run, not_run): (Vec<_>, Vec<_>) =
            TABLE.iter().copied().partition(|kernel| kernel.is_available());
        REPORT.call_once(|| {
            for kernel in not_run {
                // Not `eprintln!`, which the test harness keeps to itself while tests pass.
                let text = format!("NOT RUN: kernel {} (no instructions for it)\n", kernel.name());
                std::io::stderr().write_all(text.as_bytes()).expect("stderr takes a line");
            }
        });
        run
    }

    /// Every kernel against f64, on operands that its format holds exactly.
    fn check(rows: usize, keys: usize, depth: usize, seed: u64) {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u32 << 24) as f32) * 2.0 - 1.0
        };
        let round = |x: f32| f32::from_bits(u32::from(bf16_bits(x)) << 16);
        let probs: Vec<f32> = (0..rows * keys).map(|_| round(next())).collect();
        let values: Vec<f32> = (0..keys * depth).map(|_| round(next())).collect();
        for kernel in runnable() {
            let mut packed = PackedValues::new(kernel, keys, depth);
            packed.put(0, &values);
            let stride = keys.next_multiple_of(2);
            let mut padded = vec![0f32; rows * stride];
            for (to, from) in padded.chunks_mut(stride.max(1)).zip(probs.chunks(keys.max(1))) {
                to[..keys].copy_from_slice(from);
            }
            let halves: Vec<u16> = padded.iter().map(|&x| bf16_bits(x)).collect();
            let width = packed.width();
            // Sums are added to what is there.
            let mut out = vec![1f32; rows * width];
            match kernel.format() {
                ValueFormat::F32 => packed.accumulate_f32(0..keys, &padded, stride, &mut out),
                ValueFormat::Bf16 => packed.accumulate_bf16(0..keys, &halves, stride, &mut out),
            }
            for i in 0..rows {
                for c in 0..depth {
                    let term = |j: usize| {
                        f64::from(probs[i * keys + j]) * f64::from(values[j * depth + c])
                    };
                    let expected = 1.0 + (0..keys).map(term).sum::<f64>();
                    let found = f64::from(out[i * width + c]);
                    // f32 summation of products below 1: epsilon a term.
                    let bound = (keys + 1) as f64 * f64::from(f32::EPSILON) * 2.0;
                    let what = (kernel.name(), rows, keys, depth, i, c);
                    assert!((found - expected).abs() <= bound, "{what:?}: {found}, {expected}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_kernel_equals_the_sum(
            rows in 0usize..20, keys in 0usize..70, depth in 1usize..150, seed: u64,
        ) {
            check(rows, keys, depth, seed);
        }
    }

    #[test]
    fn every_kernel_on_both_sides_of_every_edge() {
        for rows in [1, 5, 6, 7, 48] {
            for keys in [1, 2, 3, 64] {
                for depth in [1, 15, 16, 17, 31, 33, 48, 50, 63, 64, 65, 80, 128, 130] {
                    check(rows, keys, depth, (rows * keys * depth) as u64);
                }
            }
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_nan() {
        for x in [1.0, -2.5, 3.0e38, 1e-40, f32::INFINITY, 1.003_906_3, 1.011_718_8, 0.0] {
            assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
        }
    }
}
