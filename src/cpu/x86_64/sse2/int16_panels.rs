//! SSE2, int16: `pmaddwd` multiplies eight elements and adds pairs of products, `paddd` adds those up. 2 x 4
//! accumulators of 4 lanes; a product, a broadcast of the left side and 4 registers of the matrix make 14 of 16.

use std::arch::x86_64::*;

const ROWS: usize = 2;

int16_panels! {
    name: super::NAME,
    features: "sse2",
    rows: ROWS,
    integers: __m128i, _mm_loadu_si128, _mm_set1_epi32,
    pairs: |sum, x, y| _mm_add_epi32(sum, _mm_madd_epi16(x, y)),
    convert: _mm_cvtepi32_ps,
    floats: _mm_loadu_ps, _mm_set1_ps, _mm_mul_ps, _mm_add_ps, _mm_storeu_ps,
}
