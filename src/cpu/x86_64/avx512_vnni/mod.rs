//! AVX-512 with VNNI: servers since Cascade Lake, Ice Lake and Zen 4. AVX512-BF16 comes with some of
//! them and has kernels of its own, which are an addition to the level.

pub(crate) mod bf16_panels;
pub(crate) mod float_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
pub(crate) mod rotate;
pub(crate) mod rows;
pub(crate) mod softmax;

pub(crate) const NAME: &str = "x86_64-avx512-vnni";
/// The kernels that need AVX512-BF16.
pub(crate) const BF16: &str = "x86_64-avx512-bf16";
