//! SSE2, as AVX2 does it: both sides widened to 16 bits, `pmaddwd` sums pairs of products.

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;

// 4 x 2 accumulators, 2 registers of the right side, 1 of the left, a product: 12 of 16.
const MR: usize = 4;
const LANES: usize = 4;
const VECTORS: usize = 2;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 2;

pub(crate) const PRODUCT: Int8Product = Int8Product {
    name: super::NAME,
    geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Wide },
    tile,
    scores,
};

int8_tiles! {
    features: "sse2",
    integers: __m128i, _mm_loadu_si128, _mm_set1_epi32, _mm_storeu_si128,
    pairs: |sum, x, y| _mm_add_epi32(sum, _mm_madd_epi16(x, y)),
    convert: _mm_cvtepi32_ps,
    floats: _mm_loadu_ps, _mm_set1_ps, _mm_mul_ps, _mm_add_ps, _mm_storeu_ps,
}

/// The sums of `ROWS` rows, 8 columns each.
#[target_feature(enable = "sse2")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m128i; VECTORS]; ROWS] {
    // SAFETY: by contract.
    let mut sums = unsafe { start::<ROWS>(input) };
    for group in 0..input.groups {
        // SAFETY: the right panel holds `groups` times 16 bytes by contract.
        let b = unsafe { _mm_loadu_si128(input.rhs.add(group * NR * GROUP).cast()) };
        // Each byte in the upper half of 16 bits, shifted down with its sign.
        let b = [_mm_unpacklo_epi8(b, b), _mm_unpackhi_epi8(b, b)];
        let b = [_mm_srai_epi16::<8>(b[0]), _mm_srai_epi16::<8>(b[1])];
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: each row holds `groups` pairs of i16 by contract.
            let a = unsafe { input.lhs.add(row * input.row_bytes).cast::<i32>().add(group) };
            // SAFETY: as above.
            let a = _mm_set1_epi32(unsafe { a.read_unaligned() });
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm_add_epi32(*sum, _mm_madd_epi16(a, b));
            }
        }
    }
    sums
}
