//! AVX2, int8 as it is stored, int16 on the left: `vpmaddwd` on two rows at once, whose bytes are put beside each
//! other and widened. 6 x 2 accumulators of 8 lanes.

use crate::cpu::contracts::LANES;
use crate::cpu::contracts::panel_product::AHEAD;
use crate::memory::prefetch;
use std::arch::x86_64::*;

stored_int8! {
    features: "avx2",
    vectors: 1,
    tile: |tile, run, keys| for_rows!(tile.rows, add_run, (tile, run, keys.clone()), LANES / WIDTH),
    integers: __m256i, _mm256_setzero_si256(), _mm256_set1_epi32,
    load: |a, b| {
        let (a, b) = (_mm_loadl_epi64(a.cast()), _mm_loadl_epi64(b.cast()));
        _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b))
    },
    pairs: |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)),
    convert: _mm256_cvtepi32_ps,
    floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps,
}
