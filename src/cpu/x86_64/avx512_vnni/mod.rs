//! AVX-512 with VNNI: servers since Cascade Lake, Ice Lake and Zen 4.

pub(crate) mod float_panels;
pub(crate) mod int16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
pub(crate) mod rotate;
pub(crate) mod rows;
pub(crate) mod softmax;

pub(crate) const NAME: &str = "x86_64-avx512-vnni";
