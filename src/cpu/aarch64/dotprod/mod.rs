//! NEON with the dot product extension: since Armv8.2, and in every processor since 8.4.

pub(crate) mod int8_panels;
pub(crate) mod int8_product;

pub(crate) const NAME: &str = "aarch64-dotprod";
