//! NEON with the matrix extension for int8: servers since Neoverse V1, Apple since M2. The bf16 extension
//! mostly comes with it and has kernels of its own, which are an addition to the level.

pub(crate) mod bf16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
mod matrix;

pub(crate) const NAME: &str = "aarch64-i8mm";
/// The kernels that need the bf16 extension.
pub(crate) const BF16: &str = "aarch64-bf16";
