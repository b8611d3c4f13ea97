//! Arm with 64 bits: one folder a level. NEON is part of the baseline, so plain Rust is compiled for it.

pub(crate) mod dotprod;
pub(crate) mod i8mm;
pub(crate) mod neon;
