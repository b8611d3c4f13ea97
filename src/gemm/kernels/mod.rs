//! The leaves: one file for each instruction set, each a tile and nothing else. The algorithm
//! around them is in `driver`, their order in `dispatch`.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512_vnni;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx_vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_dotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_i8mm;
pub(super) mod portable;
