//! NEON, f32 on the left. A vector of 16 columns is four registers: 6 x 4 accumulators of 4 lanes, 4
//! registers of the matrix, the rest for the left side, so panels are one vector wide. One step of the
//! depth is 10 loads and 24 multiplications by element. A matrix that is stored in fewer bytes is widened
//! as it is loaded, once for all rows of a tile.

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, StoredProduct};
use std::arch::aarch64::*;

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
const QUAD: usize = 4;
/// Registers of a vector.
const QUADS: usize = LANES / QUAD;

/// Four codes. Eight bytes would reach beyond the last columns of a matrix.
///
/// # Safety
/// NEON is there, and four bytes are valid.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn load_codes(from: *const u8) -> int32x4_t {
    // SAFETY: by contract.
    let bytes = unsafe { from.cast::<u32>().read_unaligned() };
    vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(bytes)))))
}

/// Four finite f16. The bits of exponent and mantissa moved into their places in an f32 are the number
/// times `2^-112`, and subnormal ones become normal by the multiplication.
#[target_feature(enable = "neon")]
#[inline]
fn widen_f16(bits: uint16x4_t) -> float32x4_t {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = vmovl_u16(bits);
    let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
    let rest = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
    vmulq_n_f32(vreinterpretq_f32_u32(vorrq_u32(sign, rest)), SCALE)
}

#[target_feature(enable = "neon")]
#[inline]
fn fused(x: f32, y: float32x4_t, sum: float32x4_t) -> float32x4_t {
    vfmaq_n_f32(sum, y, x)
}

/// As on every level, see [`StoredProduct`].
#[target_feature(enable = "neon")]
#[inline]
fn apart(x: f32, y: float32x4_t, sum: float32x4_t) -> float32x4_t {
    vaddq_f32(sum, vmulq_n_f32(y, x))
}

/// A module for one form of storage and one way to add products up: a target feature is an attribute of a
/// function, so the load stands in the function that enables it.
macro_rules! stored {
    ($name:ident, $size:literal, $add:ident, $from:ident => $load:expr) => {
        mod $name {
            use super::*;

            #[target_feature(enable = "neon")]
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
            #[target_feature(enable = "neon")]
            unsafe fn multiply_tile<const R: usize>(tile: Panel) {
                let mut sums = [[vdupq_n_f32(0.0); QUADS]; R];
                for k in 0..tile.groups {
                    let mut matrix = [vdupq_n_f32(0.0); QUADS];
                    for (quad, matrix) in matrix.iter_mut().enumerate() {
                        let $from = tile.group(k, quad * QUAD * $size);
                        // SAFETY: a vector in each of `groups` rows of the matrix by contract.
                        *matrix = unsafe { $load };
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: `groups` elements in each of `R` rows by contract.
                        let x = unsafe { *tile.lhs_of::<f32>(row).add(k) };
                        for (sum, matrix) in sums.iter_mut().zip(matrix) {
                            *sum = $add(x, matrix, *sum);
                        }
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    for (quad, sum) in sums.into_iter().enumerate() {
                        // SAFETY: a vector of sums in each of `R` rows by contract.
                        unsafe {
                            let start = tile.start_of(row, quad * QUAD);
                            let sum = match start.is_null() {
                                true => sum,
                                false => vaddq_f32(vld1q_f32(start), sum),
                            };
                            vst1q_f32(tile.sums_of(row, quad * QUAD), sum);
                        }
                    }
                }
            }
        }
    };
}

stored!(packed, 4, fused, from => vld1q_f32(from.cast()));
stored!(f32, 4, apart, from => vld1q_f32(from.cast()));
stored!(f16, 2, apart, from => widen_f16(vld1_u16(from.cast())));
stored!(bf16, 2, apart, from => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))));
stored!(int8, 1, apart, from => vcvtq_f32_s32(load_codes(from)));
