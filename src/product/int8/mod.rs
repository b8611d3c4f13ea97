//! The exact int8 product: `u8 or i8 [M, D] x i8 [N, D] -> i32 [M, N]`.
//!
//! ```text
//! for each panel of NR rows of the right side      packed once, stays in L1
//!   for each panel of MR rows of the left side
//!     kernel: an MR x NR tile of int32, over the whole depth D
//!     epilogue: int32 out, or f32 out with scales
//! ```
//!
//! `pack` puts operands into the order a kernel reads, by `spread`; `tiles` has the loops around it, `matmul` the whole
//! product for plain slices. The plain triple loop that every level must equal, bit for bit, is
//! [`reference::int_product`](crate::reference::int_product).
//!
//! # Why it is exact
//! No instruction used here saturates on the way, and a sum of `D` products of u8 and i8 fits an
//! i32 as long as `D * 255 * 128 < 2^31`, that is `D <= 65793` ([`max_depth`]). Sums of partial
//! corrections may leave that range in between; two's complement arithmetic wraps them back.

mod matmul;
mod pack;
mod spread;
mod tiles;

pub use matmul::{Lhs, Rhs, ZeroPoints, matmul_nt, max_depth};

pub(crate) use matmul::check_depth;
pub(crate) use pack::{PackedLhs, PackedRhs, RhsChunk, RowSums, unpack};
pub(crate) use tiles::{ScoreScales, int_tiles, score_tiles};
