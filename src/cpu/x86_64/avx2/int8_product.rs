//! AVX2 without saturation: both sides widened to 16 bits, `vpmaddwd` sums pairs of products.
//!
//! The better known way, `vpmaddubsw` on u8 x i8, adds two products in 16 bits and saturates
//! (255 * 127 * 2 does not fit), so it cannot be exact over the full range.

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;

// 6 x 2 accumulators, 2 registers of the right side, 1 of the left: 15 of 16.
const MR: usize = 6;
const LANES: usize = 8;
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
    features: "avx2",
    integers: __m256i, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_storeu_si256,
    pairs: |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)),
    convert: _mm256_cvtepi32_ps,
    floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps,
}

/// The sums of `ROWS` rows, 16 columns each.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m256i; VECTORS]; ROWS] {
    // SAFETY: by contract.
    let mut sums = unsafe { start::<ROWS>(input) };
    for group in 0..input.groups {
        // SAFETY: the right panel holds `groups` times 32 bytes by contract.
        let b = unsafe {
            let b = input.rhs.add(group * NR * GROUP);
            [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(b.cast())),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(16).cast())),
            ]
        };
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: each row holds `groups` pairs of i16 by contract.
            let a = unsafe { input.lhs.add(row * input.row_bytes).cast::<i32>().add(group) };
            // SAFETY: as above.
            let a = _mm256_set1_epi32(unsafe { a.read_unaligned() });
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(a, b[0]));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(a, b[1]));
        }
    }
    sums
}
