//! The leaves: one file for each instruction set, each a tile and nothing else. The algorithm
//! around them is in `driver`, their order in `dispatch`.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512_vnni;
pub(super) mod portable;
