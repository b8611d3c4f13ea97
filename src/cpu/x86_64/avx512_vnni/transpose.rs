//! AVX-512: 16 elements of 16 rows become columns by shuffles of whole vectors, where plain loops take the elements one
//! by one. (By way of memory, as rows of codes are put in order, it takes as long as those.)

use super::rows::first;
use crate::cpu::contracts::{LANES, Transpose};
use crate::cpu::x86_64::starts;
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
pub(super) fn transpose(job: Transpose<'_>) {
    let Transpose { rows, factor, columns, width } = job;
    let (depth, factor) = (rows.depth(), _mm512_set1_ps(factor));
    for row in (0..rows.count()).step_by(LANES) {
        let starts = starts::<LANES>(rows, row);
        for start in (0..depth).step_by(LANES) {
            let count = LANES.min(depth - start);
            let mut block = [_mm512_setzero_ps(); LANES];
            for (vector, from) in block.iter_mut().zip(starts) {
                // SAFETY: `depth` elements in each row; those beyond are masked out.
                let elements = unsafe { _mm512_maskz_loadu_ps(first(count), from.add(start)) };
                *vector = _mm512_mul_ps(elements, factor);
            }
            for (k, column) in columns_of(block).iter().enumerate().take(count) {
                let places = columns[(start + k) * width + row..].first_chunk_mut::<LANES>();
                let places = places.expect("places of 16 rows").as_mut_ptr();
                // SAFETY: 16 places of four bytes.
                unsafe { _mm512_storeu_ps(places.cast(), *column) };
            }
        }
    }
}

/// Lane `k` of vector `i` becomes lane `i` of vector `k`.
#[target_feature(enable = "avx512f")]
#[inline]
fn columns_of(rows: [__m512; LANES]) -> [__m512; LANES] {
    // In vector `i + j`, of four from `i` on: lanes `4 l` to `4 l + 3` are element `4 l + j` of rows `i` to `i + 3`.
    let mut quads = [_mm512_setzero_ps(); LANES];
    for i in (0..LANES).step_by(4) {
        let (ab, cd) = ((rows[i], rows[i + 1]), (rows[i + 2], rows[i + 3]));
        let low = (_mm512_unpacklo_ps(ab.0, ab.1), _mm512_unpacklo_ps(cd.0, cd.1));
        let high = (_mm512_unpackhi_ps(ab.0, ab.1), _mm512_unpackhi_ps(cd.0, cd.1));
        for (half, (ab, cd)) in [low, high].into_iter().enumerate() {
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            quads[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            quads[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
        }
    }
    let mut columns = [_mm512_setzero_ps(); LANES];
    for j in 0..4 {
        let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
        let low = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0x44>(c, d));
        let high = (_mm512_shuffle_f32x4::<0xee>(a, b), _mm512_shuffle_f32x4::<0xee>(c, d));
        columns[j] = _mm512_shuffle_f32x4::<0x88>(low.0, low.1);
        columns[4 + j] = _mm512_shuffle_f32x4::<0xdd>(low.0, low.1);
        columns[8 + j] = _mm512_shuffle_f32x4::<0x88>(high.0, high.1);
        columns[12 + j] = _mm512_shuffle_f32x4::<0xdd>(high.0, high.1);
    }
    columns
}
