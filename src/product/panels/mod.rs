//! Rows times a packed matrix with f32 sums: `[M, K] x [K, C] -> [M, C]`.
//!
//! Probabilities times values, in f32, in bf16 where the hardware multiplies it, or in int8 on request;
//! queries times keys in f32; linear layers; and the pages of a cache, which are multiplied as they lie.
//! bf16 halves the memory and doubles the speed, and its rounding of `P` and `V` (2^-9 relative) is smaller
//! than what int8 scores cost. In int8, probabilities have a scale for each row and run of 64 keys, values
//! one for each channel, and sums are exact over a run; that costs more accuracy than the scores do.
//!
//! * `pack` puts a matrix in the order a kernel reads, and multiplies.
//! * `channels` is the arithmetic around int8 sums.
//! * `stored` multiplies with a matrix where it lies.

mod channels;
mod pack;
mod stored;
#[cfg(test)]
mod tests;

/// The largest magnitude, 2^95, of what is added up with factors of at most 1: 2^32 of them are finite by
/// far, and so is the width of a range between two of them. Rows of a [`PackedMatrix`] that hold more stand
/// beside it.
pub(crate) const LARGEST: f32 = f32::from_bits((127 + 95) << 23);

pub(crate) use pack::{PackedMatrix, Start};
pub(crate) use stored::StoredMatrix;
