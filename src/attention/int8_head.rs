//! The keys of one head of a tensor in int8, ready for its queries, with its values.

use super::engine::{KeyValues, QueryBlock, Rows, Running, Tile, blocks};
use super::keys::{PackedKeys, SmoothQ};
use super::operand::QuantizedRows;
use super::scorer::Scorer;
use super::tensor_values::{accumulate, large_among, tiles};
use crate::cpu::contracts::Format;
use crate::memory::{Kept, overwrite};
use crate::parallel::Pace;
use crate::product::{PackedMatrix, RhsChunk};
use std::ops::Range;

/// Keys `tokens` of a head, and where they go.
struct KeyChunk<'a> {
    tokens: Range<usize>,
    rhs: RhsChunk<'a>,
    scales: &'a mut [f32],
    zeros: &'a mut [i32],
    sums: &'a mut [i32],
}

/// Keys that one thread packs at a time, where a head is shared by several.
const CHUNK: usize = 128;

impl Scorer<'_> {
    /// Quantizes and packs the keys of `head` in the place of those that are there.
    pub(super) fn pack_keys(&self, head: usize, pace: Pace, keys: &mut PackedKeys) {
        let (tokens, depth) = (self.k.view().tokens(), self.depth());
        let padded = tokens.next_multiple_of(self.key_step());
        keys.head = head;
        keys.rhs.reset(tokens, depth);
        keys.scales.resize(padded, 0.0);
        keys.zeros.resize(padded, 0);
        keys.sums.resize(padded, 0);
        self.k.find_mean(head, &mut keys.mean);
        // Panels do not depend on each other.
        let size = CHUNK.next_multiple_of(self.key_step());
        let chunks = (keys.rhs.chunks_mut(size))
            .zip(keys.scales.chunks_mut(size))
            .zip(keys.zeros.chunks_mut(size).zip(keys.sums.chunks_mut(size)))
            .enumerate()
            .map(|(index, ((rhs, scales), (zeros, sums)))| {
                let tokens = index * size..((index + 1) * size).min(tokens);
                KeyChunk { tokens, rhs, scales, zeros, sums }
            });
        pace.for_each(chunks, |chunk| self.pack_chunk(head, keys.mean.get(), chunk));
        self.smooth_queries(pace, keys);
    }

    fn pack_chunk(&self, head: usize, mean: Option<&[f32]>, mut chunk: KeyChunk<'_>) {
        Kept::with(&PACKING, KEPT, |(rows, buffer)| {
            for block in blocks(chunk.tokens.len()) {
                let tokens = chunk.tokens.start + block.start..chunk.tokens.start + block.end;
                let values = self.k.view().rows(head, tokens.clone(), buffer);
                self.k.quantize(values, (head, tokens), mean, rows);
                chunk.rhs.put(block.start, &rows.codes, &rows.sums);
                chunk.scales[block.clone()].copy_from_slice(&rows.scales);
                chunk.zeros[block.clone()].copy_from_slice(&rows.zeros);
                chunk.sums[block].copy_from_slice(&rows.sums);
            }
        });
    }

    /// The mean of the queries of each query head, and its scores with the smoothed keys.
    fn smooth_queries(&self, pace: Pace, keys: &mut PackedKeys) {
        let (tokens, padded) = (self.k.view().tokens(), keys.scales.len());
        let heads = self.query_heads(keys.head);
        keys.smooth_q.resize_with(heads.len(), SmoothQ::default);
        for (head, smooth) in heads.zip(&mut keys.smooth_q) {
            self.q.find_mean(head, &mut smooth.mean);
            smooth.biases.resize(padded, 0.0);
            let Some(mean) = smooth.mean.get() else {
                smooth.biases.fill(0.0);
                continue;
            };
            let chunks = smooth.biases[..tokens].chunks_mut(CHUNK).enumerate();
            pace.for_each(chunks, |(index, biases)| {
                Kept::with(&PACKING, KEPT, |(_, buffer)| {
                    let tokens = index * CHUNK..index * CHUNK + biases.len();
                    let rows = self.k.view().rows(keys.head, tokens, buffer);
                    self.level.dots(rows, keys.mean.get(), mean, biases);
                    biases.iter_mut().for_each(|bias| *bias *= self.scale.factor);
                });
            });
        }
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

    fn prepare(&self, rows: &Rows, queries: &mut QueryBlock) {
        self.scorer.quantize_queries(self.keys, rows, queries);
    }

    fn score(&self, queries: &QueryBlock, keys: Range<usize>, scores: &mut [f32], stride: usize) {
        // SAFETY: `Scorer::score` writes numbers.
        let scores = unsafe { overwrite(scores) };
        self.scorer.score(self.keys, queries, keys, scores, stride);
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
    static PACKING: Kept<(QuantizedRows, Vec<f32>)> = const { Kept::new() };
}

/// Bytes of that which a thread keeps: blocks of keys that are a few thousand numbers deep.
const KEPT: usize = 1 << 20;
