//! AVX-512 with VNNI: servers since Cascade Lake, Ice Lake and Zen 4.

pub(crate) mod float_panels;
pub(crate) mod int16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
mod rotate;
mod rows;
pub(crate) mod softmax;
mod stored_int8;
mod transpose;

use crate::cpu::contracts::RowKernels;

pub(crate) const NAME: &str = "x86_64-avx512-vnni";

pub(crate) const ROWS: RowKernels = RowKernels {
    name: NAME,
    quantize: rows::quantize,
    condition: rotate::condition,
    dots: rows::dots,
    rotate: rotate::rotate,
    transpose: transpose::transpose,
};
