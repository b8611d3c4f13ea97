//! NEON, which every processor has. Where plain Rust is as good, it is plain Rust compiled for it.

pub(crate) mod float_panels;

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
