//! SSE2, which every 64-bit x86 processor has, so that it belongs to the level `portable` there. Of what plain Rust
//! does, these are the two products: the compiler does not find `pmaddwd` in them, and is eight times as slow.

pub(crate) mod int16_panels;
pub(crate) mod int8_product;

pub(crate) const NAME: &str = crate::cpu::portable::NAME;
