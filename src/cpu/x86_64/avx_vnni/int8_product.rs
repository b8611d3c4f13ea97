//! AVX-VNNI: `vpdpbusd` on 256 bits, for processors that have it without AVX-512 (Intel's since
//! Alder Lake, AMD's Zen 5 has both).
//!
//! 6 x 2 accumulators of 8 lanes, 2 registers of the right side, 1 broadcast of the left: 15 of 16
//! registers. One step of the depth is 8 loads and 12 `vpdpbusd`.
//!
//! The instruction exists in two encodings: VEX (AVX-VNNI) and EVEX (AVX-512 VNNI with VL), whose
//! machines do not contain each other. The tile is written once; tests stamp it with EVEX too, so that
//! its arithmetic is checked on machines that have only that one.

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};

const MR: usize = 6;
const LANES: usize = 8;
const VECTORS: usize = 2;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

/// A module with the tile in one encoding.
macro_rules! encoding {
    ($module:ident, $name:expr, $features:literal, $dpbusd:ident, $dpwssd:ident) => {
        pub(crate) mod $module {
            use super::*;
            use std::arch::x86_64::*;

            pub(crate) const PRODUCT: Int8Product = Int8Product {
                name: $name,
                geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Biased },
                tile,
                scores,
            };

            int8_tiles! {
                features: $features,
                integers: __m256i, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_storeu_si256,
                pairs: |sum, x, y| $dpwssd(sum, x, y),
                convert: _mm256_cvtepi32_ps,
                floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps,
                    _mm256_storeu_ps,
            }

            /// The sums of `ROWS` rows, 16 columns each.
            ///
            /// # Safety
            /// As for [`Int8Product::tile`].
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m256i; VECTORS]; ROWS] {
                // SAFETY: the right panel holds `groups` times 64 bytes and each row of the left side
                // `groups` words of 4 bytes, by contract.
                unsafe {
                    let mut sums = start::<ROWS>(input);
                    for group in 0..input.groups {
                        let b = input.rhs.add(group * NR * GROUP);
                        let b = [
                            _mm256_loadu_si256(b.cast()),
                            _mm256_loadu_si256(b.add(LANES * GROUP).cast()),
                        ];
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let a = input.lhs.add(row * input.row_bytes + group * GROUP);
                            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
                            for (sum, b) in sums.iter_mut().zip(b) {
                                *sum = $dpbusd(*sum, a, b);
                            }
                        }
                    }
                    sums
                }
            }
        }
    };
}

encoding!(
    vex,
    super::super::NAME,
    "avx2,avxvnni",
    _mm256_dpbusd_avx_epi32,
    _mm256_dpwssd_avx_epi32
);
#[cfg(test)]
encoding!(
    evex,
    super::super::EVEX,
    "avx2,avx512vnni,avx512vl",
    _mm256_dpbusd_epi32,
    _mm256_dpwssd_epi32
);
