//! NEON, which every processor has. Where plain Rust is as good, it is plain Rust compiled for it.

pub(crate) mod float_panels;

use std::arch::aarch64::*;

pub(crate) const NAME: &str = "aarch64-neon";

/// Plain Rust, which is compiled for NEON.
pub(crate) const INT8_PRODUCT: crate::cpu::contracts::Int8Product =
    crate::cpu::contracts::Int8Product {
        name: NAME,
        ..crate::cpu::portable::int8_product::PRODUCT
    };

/// Plain Rust, which is compiled for NEON.
pub(crate) const INT8_PANELS: crate::cpu::contracts::PanelProduct =
    crate::cpu::contracts::PanelProduct { name: NAME, ..crate::cpu::portable::int8_panels::PANELS };

/// Plain Rust, which is compiled for NEON.
pub(crate) const INT16_PANELS: crate::cpu::contracts::PanelProduct =
    crate::cpu::contracts::PanelProduct {
        name: NAME,
        ..crate::cpu::portable::int16_panels::PANELS
    };

plain_kernels!(NAME, "neon");

/// Adds to each lane of `sum` the products of two i16 of `x` with two of `y`.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn add_pairs(sum: int32x4_t, x: int32x4_t, y: int32x4_t) -> int32x4_t {
    let (x, y) = (vreinterpretq_s16_s32(x), vreinterpretq_s16_s32(y));
    let low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
    vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(x, y)))
}
