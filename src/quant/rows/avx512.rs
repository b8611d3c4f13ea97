//! AVX-512: symmetric codes with a scale for each row, which is what every query and key of the
//! default configuration goes through.

use super::{BlockCodes, Rows};
use crate::quant::{QuantParams, Range, Scheme};
use std::arch::x86_64::*;

const LANES: usize = 16;

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

/// [`super::quantize_block`] for symmetric codes; the lengths are checked there.
pub(super) fn quantize_symmetric(rows: Rows<'_>, offset: Option<&[f32]>, out: BlockCodes<'_>) {
    assert!(is_available());
    // SAFETY: the instructions are there.
    unsafe { quantize_rows(rows, offset, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_rows(rows: Rows<'_>, offset: Option<&[f32]>, out: BlockCodes<'_>) {
    out.zeros.fill(0);
    let codes = out.codes.chunks_exact_mut(rows.depth().max(1));
    for (((row, codes), scale), sum) in rows.iter().zip(codes).zip(out.scales).zip(out.sums) {
        let row = Row { row, offset };
        let max = row.max_abs();
        if !max.is_finite() {
            codes.fill(0);
            (*scale, *sum) = (f32::NAN, 0);
            continue;
        }
        let range = Range { min: -max, max };
        *scale = QuantParams::from_finite_range(Scheme::Symmetric, range).scale();
        *sum = match row.quantize::<Multiply>(*scale, codes) {
            Some(sum) => sum,
            None => row.quantize::<Divide>(*scale, codes).unwrap_or(0),
        };
    }
}

/// A row and what is subtracted from it.
#[derive(Clone, Copy)]
struct Row<'a> {
    row: &'a [f32],
    offset: Option<&'a [f32]>,
}

/// How a number is divided by the scale.
trait Division {
    /// Whether the result may be off by so little that only ties are rounded to another code.
    const CHECKED: bool;
}

/// By multiplying with the reciprocal: 4 times as fast, and off by less than [`NEAR`].
struct Multiply;
struct Divide;

impl Division for Multiply {
    const CHECKED: bool = true;
}

impl Division for Divide {
    const CHECKED: bool = false;
}

/// Two roundings of a number up to 127 are off by at most `127 * 2^-23 = 1.5e-5`.
const NEAR: f32 = 1e-4;

impl Row<'_> {
    /// Elements `at..at + 16`, zeros in the place of what is missing.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load(self, at: usize) -> (__mmask16, __m512) {
        let len = (self.row.len() - at).min(LANES);
        let mask = ((1u32 << len) - 1) as __mmask16;
        let load = |from: &[f32]| {
            // SAFETY: lanes beyond the slice are masked out, and are not read.
            unsafe { _mm512_maskz_loadu_ps(mask, from[at..].as_ptr()) }
        };
        let x = load(self.row);
        (mask, self.offset.map_or(x, |offset| _mm512_sub_ps(x, load(offset))))
    }

    /// The largest magnitude; infinity or NaN if there is one.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn max_abs(self) -> f32 {
        // As integers, magnitudes have the same order, with infinity and NaN above all numbers.
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut max = _mm512_setzero_si512();
        for at in (0..self.row.len()).step_by(LANES) {
            let bits = _mm512_and_si512(_mm512_castps_si512(self.load(at).1), magnitude);
            max = _mm512_max_epu32(max, bits);
        }
        f32::from_bits(_mm512_reduce_max_epu32(max))
    }

    /// Writes codes, returns their sum; `None` if an element is too near to a tie. The magnitude
    /// of an element is at most 127 scales, so nothing has to be clamped.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn quantize<D: Division>(self, scale: f32, codes: &mut [i8]) -> Option<i32> {
        let (reciprocal, scale) = (_mm512_set1_ps(1.0 / scale), _mm512_set1_ps(scale));
        let limit = _mm512_set1_ps(0.5 - NEAR);
        let mut sums = _mm512_setzero_si512();
        let mut near_tie = 0;
        for at in (0..self.row.len()).step_by(LANES) {
            let (mask, x) = self.load(at);
            let steps =
                if D::CHECKED { _mm512_mul_ps(x, reciprocal) } else { _mm512_div_ps(x, scale) };
            let q = _mm512_cvtps_epi32(steps); // to nearest, ties to even
            if D::CHECKED {
                let rest = _mm512_abs_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(q)));
                near_tie |= _mm512_cmp_ps_mask::<_CMP_GT_OQ>(rest, limit);
            }
            sums = _mm512_add_epi32(sums, q);
            // SAFETY: lanes beyond the row are masked out; there is one code an element.
            unsafe {
                let to = codes[at..].as_mut_ptr();
                _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(q));
            }
        }
        (near_tie == 0).then(|| _mm512_reduce_add_epi32(sums))
    }
}
