//! The softmax of whole rows, in base 2: scores come multiplied by `log2(e)`.

use crate::simd::EXP2;
use pulp::{Arch, Simd, WithSimd};

/// Turns scores into probabilities, in place. Rows are `width` elements, whole vectors; minus
/// infinity becomes 0, and so does a row of nothing else. NaN makes its row NaN.
pub(super) fn softmax(arch: Arch, scores: &mut [f32], width: usize) {
    if width > 0 {
        arch.dispatch(Softmax { scores, width });
    }
}

struct Softmax<'a> {
    scores: &'a mut [f32],
    width: usize,
}

impl WithSimd for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.scores.chunks_exact_mut(self.width) {
            let (row, rest) = S::as_mut_simd_f32s(row);
            assert!(rest.is_empty(), "rows of whole vectors");
            let mut largest = [simd.splat_f32s(f32::NEG_INFINITY); 4];
            for four in row.chunks(4) {
                for (largest, x) in largest.iter_mut().zip(four) {
                    *largest = simd.max_f32s(*x, *largest);
                }
            }
            let [a, b, c, d] = largest;
            let largest = simd.max_f32s(simd.max_f32s(a, b), simd.max_f32s(c, d));
            let largest = simd.reduce_max_f32s(largest);
            // Any finite number gives zeros for minus infinity, without the NaN of -inf - (-inf).
            let largest = if largest == f32::NEG_INFINITY { 0.0 } else { largest };
            let sum = exp2_of_differences(simd, row, largest);
            let factor = simd.splat_f32s(if sum == 0.0 { 0.0 } else { 1.0 / sum });
            for x in row {
                *x = simd.mul_f32s(*x, factor);
            }
        }
    }
}

/// Replaces `x` by `2^(x - largest)`, which is at most 1, and returns their sum. The relative
/// error of each is below 2e-7; below `2^-126` it is 0.
#[inline(always)]
fn exp2_of_differences<S: Simd>(simd: S, row: &mut [S::f32s], largest: f32) -> f32 {
    let round = simd.splat_f32s(12_582_912.0); // 1.5 * 2^23: what is added to it is rounded.
    let (least, one) = (simd.splat_f32s(-126.0), simd.splat_f32s(1.0));
    let (bias, shift) = (simd.splat_u32s(127), simd.splat_u32s(23));
    let largest = simd.splat_f32s(largest);
    let mut sums = [simd.splat_f32s(0.0); 4];
    for four in row.chunks_mut(4) {
        for (sum, x) in sums.iter_mut().zip(four) {
            let difference = simd.sub_f32s(*x, largest);
            let vanishes = simd.less_than_f32s(difference, least);
            let clamped = simd.select_f32s(vanishes, least, difference);
            let rounded = simd.add_f32s(clamped, round);
            let f = simd.sub_f32s(clamped, simd.sub_f32s(rounded, round));
            let mut p = simd.splat_f32s(EXP2[4]);
            for c in EXP2[..4].iter().rev() {
                p = simd.mul_add_f32s(p, f, simd.splat_f32s(*c));
            }
            let p = simd.mul_add_f32s(p, f, one);
            // The integer is in the low bits of `rounded`; as an exponent it is a power of two.
            let exponent = simd.add_u32s(simd.transmute_u32s_f32s(rounded), bias);
            let power = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(exponent, shift));
            *x = simd.select_f32s(vanishes, simd.splat_f32s(0.0), simd.mul_f32s(p, power));
            *sum = simd.add_f32s(*sum, *x);
        }
    }
    let [a, b, c, d] = sums;
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::all_vectors;

    #[test]
    fn rows_against_f64() {
        for width in [16, 32, 48, 80, 512] {
            for range in [0.0, 1.0, 20.0, 120.0] {
                let x = |i: usize| ((i * 37) % 101) as f32 / 101.0 * range - range / 3.0;
                let scores: Vec<f32> = (0..width).map(x).collect();
                let exps: Vec<f64> = scores.iter().map(|&x| f64::from(x).exp2()).collect();
                let sum: f64 = exps.iter().sum();
                // The exponent is rounded by the subtraction of the largest score.
                let bound = 1e-6 + f64::from(range * f32::EPSILON);
                for arch in all_vectors() {
                    let mut found = scores.clone();
                    softmax(arch, &mut found, width);
                    for (found, exact) in found.iter().zip(exps.iter().map(|exp| exp / sum)) {
                        let off = (f64::from(*found) - exact).abs();
                        assert!(off <= bound * exact, "{arch:?} {width} {range}: {found} {exact}");
                    }
                }
            }
        }
    }

    /// Beside a score of 0, which is the largest, probabilities are powers of two times its own.
    #[test]
    fn powers_are_within_their_stated_error() {
        let negative = |i: usize| if i.is_multiple_of(16) { 0.0 } else { i as f32 * -1e-4 };
        let scores: Vec<f32> = (0..1_260_000).map(negative).collect();
        for arch in all_vectors() {
            let mut found = scores.clone();
            softmax(arch, &mut found, 16);
            let mut worst = 0f64;
            for (row, scores) in found.chunks_exact(16).zip(scores.chunks_exact(16)) {
                // Those that are no normal numbers after the division are rounded coarsely.
                for (p, x) in row.iter().zip(scores).filter(|(_, x)| **x > -120.0) {
                    let power = f64::from(*p) / f64::from(row[0]);
                    worst = worst.max((power / f64::from(*x).exp2() - 1.0).abs());
                }
            }
            // 2e-7, and one rounding for each of the two products with 1 / sum.
            assert!(worst < 3.2e-7, "{arch:?}: {worst:e}");
        }
    }

    #[test]
    fn rows_are_apart_and_infinities_and_nan_have_their_meaning() {
        for arch in all_vectors() {
            let mut scores = vec![1.0f32; 4 * 16];
            scores[3] = f32::NEG_INFINITY;
            scores[16..32].fill(f32::NEG_INFINITY);
            scores[40] = f32::NAN;
            softmax(arch, &mut scores, 16);
            let rows: Vec<&[f32]> = scores.chunks(16).collect();
            assert_eq!(rows[0][3], 0.0, "{arch:?}");
            assert!((rows[0][4] - 1.0 / 15.0).abs() < 1e-7, "{arch:?}");
            assert_eq!(rows[1], [0.0; 16], "{arch:?}");
            assert!(rows[2].iter().all(|x| x.is_nan()), "{arch:?} {:?}", rows[2]);
            assert_eq!(rows[3], [1.0 / 16.0; 16], "{arch:?}");
            let mut none: Vec<f32> = Vec::new();
            softmax(arch, &mut none, 16);
            softmax(arch, &mut none, 0);
        }
    }
}
