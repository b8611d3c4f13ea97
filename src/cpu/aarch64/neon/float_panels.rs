//! NEON, f32 on the left. A vector of 16 columns is four registers: 6 x 4 accumulators of 4 lanes, 4
//! registers of the matrix, the rest for the left side, so panels are one vector wide. One step of the
//! depth is 10 loads and 24 multiplications by element. A matrix that is stored in fewer bytes is widened
//! as it is loaded, once for all rows of a tile.

use crate::cpu::contracts::LANES;
use crate::cpu::contracts::panel_product::AHEAD;
use std::arch::aarch64::*;

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

/// As on every level, see [`StoredProduct`](crate::cpu::contracts::StoredProduct).
#[target_feature(enable = "neon")]
#[inline]
fn apart(x: f32, y: float32x4_t, sum: float32x4_t) -> float32x4_t {
    vaddq_f32(sum, vmulq_n_f32(y, x))
}

float_panels! {
    name: super::NAME,
    features: "neon",
    vectors: 1,
    tile: |tile| for_rows!(tile.rows, multiply_tile, (tile), LANES / WIDTH),
    // Multiplied by element.
    floats: float32x4_t, vdupq_n_f32(0.0), |x| x, vld1q_f32, vaddq_f32, vst1q_f32,
    // Plain Rust, which is compiled for NEON.
    stored_int8: crate::cpu::portable::stored_int8::multiply,
    packed: 4, 0, fused, |from| vld1q_f32(from.cast());
    f32: 4, AHEAD, apart, |from| vld1q_f32(from.cast());
    f16: 2, AHEAD, apart, |from| widen_f16(vld1_u16(from.cast()));
    bf16: 2, AHEAD, apart, |from| vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast())));
}
