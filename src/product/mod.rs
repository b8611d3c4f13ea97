//! Products of packed operands: everything in this crate that multiplies does it here.
//!
//! ```text
//! int8     u8 or i8 [M, D] x i8 [N, D] -> exact i32 [M, N], or f32 scores           queries times keys
//! panels   f32, bf16, i16 or u8 [M, K] x packed [K, C] -> f32 [M, C]      probabilities times values, queries
//!                                                      times keys in f32, linear layers, pages of a cache
//! ```
//!
//! * [`matmul_nt`] is the exact product for plain slices.
//! * The tiles are the leaves of the room `cpu`; the loops around them are here.

mod int8;
mod int_product;
mod panels;

#[doc(hidden)]
pub use int_product::int_product;
pub use int8::{Lhs, Rhs, ZeroPoints, matmul_nt, max_depth};

pub(crate) use int8::{
    PackedLhs, PackedRhs, RhsChunk, RowSums, ScoreScales, check_depth, int_tiles, score_tiles,
    unpack,
};
pub(crate) use panels::{Int16Rows, LARGEST, PackedMatrix, Start, StoredMatrix};
