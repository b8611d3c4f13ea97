//! Rows times a packed matrix with f32 sums: `[M, K] x [K, C] -> [M, C]`.
//!
//! Probabilities times values, in int16, or on request in f32, in int8, and in bf16 where the hardware
//! multiplies it; queries times keys in f32; linear layers; and the pages of a cache, which are multiplied as
//! they lie. int16 halves the memory of f32 and doubles the speed, in exact sums over runs of 64 keys:
//! probabilities have 12 bits with a scale for each row and run, values 13 and a sign with a scale for each
//! channel and run. int8 has 8 and 7 bits, and costs more accuracy than the scores do.
//!
//! * `pack` puts a matrix in the order a kernel reads, which `order` knows; `multiply` are the products with it.
//! * `runs` is what the codes of int8 and int16 stand for.
//! * `rounded` is the left side of int16 where it comes in f32.
//! * `stored` multiplies with a matrix where it lies.

mod multiply;
mod order;
mod pack;
mod rounded;
mod runs;
mod stored;
#[cfg(test)]
mod tests;

pub(crate) use multiply::Start;
pub(crate) use pack::{LARGEST, PackedMatrix};
pub(crate) use rounded::Int16Rows;
pub(crate) use stored::StoredMatrix;
