//! AVX-512 VNNI, int8 as it is stored, int16 on the left: `vpdpwssd` on two rows at once, whose bytes are put
//! beside each other and widened. 6 x 4 accumulators of 16 lanes, 4 vectors of the matrix, 1 broadcast of the
//! left, 29 of 32 registers.

use crate::cpu::contracts::VECTORS;
use crate::cpu::contracts::panel_product::AHEAD;
use crate::memory::prefetch;
use std::arch::x86_64::*;

stored_int8! {
    features: "avx512f,avx512bw,avx512vnni",
    vectors: VECTORS,
    tile: |tile, run, keys| for_tile!(tile, add_run, run, keys.clone()),
    integers: __m512i, _mm512_setzero_si512(), _mm512_set1_epi32,
    load: |a, b| {
        let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
        let pairs = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
        _mm512_cvtepi8_epi16(pairs)
    },
    pairs: |sum, x, y| _mm512_dpwssd_epi32(sum, x, y),
    convert: _mm512_cvtepi32_ps,
    floats: _mm512_loadu_ps, _mm512_set1_ps, _mm512_mul_ps, _mm512_add_ps, _mm512_storeu_ps,
}
