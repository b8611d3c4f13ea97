//! AVX2 with FMA and F16C, f32 on the left. A vector of 16 columns is two registers: 6 x 2 accumulators,
//! 2 of the matrix, 1 broadcast of the left, 15 of 16 registers, so panels are one vector wide. A matrix
//! that is stored in fewer bytes is widened as it is loaded, once for all rows of a tile.

use crate::cpu::contracts::LANES;
use crate::cpu::contracts::panel_product::AHEAD;
use std::arch::x86_64::*;

#[target_feature(enable = "avx2,fma")]
#[inline]
fn fused(x: __m256, y: __m256, sum: __m256) -> __m256 {
    _mm256_fmadd_ps(x, y, sum)
}

/// As on every level, see [`StoredProduct`](crate::cpu::contracts::StoredProduct).
#[target_feature(enable = "avx2")]
#[inline]
fn apart(x: __m256, y: __m256, sum: __m256) -> __m256 {
    _mm256_add_ps(sum, _mm256_mul_ps(x, y))
}

float_panels! {
    name: super::NAME,
    features: "avx2,fma,f16c",
    vectors: 1,
    tile: |tile| for_rows!(tile.rows, multiply_tile, (tile), LANES / WIDTH),
    floats: __m256, _mm256_setzero_ps(), |x| _mm256_set1_ps(x), _mm256_loadu_ps, _mm256_add_ps, _mm256_storeu_ps,
    stored_int8: super::stored_int8::multiply,
    packed: 4, 0, fused, |from| _mm256_loadu_ps(from.cast());
    f32: 4, AHEAD, apart, |from| _mm256_loadu_ps(from.cast());
    f16: 2, AHEAD, apart, |from| _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
    bf16: 2, AHEAD, apart, |from| {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    };
}
