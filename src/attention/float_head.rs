//! One head of a tensor in f32, for the fp32 backend.
//!
//! ```text
//! many rows   keys * scale, transposed -> panels     values -> panels
//! few rows    keys and values are read where they lie: packing them would take longer than the product
//! ```

use super::engine::{Block, KeyValues, Queries, QueryBlock, Running, Tile, gather};
use super::tensor_values::{accumulate, large_among, large_rows, tiles};
use crate::cpu::Level;
use crate::cpu::contracts::{Format, LANES, Rows as Matrix};
use crate::memory::overwrite;
use crate::product::{PackedMatrix, Start, StoredMatrix};
use crate::view::View;
use std::ops::Range;

/// Keys or values of a head.
pub(super) enum Float<'a> {
    Packed(&'a PackedMatrix),
    /// `[N, D]` or `[N, Dv]`.
    InPlace(Matrix<'a>),
}

/// A head for the engine.
pub(super) struct FloatHead<'a> {
    pub level: Level,
    pub queries: &'a View<'a>,
    pub shape: Queries,
    /// Transposed and times `factor`, where they are packed.
    pub keys: Float<'a>,
    pub values: Float<'a>,
    /// Multiplies every score.
    pub factor: f32,
}

/// Up to this many rows are multiplied with keys and values as they lie.
pub(super) const FEW: usize = 8;

/// Keys that are scored at a time, if they are not packed.
const STEP: usize = LANES;

impl KeyValues for FloatHead<'_> {
    fn width(&self) -> usize {
        match &self.values {
            Float::Packed(values) => values.width(),
            Float::InPlace(values) => values.depth(),
        }
    }

    fn step(&self) -> usize {
        match &self.keys {
            Float::Packed(keys) => keys.panel_width(),
            Float::InPlace(_) => STEP,
        }
    }

    fn tiles(&self, seen: Range<usize>) -> Vec<Range<usize>> {
        tiles(seen, self.step())
    }

    fn prepare(&self, blocks: &[Block], queries: &mut [QueryBlock]) {
        for (block, QueryBlock { values, buffer, .. }) in blocks.iter().zip(queries) {
            gather(self.queries, &self.shape, &block.rows, values, buffer);
        }
    }

    fn score(&self, queries: &QueryBlock, keys: Range<usize>, scores: &mut [f32], stride: usize) {
        let depth = self.queries.depth();
        let rows = queries.values.len().checked_div(depth).unwrap_or(scores.len() / stride);
        match &self.keys {
            Float::Packed(packed) => {
                // SAFETY: `PackedMatrix::multiply` writes numbers.
                let out = unsafe { overwrite(scores) };
                packed.multiply(keys, (&queries.values, depth, rows), Start::Zero, (out, stride));
            }
            Float::InPlace(all) => {
                let queries = Matrix::new(&queries.values, rows, depth, depth);
                score_in_place(self.level, (queries, all.part(keys)), self.factor, scores, stride);
            }
        }
    }

    fn large(&self, keys: Range<usize>) -> Vec<usize> {
        match &self.values {
            Float::Packed(values) => large_among(values.exceptions(), keys),
            Float::InPlace(all) => large_rows(all.part(keys.clone()), keys),
        }
    }

    fn format(&self, _rows: usize) -> Format {
        Format::F32
    }

    fn accumulate(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    ) {
        match &self.values {
            Float::Packed(values) => accumulate(values, keys, tile, running, sums),
            Float::InPlace(all) => accumulate_in_place(self.level, all.part(keys), tile, sums),
        }
    }
}

/// Scores of f32 queries with f32 keys where they lie, times a factor.
pub(super) fn score_in_place(
    level: Level,
    (queries, keys): (Matrix<'_>, Matrix<'_>),
    factor: f32,
    scores: &mut [f32],
    stride: usize,
) {
    for (query, scores) in queries.iter().zip(scores.chunks_mut(stride)) {
        let scores = &mut scores[..keys.count()];
        level.dots(keys, Matrix::one(query), scores);
        scores.iter_mut().for_each(|score| *score *= factor);
    }
}

/// Adds f32 values where they lie, multiplied by f32 probabilities.
pub(super) fn accumulate_in_place(
    level: Level,
    values: Matrix<'_>,
    tile: &Tile<'_>,
    sums: &mut [f32],
) {
    debug_assert_eq!(tile.probs.format(), Format::F32);
    if tile.large.is_empty() {
        let (shape, stride) = ((values.count(), values.depth()), values.stride());
        let matrix = StoredMatrix::of_f32(values.data(), shape, stride);
        return matrix.accumulate(level, tile.scores, tile.stride, sums);
    }
    // What a row does not see must not leak through 0 * NaN.
    let rows = tile.scores.chunks(tile.stride).zip(sums.chunks_exact_mut(values.depth()));
    for (probs, sums) in rows {
        for (p, value) in probs.iter().zip(values.iter()).filter(|(p, _)| **p != 0.0) {
            sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += p * x);
        }
    }
}

/// Whether values of this width can be multiplied where they lie.
pub(super) fn in_place(rows: usize, value_dim: usize) -> bool {
    rows <= FEW && value_dim.is_multiple_of(LANES)
}
