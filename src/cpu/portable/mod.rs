//! Plain Rust for every machine, compiled for the baseline of its architecture.

pub(crate) mod float_panels;
pub(crate) mod int16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;

pub(crate) const NAME: &str = "portable";

plain_kernels!(NAME);
