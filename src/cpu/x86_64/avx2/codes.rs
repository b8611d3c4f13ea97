//! AVX2: codes of rows.

use crate::cpu::contracts::{BlockCodes, LANES, RowRanges, Rows};
use crate::cpu::plain::rows::{NEAR, ROUND, quantize_by, quantize_row};
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma")]
pub(super) fn quantize(
    affine: bool,
    rows: Rows<'_>,
    ranges: Option<&RowRanges>,
    out: BlockCodes<'_>,
) {
    quantize_by(affine, rows, ranges, out, |row, params, limits, codes| {
        match quantize_whole(row, params, codes) {
            Some(sum) => {
                let whole = row.len() / LANES * LANES;
                sum + quantize_row(&row[whole..], params, limits, &mut codes[whole..])
            }
            None => quantize_row(row, params, limits, codes),
        }
    });
}

/// The codes of all whole vectors, and their sum; `None` if a tie may be near. No element is beyond the range, so
/// only the largest may be one step too far, where its end and the zero point are both rounded up.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn quantize_whole(row: &[f32], (scale, zero): (f32, i32), codes: &mut [i8]) -> Option<i32> {
    let (by, round) = (_mm256_set1_ps(1.0 / scale), _mm256_set1_ps(ROUND));
    let offset = _mm256_set1_epi32(zero - ROUND.to_bits() as i32);
    let magnitude = _mm256_set1_ps(f32::from_bits(i32::MAX as u32));
    let (mut sums, mut rests) = (_mm256_setzero_si256(), _mm256_setzero_ps());
    let chunks = row.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0);
    for (chunk, codes) in chunks {
        let mut q = [_mm256_setzero_si256(); 2];
        for (half, q) in q.iter_mut().enumerate() {
            // SAFETY: 16 elements, 8 of them in each half.
            let x = unsafe { _mm256_loadu_ps(chunk.as_ptr().add(half * LANES / 2)) };
            // To nearest, ties to even.
            let steps = _mm256_fmadd_ps(x, by, round);
            let rest = _mm256_fmsub_ps(x, by, _mm256_sub_ps(steps, round));
            rests = _mm256_max_ps(rests, _mm256_and_ps(rest, magnitude));
            *q = _mm256_add_epi32(_mm256_castps_si256(steps), offset);
            *q = _mm256_min_epi32(*q, _mm256_set1_epi32(i8::MAX.into()));
            sums = _mm256_add_epi32(sums, *q);
        }
        // Those of both halves in turns, four by four.
        let words = _mm256_packs_epi32(q[0], q[1]);
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
        let (low, high) = (_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
        // SAFETY: 16 codes.
        unsafe { _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm_packs_epi16(low, high)) };
    }
    let near = _mm256_cmp_ps::<_CMP_GT_OQ>(rests, _mm256_set1_ps(0.5 - NEAR));
    (_mm256_movemask_ps(near) == 0).then(|| sum_of(sums))
}

#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sum_of(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b00_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b00_00_00_01>(x)))
}
