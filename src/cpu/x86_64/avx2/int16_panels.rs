//! AVX2, int16: `vpmaddwd` multiplies sixteen elements and adds pairs of products, `vpaddd` adds those up.
//! 6 x 2 accumulators of 8 lanes; a product, a broadcast of the left side and 2 registers of the matrix
//! make 16 of 16.

use crate::cpu::contracts::panel_product::ROWS;
use std::arch::x86_64::*;

int16_panels! {
    name: super::NAME,
    features: "avx2",
    rows: ROWS,
    integers: __m256i, _mm256_loadu_si256, _mm256_set1_epi32,
    pairs: |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)),
    convert: _mm256_cvtepi32_ps,
    floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps,
}
