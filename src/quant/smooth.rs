//! Smoothing: subtract a constant vector before quantizing, add its exact effect back to the
//! scores.
//!
//! With `q = q' + a` and `k = k' + c`, for any constant vectors `a` and `c`,
//!
//! ```text
//! q·k  =  q'·k'          int8, and q' and k' span a smaller range than q and k
//!       + a·k'           one f32 per key:   smooth-Q's correction
//!       + q·c            one f32 per query: smooth-K's correction
//! ```
//!
//! Any constant is exact; the mean over tokens removes most of the range. With one constant for all
//! keys of a head a softmax does not see `q·c`, but raw scores do; with one for each block of keys it does.
//! Smooth-K is from SageAttention (Zhang et al. 2024, arXiv:2410.02367), smooth-Q, by blocks of queries,
//! from SageAttention2 (arXiv:2411.10958).

use super::rows::accumulate_finite;
use super::words::words;
use crate::cpu::contracts::Rows;
use crate::memory::{check_size, footprint};
use crate::{Error, Result};

/// What is subtracted from the rows of a head before they are quantized.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Smoothing {
    /// Nothing.
    None,
    /// The mean of all its rows that are seen.
    Head,
    /// For each block of rows its own mean: 48 queries that follow each other, or 64 keys. It follows
    /// what changes along the sequence, and the codes of a block depend on that block alone.
    #[default]
    Block,
}

words!(Smoothing, "smoothing {:?}", None = "none", Head = "head", Block = "block");

/// The mean over the rows of a `[rows, depth]` matrix, summed in f64 over blocks of 256 rows that
/// are summed in f32. Rows that hold NaN or infinity do not count; without any other the mean is 0.
///
/// # Errors
/// [`Error::Mismatch`] unless the rows are whole, [`Error::Shape`] for a depth that memory has no addresses
/// for.
pub fn token_mean(matrix: &[f32], depth: usize) -> Result<Vec<f32>> {
    check_size("token_mean", "the mean", &[depth])?;
    if matrix.len().checked_rem(depth).unwrap_or(matrix.len()) != 0 {
        return Err(Error::Mismatch(format!("{} elements in rows of {depth}", matrix.len())));
    }
    Ok(mean_of_rows(matrix, depth))
}

/// [`token_mean`] of rows that are known to be whole.
pub(crate) fn mean_of_rows(matrix: &[f32], depth: usize) -> Vec<f32> {
    let (mut sums, mut mean) = (MeanSums::default(), Vec::new());
    sums.start(depth);
    for rows in matrix.chunks(256 * depth.max(1)).filter(|_| depth > 0) {
        sums.add(Rows::contiguous(rows, depth));
    }
    sums.finish(&mut mean);
    mean
}

/// The sums of [`mean_of_rows`] for rows that come in blocks; the memory is kept for the next mean.
#[derive(Default)]
pub(crate) struct MeanSums {
    sums: Vec<f64>,
    block: Vec<f32>,
    rows: usize,
}

impl MeanSums {
    /// Forgets what was added.
    pub(crate) fn start(&mut self, depth: usize) {
        self.sums.clear();
        self.sums.resize(depth, 0.0);
        self.rows = 0;
    }

    pub(crate) fn add(&mut self, rows: Rows<'_>) {
        self.rows += accumulate_finite(&mut self.sums, rows, &mut self.block);
    }

    /// Writes the mean.
    pub(crate) fn finish(&self, mean: &mut Vec<f32>) {
        let rows = self.rows.max(1) as f64;
        mean.clear();
        mean.extend(self.sums.iter().map(|sum| (sum / rows) as f32));
    }
}

footprint!(MeanSums: sums, block);

#[cfg(test)]
mod tests {
    use super::token_mean;

    #[test]
    fn mean_over_tokens_leaves_out_rows_that_are_not_finite() {
        let matrix = [1.0, 10.0, f32::NAN, 20.0, 3.0, 30.0, 0.0, f32::INFINITY];
        assert_eq!(token_mean(&matrix, 2).unwrap(), [2.0, 20.0]);
        assert_eq!(token_mean(&[f32::NAN], 1).unwrap(), [0.0]);
        assert_eq!(token_mean(&[], 3).unwrap(), [0.0; 3]);
        assert_eq!(token_mean(&[], 0).unwrap(), [0f32; 0]);
    }
}
