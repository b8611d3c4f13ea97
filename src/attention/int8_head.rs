//! The keys of one head of a tensor in int8, ready for its queries, with its values.

use super::engine::{Block, KeyValues, QueryBlock, Running, Tile};
use super::keys::PackedKeys;
use super::operand::{Buffers, QuantizedRows};
use super::scorer::Scorer;
use super::tensor_values::{accumulate, large_among, tiles};
use crate::cpu::contracts::Format;
use crate::memory::{Kept, overwrite};
use crate::parallel::Pace;
use crate::product::{PackedMatrix, RhsChunk};
use crate::quant::Smoothing;
use std::ops::Range;

/// Keys `keys` of a head, and where they go.
struct KeyChunk<'a> {
    keys: Range<usize>,
    rhs: RhsChunk<'a>,
    scales: &'a mut [f32],
    /// As the codes are, `[keys, D]`, and the means of their blocks.
    conditioned: &'a mut [f32],
    means: &'a mut [f32],
}

/// Keys that one thread packs at a time, where a head is shared by several.
const CHUNK: usize = 128;

impl Scorer<'_> {
    /// Quantizes and packs the keys of `head` that are seen in the place of those that are there.
    pub(super) fn pack_keys(&self, head: usize, pace: Pace, keys: &mut PackedKeys) {
        let (count, depth, block) = (self.seen.keys(head).len(), self.depth(), self.k.block());
        let padded = count.next_multiple_of(self.key_step());
        keys.head = head;
        keys.rhs.reset(count, depth, self.is_affine());
        keys.scales.resize(padded);
        let smoothing = self.k.conditioning().smoothing;
        keys.block = if smoothing == Smoothing::Block { block } else { usize::MAX };
        let blocks = count.div_ceil(block);
        keys.means.resize(if smoothing == Smoothing::None { 0 } else { blocks * depth });
        keys.conditioned.resize(if self.smooths_queries() { count * depth } else { 0 });
        let head_mean =
            Kept::with(&PACKING, KEPT, |(_, buffers)| self.k.head_mean(head, &self.seen, buffers));
        let size = CHUNK.next_multiple_of(self.key_step()).next_multiple_of(block);
        let mut conditioned = keys.conditioned.chunks_mut(size * depth.max(1));
        let mut means = keys.means.chunks_mut(size / block * depth.max(1));
        let chunks = keys.rhs.chunks_mut(size).zip(keys.scales.chunks_mut(size)).enumerate().map(
            |(index, (rhs, scales))| {
                let keys = index * size..((index + 1) * size).min(count);
                let conditioned = conditioned.next().unwrap_or_default();
                let means = means.next().unwrap_or_default();
                KeyChunk { keys, rhs, scales, conditioned, means }
            },
        );
        // Panels do not depend on each other.
        let outliers = pace.map(chunks, |chunk| self.pack_chunk(head, head_mean.as_deref(), chunk));
        keys.outliers = outliers.concat();
        self.keep_outliers(keys);
        self.find_query_means(keys);
    }

    /// Returns the keys that stand out.
    fn pack_chunk(
        &self,
        head: usize,
        head_mean: Option<&[f32]>,
        mut chunk: KeyChunk<'_>,
    ) -> Vec<usize> {
        let depth = self.depth();
        let mut outliers = Vec::new();
        Kept::with(&PACKING, KEPT, |(rows, buffers)| {
            for (index, block) in self.k.blocks(chunk.keys.len()).enumerate() {
                let keys = chunk.keys.start + block.start..chunk.keys.start + block.end;
                // None where nobody asks for them.
                let to = chunk.conditioned.get_mut(block.start * depth..block.end * depth);
                let out = (&mut *rows, to);
                self.k.quantize((head, keys.clone()), head_mean, &self.seen, buffers, out);
                let Buffers { conditioned, .. } = &*buffers;
                for &outlier in &conditioned.outliers {
                    rows.forget(outlier, depth);
                }
                let first = outliers.len();
                outliers.extend(conditioned.outliers.iter().map(|outlier| keys.start + outlier));
                outliers[first..].sort_unstable();
                if let (Some(mean), true) = (conditioned.mean(), depth > 0) {
                    chunk.means[index * depth..][..depth].copy_from_slice(mean);
                }
                chunk.rhs.put(block.start, &rows.codes, rows.sums());
                chunk.scales[block].copy_from_slice(&rows.scales);
            }
        });
        outliers
    }

    /// Copies the rows of the keys that stand out.
    fn keep_outliers(&self, keys: &mut PackedKeys) {
        keys.outlier_rows.clear();
        let (mut buffer, mut gathered) = (Vec::new(), Vec::new());
        for &key in &keys.outliers {
            let at = (keys.head, key..key + 1);
            let row = self.k.rows(at, &self.seen, &mut buffer, &mut gathered);
            keys.outlier_rows.extend_from_slice(row.row(0));
        }
    }

    fn find_query_means(&self, keys: &mut PackedKeys) {
        let heads = self.query_heads(keys.head);
        let mean = |head: usize| {
            Kept::with(&PACKING, KEPT, |(_, buffers)| self.q.head_mean(head, &self.seen, buffers))
        };
        keys.query_means.clear();
        keys.query_means.extend(heads.map(mean));
    }
}

/// A head for the engine.
pub(super) struct Int8Head<'a> {
    pub scorer: &'a Scorer<'a>,
    pub keys: &'a PackedKeys,
    pub values: &'a PackedMatrix,
}

impl KeyValues for Int8Head<'_> {
    fn width(&self) -> usize {
        self.values.width()
    }

    fn step(&self) -> usize {
        self.scorer.key_step()
    }

    fn tiles(&self, seen: Range<usize>) -> Vec<Range<usize>> {
        tiles(seen, self.step())
    }

    fn prepare(&self, blocks: &[Block], queries: &mut [QueryBlock]) {
        self.scorer.quantize_queries(self.keys, blocks, queries);
    }

    fn score(&self, queries: &QueryBlock, keys: Range<usize>, scores: &mut [f32], stride: usize) {
        // SAFETY: `Scorer::score` writes numbers.
        let scores = unsafe { overwrite(scores) };
        self.scorer.score(self.keys, queries, keys, scores, stride);
    }

    fn needs_scores(&self, keys: &Range<usize>) -> bool {
        self.values.exceptions().iter().any(|(key, _)| keys.contains(key))
    }

    fn large(&self, keys: Range<usize>) -> Vec<usize> {
        large_among(self.values.exceptions(), keys)
    }

    fn format(&self, _rows: usize) -> Format {
        self.values.format()
    }

    fn accumulate(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    ) {
        accumulate(self.values, keys, tile, running, sums);
    }
}

thread_local! {
    /// What a thread packs with, kept so that a block allocates nothing.
    static PACKING: Kept<(QuantizedRows, Buffers)> = const { Kept::new() };
}

/// Bytes of that which a thread keeps: blocks of keys that are a few thousand numbers deep.
const KEPT: usize = 1 << 20;
