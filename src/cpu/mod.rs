//! What this machine can do: one ordered table of instruction levels, one detection, one variable.
//!
//! ```text
//! contracts   what a kernel is, for each operation, and the layouts it reads
//!     ^
//! leaves      portable/   x86_64/{sse2, avx2, avx_vnni, avx512_vnni}/   aarch64/{neon, dotprod, i8mm}/
//!     ^       one file an operation, each a tile; `plain/` is Rust that any level may compile for itself
//! table       the levels, best first: whether this machine has each, and its kernels as data
//!     ^
//! Level       a level that this machine has: every operation goes through one
//! ```
//!
//! The best level that the machine has is in use, or the one that the environment variable
//! [`CANDLE_INT8_CPU`](LEVEL_VARIABLE) names: for all products, softmax, quantizing, the cache, the layers
//! around attention, and the vectors of plain loops. So what another machine runs can be run here, end to
//! end. [`levels`] lists them all.
//!
//! A new instruction set is a folder with its leaves and an entry in `table`; the tests of the operations are
//! stamped on every entry.

#[macro_use]
mod tiles;
#[macro_use]
pub(crate) mod plain;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod aarch64;
pub(crate) mod contracts;
mod level;
mod portable;
mod table;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(test)]
pub(crate) use level::runnable;
pub use level::{KernelInfo, LEVEL_VARIABLE, LevelInfo, active_level, levels};
pub(crate) use level::{Level, vectors};
