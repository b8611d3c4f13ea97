//! SSE2, which every 64-bit x86 processor has, so that it belongs to the level `portable` there: the two products
//! in whose plain form the compiler does not find `pmaddwd` (with it, attention took 200 ms where it takes 47).

pub(crate) mod int16_panels;
pub(crate) mod int8_product;

pub(crate) const NAME: &str = crate::cpu::portable::NAME;
