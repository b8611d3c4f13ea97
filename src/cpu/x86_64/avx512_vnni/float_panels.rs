//! AVX-512, f32 on the left: 6 x 4 accumulators of 16 lanes, 4 vectors of the matrix, 1 broadcast of the
//! left, 29 of 32 registers. A matrix that is stored in fewer bytes is widened as it is loaded, once for
//! all rows of a tile.
//!
//! The inner loop must hold no store: check the disassembly after a change (`cargo rustc --release
//! --lib -- --emit asm`).

use crate::cpu::contracts::VECTORS;
use crate::cpu::contracts::panel_product::AHEAD;
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
#[inline]
fn fused(x: __m512, y: __m512, sum: __m512) -> __m512 {
    _mm512_fmadd_ps(x, y, sum)
}

/// As on every level, see [`StoredProduct`](crate::cpu::contracts::StoredProduct).
#[target_feature(enable = "avx512f")]
#[inline]
fn apart(x: __m512, y: __m512, sum: __m512) -> __m512 {
    _mm512_add_ps(sum, _mm512_mul_ps(x, y))
}

float_panels! {
    name: super::NAME,
    features: "avx512f,avx512bw,avx512vl",
    vectors: VECTORS,
    tile: |tile| for_tile!(tile, multiply_tile),
    floats: __m512, _mm512_setzero_ps(), |x| _mm512_set1_ps(x), _mm512_loadu_ps, _mm512_add_ps, _mm512_storeu_ps,
    stored_int8: super::stored_int8::multiply,
    packed: 4, 0, fused, |from| _mm512_loadu_ps(from.cast());
    f32: 4, AHEAD, apart, |from| _mm512_loadu_ps(from.cast());
    f16: 2, AHEAD, apart, |from| _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()));
    bf16: 2, AHEAD, apart, |from| {
        let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    };
}
