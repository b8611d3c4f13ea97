//! AVX2 with FMA and F16C, f32 on the left. A vector of 16 columns is two registers: 6 x 2 accumulators,
//! 2 of the matrix, 1 broadcast of the left, 15 of 16 registers, so panels are one vector wide. A matrix
//! that is stored in fewer bytes is widened as it is loaded, once for all rows of a tile.

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, StoredProduct};
use std::arch::x86_64::*;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::F32,
    group: 1,
    vectors: 1,
    bias: 0,
    multiply: packed::multiply,
};

pub(crate) const STORED: StoredProduct = StoredProduct {
    name: super::NAME,
    f32: f32::multiply,
    f16: f16::multiply,
    bf16: bf16::multiply,
    int8: int8::multiply,
};

/// Columns of a register.
const HALF: usize = LANES / 2;

#[target_feature(enable = "avx2,fma")]
#[inline]
fn fused(x: __m256, y: __m256, sum: __m256) -> __m256 {
    _mm256_fmadd_ps(x, y, sum)
}

/// As on every level, see [`StoredProduct`].
#[target_feature(enable = "avx2")]
#[inline]
fn apart(x: __m256, y: __m256, sum: __m256) -> __m256 {
    _mm256_add_ps(sum, _mm256_mul_ps(x, y))
}

/// A module for one form of storage and one way to add products up: a target feature is an attribute of a
/// function, so the load stands in the function that enables it.
macro_rules! stored {
    ($name:ident, $size:literal, $add:ident, $from:ident => $load:expr) => {
        mod $name {
            use super::*;

            #[target_feature(enable = "avx2,fma,f16c")]
            pub(super) unsafe fn multiply(panel: Panel) {
                for part in panel.parts(1, $size) {
                    for tile in part.tiles(ROWS) {
                        // SAFETY: a part of what is valid by contract.
                        unsafe { for_rows!(tile.rows, multiply_tile, (tile)) }
                    }
                }
            }

            /// 16 columns of `R` rows.
            ///
            /// # Safety
            /// That of the contract, with `R` rows and one vector.
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn multiply_tile<const R: usize>(tile: Panel) {
                let mut sums = [[_mm256_setzero_ps(); 2]; R];
                for k in 0..tile.groups {
                    let mut matrix = [_mm256_setzero_ps(); 2];
                    for (half, matrix) in matrix.iter_mut().enumerate() {
                        let $from = tile.group(k, half * HALF * $size);
                        // SAFETY: a vector in each of `groups` rows of the matrix by contract.
                        *matrix = unsafe { $load };
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: `groups` elements in each of `R` rows by contract.
                        let x = _mm256_set1_ps(unsafe { *tile.lhs_of::<f32>(row).add(k) });
                        sums[0] = $add(x, matrix[0], sums[0]);
                        sums[1] = $add(x, matrix[1], sums[1]);
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    for (half, sum) in sums.into_iter().enumerate() {
                        // SAFETY: a vector of sums in each of `R` rows by contract.
                        unsafe {
                            let start = tile.start_of(row, half * HALF);
                            let sum = match start.is_null() {
                                true => sum,
                                false => _mm256_add_ps(_mm256_loadu_ps(start), sum),
                            };
                            _mm256_storeu_ps(tile.sums_of(row, half * HALF), sum);
                        }
                    }
                }
            }
        }
    };
}

stored!(packed, 4, fused, from => _mm256_loadu_ps(from.cast()));
stored!(f32, 4, apart, from => _mm256_loadu_ps(from.cast()));
stored!(f16, 2, apart, from => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())));
stored!(bf16, 2, apart, from => {
    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
});
stored!(int8, 1, apart, from => _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))));
