//! x86 with 64 bits: one folder a level, and what the level `portable` has there.

pub(crate) mod avx2;
pub(crate) mod avx512_vnni;
pub(crate) mod avx_vnni;
pub(crate) mod sse2;
