//! What the engine asks of keys and values.

use super::queries::Block;
use super::tile::{Running, Tile};
use crate::attention::operand::{Buffers, QuantizedRows};
use crate::cpu::Level;
use crate::cpu::contracts::Format;
use crate::memory::{Aligned, footprint};
use crate::product::PackedLhs;
use std::ops::Range;

/// Rows in the form in which they are multiplied with keys. The memory is kept from one block to the
/// next, whoever holds the keys.
#[derive(Default)]
pub(in crate::attention) struct QueryBlock {
    /// The rows as they are, `[rows, D]`, where they are needed so.
    pub values: Aligned<f32>,
    /// The same, rotated.
    pub rotated: Aligned<f32>,
    /// Where rows are gathered that do not lie together.
    pub buffer: Vec<f32>,
    /// Codes and scales.
    pub rows: QuantizedRows,
    /// The codes, packed.
    pub lhs: Option<PackedLhs>,
    /// What is added to all scores of a row, or to those of a block of keys: `[blocks, rows]`.
    pub biases: Aligned<f32>,
    /// What is added to all scores of a key.
    pub key_biases: Aligned<f32>,
    /// Scores of keys that stand out, `[keys, rows]`.
    pub outliers: Aligned<f32>,
    /// What conditioning takes.
    pub conditioning: Buffers,
    /// Among the query heads that share keys, where all rows are of one.
    pub member: usize,
}

impl QueryBlock {
    /// Packs the codes, `rows` of `depth`, for a level, with zero points if those of either side may not be 0.
    pub(in crate::attention) fn pack(
        &mut self,
        level: Level,
        rows: usize,
        depth: usize,
        affine: bool,
    ) {
        let lhs = self.lhs.take().filter(|lhs| lhs.level() == level);
        let lhs = self.lhs.insert(lhs.unwrap_or_else(|| PackedLhs::new(level)));
        lhs.put(&self.rows.codes, rows, depth, affine.then(|| self.rows.sums()));
    }

    /// The packed codes.
    pub(in crate::attention) fn packed(&self) -> &PackedLhs {
        self.lhs.as_ref().expect("queries are quantized before they are scored")
    }
}

footprint!(QueryBlock: values, rotated, buffer, rows, lhs, biases, key_biases, outliers, conditioning);

/// Keys and values of one head.
pub(in crate::attention) trait KeyValues: Sync {
    /// Channels of the sums: those of values, padded to whole vectors.
    fn width(&self) -> usize;

    /// The keys that are scored at a time are a multiple of this, or end with the last.
    fn step(&self) -> usize;

    /// Rows of scores that [`KeyValues::score`] needs for each row of queries.
    fn rows_of_scores(&self) -> usize {
        1
    }

    /// Those of `seen` in order and in tiles of at most [`TILE`](super::TILE) keys. A tile may start before
    /// `seen`, at a whole step; keys that are not held are left out.
    fn tiles(&self, seen: Range<usize>) -> Vec<Range<usize>>;

    /// Brings the queries of each block into the form of the keys, of which only those of its tiles will be
    /// scored.
    fn prepare(&self, blocks: &[Block], queries: &mut [QueryBlock]);

    /// Writes the scores of all rows with a tile of keys, in units of log2 unless a softcap follows:
    /// row-major, rows `stride` elements apart. Where that leaves room, up to one step more is overwritten
    /// behind each row, and the rows behind the last.
    fn score(&self, queries: &QueryBlock, keys: Range<usize>, scores: &mut [f32], stride: usize);

    /// Those of a tile of keys that have a value beyond [`LARGEST`](crate::product::LARGEST), infinity or NaN.
    fn large(&self, keys: Range<usize>) -> Vec<usize>;

    /// Whether [`KeyValues::accumulate`] may need the scores of a tile in int16 too, of keys whose values it adds one by
    /// one.
    fn needs_scores(&self, _keys: &Range<usize>) -> bool {
        true
    }

    /// The format of probabilities for this many rows.
    fn format(&self, rows: usize) -> Format;

    /// Adds values of the tile, multiplied by their probabilities, to `[rows, width]` sums; those that their
    /// format cannot hold by [`Tile::add_exception`]. May overwrite the probabilities.
    fn accumulate(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    );
}
