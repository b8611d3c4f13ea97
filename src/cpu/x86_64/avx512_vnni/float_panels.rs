//! AVX-512, f32 on the left: 6 x 4 accumulators of 16 lanes, 4 vectors of the matrix, 1 broadcast of the
//! left, 29 of 32 registers. A matrix that is stored in fewer bytes is widened as it is loaded, once for
//! all rows of a tile.
//!
//! The inner loop must hold no store: check the disassembly after a change (`cargo rustc --release
//! --lib -- --emit asm`).

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, StoredProduct, VECTORS};
use std::arch::x86_64::*;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::F32,
    group: 1,
    vectors: VECTORS,
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

#[target_feature(enable = "avx512f")]
#[inline]
fn fused(x: __m512, y: __m512, sum: __m512) -> __m512 {
    _mm512_fmadd_ps(x, y, sum)
}

/// As on every level, see [`StoredProduct`].
#[target_feature(enable = "avx512f")]
#[inline]
fn apart(x: __m512, y: __m512, sum: __m512) -> __m512 {
    _mm512_add_ps(sum, _mm512_mul_ps(x, y))
}

/// A module for one form of storage and one way to add products up: a target feature is an attribute of a
/// function, so the load stands in the function that enables it.
macro_rules! stored {
    ($name:ident, $size:literal, $add:ident, $from:ident => $load:expr) => {
        mod $name {
            use super::*;

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            pub(super) unsafe fn multiply(panel: Panel) {
                for part in panel.parts(VECTORS, $size) {
                    for tile in part.tiles(ROWS) {
                        // SAFETY: a part of what is valid by contract.
                        unsafe { for_tile!(tile, multiply_tile) }
                    }
                }
            }

            /// `16 * V` columns of `R` rows.
            ///
            /// # Safety
            /// That of the contract, with `R` rows and `V` vectors.
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            unsafe fn multiply_tile<const R: usize, const V: usize>(tile: Panel) {
                let mut sums = [[_mm512_setzero_ps(); V]; R];
                for k in 0..tile.groups {
                    let mut matrix = [_mm512_setzero_ps(); V];
                    for (v, matrix) in matrix.iter_mut().enumerate() {
                        let $from = tile.group(k, v * LANES * $size);
                        // SAFETY: `V` vectors in each of `groups` rows of the matrix by contract.
                        *matrix = unsafe { $load };
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: `groups` elements in each of `R` rows by contract.
                        let x = _mm512_set1_ps(unsafe { *tile.lhs_of::<f32>(row).add(k) });
                        for (sum, matrix) in sums.iter_mut().zip(matrix) {
                            *sum = $add(x, matrix, *sum);
                        }
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    for (v, sum) in sums.into_iter().enumerate() {
                        // SAFETY: `V` vectors of sums in each of `R` rows by contract.
                        unsafe {
                            let start = tile.start_of(row, v * LANES);
                            let sum = match start.is_null() {
                                true => sum,
                                false => _mm512_add_ps(_mm512_loadu_ps(start), sum),
                            };
                            _mm512_storeu_ps(tile.sums_of(row, v * LANES), sum);
                        }
                    }
                }
            }
        }
    };
}

stored!(packed, 4, fused, from => _mm512_loadu_ps(from.cast()));
stored!(f32, 4, apart, from => _mm512_loadu_ps(from.cast()));
stored!(f16, 2, apart, from => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())));
stored!(bf16, 2, apart, from => {
    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
});
stored!(int8, 1, apart, from => _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))));
