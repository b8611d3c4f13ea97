//! AVX2 with FMA and F16C: every x86 processor of the last ten years.

mod codes;
pub(crate) mod float_panels;
pub(crate) mod int16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
pub(crate) mod rows;
pub(crate) mod softmax;
mod stored_int8;

pub(crate) const NAME: &str = "x86_64-avx2";

plain_kernels!(NAME, "avx2,fma,f16c,bmi1,bmi2");
