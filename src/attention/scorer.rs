//! Int8 scores of any block of queries against all keys of its head.

use super::ScoreConfig;
use super::engine::{BLOCK, Block, QueryBlock, Rows, TOGETHER, blocks, together};
use super::keys::PackedKeys;
use super::operand::{Operand, Side};
use super::seen::Seen;
use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::Rows as Matrix;
use crate::memory::{Aligned, Kept, written};
use crate::parallel::{Pace, Work};
use crate::product::{self, ScoreScales};
use crate::quant::{Scheme, Smoothing};
use crate::view::View;
use std::mem::MaybeUninit;
use std::ops::Range;

/// What is done to every score on its way out.
#[derive(Clone, Copy)]
pub(super) struct ScoreScale {
    /// Multiplies every score.
    pub factor: f32,
    /// Whether what smooth-K adds to a whole row is added. A softmax does not see it, and is more exact
    /// without.
    pub row_constants: bool,
}

impl ScoreScale {
    /// `q·k^T` itself.
    pub(super) const RAW: ScoreScale = ScoreScale { factor: 1.0, row_constants: true };
}

/// Queries that are quantized block by block, against keys that are packed head by head.
pub(super) struct Scorer<'a> {
    pub level: Level,
    pub q: Operand<'a>,
    pub k: Operand<'a>,
    /// Query heads that share a key head.
    group: usize,
    pub scale: ScoreScale,
    /// What takes part.
    pub seen: Seen,
}

/// The level in use, for a product of this depth.
///
/// # Errors
/// [`Error::Level`] for a forced level that cannot be used, [`Error::Depth`] beyond the limit.
pub(super) fn check_product(depth: usize, config: &ScoreConfig) -> Result<Level> {
    config.check_depth(depth)?;
    Level::active()
}

impl ScoreConfig {
    /// # Errors
    /// Those that concern only the configuration and the shapes of `q` and `k`: [`Error::Depth`] and those of
    /// [`QuantConfig::groups`](crate::quant::QuantConfig).
    pub(crate) fn check(&self, q: &[usize], k: &[usize]) -> Result<()> {
        self.check_depth(q.last().copied().unwrap_or(0))?;
        self.q.groups(q)?;
        self.k.groups(k)?;
        Ok(())
    }

    fn check_depth(&self, depth: usize) -> Result<()> {
        let affine = [self.q.scheme, self.k.scheme].contains(&Scheme::Affine);
        product::check_depth(depth, affine)
    }
}

impl<'a> Scorer<'a> {
    /// Finds the ranges of queries and keys.
    ///
    /// # Errors
    /// [`Error::Depth`] beyond the depth limit, [`Error::Mismatch`] for parameters that do not fit
    /// the shapes, [`Error::Level`] for a forced level that cannot be used.
    pub(super) fn prepare(
        q: View<'a>,
        k: View<'a>,
        config: &ScoreConfig,
        scale: ScoreScale,
        seen: Seen,
    ) -> Result<Self> {
        let level = check_product(q.depth(), config)?;
        let (of_q, of_k) = config.conditioning(q.depth());
        let (q, k) = (
            Operand::prepare(level, (Side::Queries, q), &config.q, of_q, &seen)?,
            Operand::prepare(level, (Side::Keys, k), &config.k, of_k, &seen)?,
        );
        let group = (q.view().dims()[1]).checked_div(k.view().dims()[1]).unwrap_or(0);
        Ok(Self { level, q, k, group, scale, seen })
    }

    /// [`Scorer::prepare`] where everything takes part.
    ///
    /// # Errors
    /// Those of [`Scorer::prepare`].
    pub(super) fn of_all(
        q: View<'a>,
        k: View<'a>,
        config: &ScoreConfig,
        scale: ScoreScale,
    ) -> Result<Self> {
        let group = q.dims()[1].checked_div(k.dims()[1]).unwrap_or(0);
        let seen = Seen::all(k.heads(), group, k.tokens());
        Self::prepare(q, k, config, scale, seen)
    }

    /// `[B, H, M, N]`.
    pub(super) fn dims(&self) -> [usize; 4] {
        let [b, h, m, _] = self.q.view().dims();
        [b, h, m, self.k.view().tokens()]
    }

    /// `D`.
    pub(super) fn depth(&self) -> usize {
        self.q.view().depth()
    }

    /// The query heads, counted over the batch, that share the keys of key head `head`.
    pub(super) fn query_heads(&self, head: usize) -> Range<usize> {
        head * self.group..(head + 1) * self.group
    }

    /// Whether something is subtracted from queries.
    pub(super) fn smooths_queries(&self) -> bool {
        self.q.conditioning().smoothing != Smoothing::None
    }

    /// Keys are scored in steps of this many.
    pub(super) fn key_step(&self) -> usize {
        self.level.int8_product().geometry.nr
    }

    /// Quantizes and packs blocks, each of one query head of those that share `keys`, to be scored with the keys of
    /// their tiles.
    pub(super) fn quantize_queries(
        &self,
        keys: &PackedKeys,
        blocks: &[Block],
        queries: &mut [QueryBlock],
    ) {
        let all = blocks.iter().zip(queries);
        let mut all: Vec<_> = all.filter(|(block, _)| !block.tiles.is_empty()).collect();
        all.iter_mut().for_each(|(block, queries)| self.quantize_block(keys, block, queries));
        let tiles = all.iter().flat_map(|(block, _)| block.tiles.iter().cloned());
        let tiles = union(tiles.collect());
        let mut queries: Vec<_> = all.into_iter().map(|(_, queries)| queries).collect();
        self.find_key_biases(keys, &tiles, &mut queries);
    }

    /// All of a block but what it adds to its keys.
    fn quantize_block(&self, keys: &PackedKeys, block: &Block, queries: &mut QueryBlock) {
        let Block { rows, tiles } = block;
        let (depth, tokens) = (self.depth(), self.q.view().tokens());
        queries.member = rows.range.start / tokens;
        let head = self.query_heads(keys.head).start + queries.member;
        let first = queries.member * tokens;
        let tokens = rows.range.start - first..rows.range.end - first;
        let q_mean = keys.query_means[queries.member].as_deref();
        let QueryBlock { buffer, rows, conditioning, .. } = &mut *queries;
        self.q.quantize(
            (head, tokens.clone()),
            q_mean,
            &self.seen,
            conditioning,
            (&mut *rows, None),
        );
        let count = tokens.len();
        rows.scales.iter_mut().for_each(|scale| *scale *= self.scale.factor);
        let mut rows = std::mem::take(buffer);
        let values = self.q.view().rows(head, tokens, &mut rows);
        self.find_row_biases(keys, values, tiles, queries);
        queries.buffer = rows;
        queries.pack(self.level, count, depth, self.is_affine());
    }

    /// What smoothing took away from the scores of a block with blocks of keys, and its scores of keys that stand
    /// out; of the keys of `tiles` only.
    fn find_row_biases(
        &self,
        keys: &PackedKeys,
        values: Matrix<'_>,
        tiles: &[Range<usize>],
        queries: &mut QueryBlock,
    ) {
        let (count, depth) = (values.count(), self.depth());
        let QueryBlock { rows, biases, outliers, .. } = queries;
        // What is there is overwritten, or not read.
        biases.resize(count * keys.blocks());
        outliers.resize(count * keys.outliers.len());
        if depth == 0 {
            return [biases, outliers].into_iter().for_each(|biases| biases.fill(0.0));
        }
        // What all scores of a row have in common matters where some have it in themselves.
        let matters = self.scale.row_constants || keys.blocks() > 1 || !keys.outliers.is_empty();
        for tile in tiles.iter().filter(|tile| !tile.is_empty()) {
            let blocks = tile.start / keys.block..tile.end.div_ceil(keys.block);
            let of_blocks = &mut biases[blocks.start * count..blocks.end * count];
            match matters && !keys.means.is_empty() {
                // With the queries as they are.
                true => self.dots(values, matrix(&keys.means, depth, blocks), of_blocks),
                false => of_blocks.fill(0.0),
            }
            let apart = keys.outliers_in(tile);
            let exact = &mut outliers[apart.start * count..apart.end * count];
            self.dots(values, matrix(&keys.outlier_rows, depth, apart), exact);
            for scores in exact.chunks_exact_mut(count.max(1)) {
                // Those of a query that is not finite are NaN, as with all other keys.
                let scores = scores.iter_mut().zip(&*rows.scales);
                scores.for_each(|(score, scale)| *score += scale * 0.0);
            }
        }
    }

    /// What smoothing took away from the scores of each block with each key of `tiles`. For all blocks at once, so
    /// that every key is read once.
    fn find_key_biases(
        &self,
        keys: &PackedKeys,
        tiles: &[Range<usize>],
        queries: &mut [&mut QueryBlock],
    ) {
        let depth = self.depth();
        for QueryBlock { key_biases, .. } in queries.iter_mut().map(|queries| &mut **queries) {
            // As above.
            key_biases.resize(keys.scales.len());
            key_biases[keys.rhs.rows()..].fill(0.0);
        }
        Kept::with(&MEANS, KEPT, |(means, dots)| {
            means.clear();
            for queries in &mut *queries {
                let block = &mut queries.conditioning.conditioned;
                means.extend_from_slice(block.rotated_mean(self.level).unwrap_or_default());
            }
            for tile in tiles {
                if means.is_empty() {
                    queries.iter_mut().for_each(|block| block.key_biases[tile.clone()].fill(0.0));
                    continue;
                }
                dots.resize(queries.len() * tile.len());
                let conditioned = matrix(&keys.conditioned, depth, tile.clone());
                self.dots(conditioned, Matrix::contiguous(means, depth), dots);
                for (block, dots) in queries.iter_mut().zip(dots.chunks_exact(tile.len())) {
                    block.key_biases[tile.clone()].copy_from_slice(dots);
                }
            }
        });
    }

    /// The products of all rows with all vectors, as they are added to scores.
    fn dots(&self, rows: Matrix<'_>, vectors: Matrix<'_>, out: &mut [f32]) {
        self.level.dots(rows, vectors, out);
        out.iter_mut().for_each(|dot| *dot *= self.scale.factor);
    }

    /// Whether either side may have zero points other than 0.
    pub(super) fn is_affine(&self) -> bool {
        !(self.q.is_symmetric() && self.k.is_symmetric())
    }

    /// f32 scores of a block against `columns` of its keys, whose start is a multiple of
    /// [`Scorer::key_step`], row-major, rows `stride` elements apart. Where `stride` leaves room,
    /// up to one step more is overwritten behind each row.
    pub(super) fn score(
        &self,
        keys: &PackedKeys,
        block: &QueryBlock,
        columns: Range<usize>,
        out: &mut [MaybeUninit<f32>],
        stride: usize,
    ) {
        let scales = ScoreScales {
            row_scales: &block.rows.scales,
            row_biases: &block.biases,
            bias_columns: keys.block,
            column_scales: &keys.scales,
            column_biases: &block.key_biases,
        };
        product::score_tiles(block.packed(), &keys.rhs, columns.clone(), &scales, out, stride);
        let rows = block.rows.scales.len();
        for index in keys.outliers_in(&columns) {
            let exact = &block.outliers[index * rows..(index + 1) * rows];
            let places = out[keys.outliers[index] - columns.start..].iter_mut().step_by(stride);
            places.zip(exact).for_each(|(out, exact)| _ = out.write(*exact));
        }
    }

    /// All f32 scores, `[B, H, M, N]`.
    pub(super) fn all_scores(&self) -> Vec<f32> {
        let n = self.k.view().tokens();
        let write = |keys: &PackedKeys, block: &QueryBlock, out: &mut [MaybeUninit<f32>]| {
            self.score(keys, block, 0..n, out, n);
        };
        // SAFETY: `score_tiles` writes every score.
        unsafe { self.for_all_blocks(write) }
    }

    /// All int32 sums, `[B, H, M, N]`.
    pub(super) fn all_sums(&self) -> Vec<i32> {
        let n = self.k.view().tokens();
        let write = |keys: &PackedKeys, block: &QueryBlock, out: &mut [MaybeUninit<i32>]| {
            product::int_tiles(block.packed(), &keys.rhs, out, n);
        };
        // SAFETY: `int_tiles` writes every sum.
        unsafe { self.for_all_blocks(write) }
    }

    /// Fills `[B, H, M, N]` block by block of queries. Blocks do not depend on each other, so the
    /// result is the same with any number of threads.
    ///
    /// # Safety
    /// `f` writes all of the slice it is given.
    unsafe fn for_all_blocks<T: Send>(
        &self,
        f: impl Fn(&PackedKeys, &QueryBlock, &mut [MaybeUninit<T>]) + Sync,
    ) -> Vec<T> {
        let [b, h, m, n] = self.dims();
        let len = b * h * m * n;
        let work = Work {
            int8_macs: len.saturating_mul(self.depth()),
            elements: (self.q.view().len() + self.k.view().len()).saturating_add(2 * len),
            ..Work::default()
        };
        let of_head = |pace: Pace, head: usize, out: &mut [MaybeUninit<T>]| {
            Kept::with(&KEYS, PackedKeys::KEPT, |keys| {
                let keys = keys.get_or_insert_with(|| PackedKeys::new(self.level));
                self.pack_keys(head, pace, keys);
                // Blocks end with their query head.
                let together = together(pace, m.div_ceil(BLOCK) * self.group);
                let groups = out.chunks_mut(m * n).enumerate().flat_map(|(member, out)| {
                    let groups = out.chunks_mut(together * BLOCK * n).enumerate();
                    groups.map(move |(group, out)| (member * m + group * together * BLOCK, out))
                });
                pace.for_each(groups, |(first, out)| {
                    let blocks = blocks(out.len() / n).map(|rows| Block {
                        rows: Rows { head, range: first + rows.start..first + rows.end },
                        tiles: std::iter::once(0..n).collect(),
                    });
                    let blocks: Vec<Block> = blocks.collect();
                    Kept::with(&QUERIES, KEPT, |queries| {
                        let queries = &mut queries[..blocks.len()];
                        self.quantize_queries(keys, &blocks, queries);
                        let outs = out.chunks_mut(BLOCK * n);
                        queries.iter().zip(outs).for_each(|(queries, out)| f(keys, queries, out));
                    });
                });
            });
        };
        let all = |out: &mut [MaybeUninit<T>]| {
            if len > 0 {
                work.for_each_chunk(out, self.group * m * n, of_head);
            }
        };
        // SAFETY: `len` is the product of all dims of the result, which the views' and the ops' checks keep
        // from overflowing, so the blocks of all heads cover it; `f` writes all of each.
        unsafe { written(len, all) }
    }
}

/// The union of ranges, as ranges that do not touch, in order.
fn union(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|range, before| {
        let touches = range.start <= before.end;
        if touches {
            before.end = before.end.max(range.end);
        }
        touches
    });
    ranges
}

/// Some of the rows that lie one after the other in `data`.
fn matrix(data: &[f32], depth: usize, rows: Range<usize>) -> Matrix<'_> {
    Matrix::contiguous(&data[rows.start * depth..rows.end * depth], depth)
}

thread_local! {
    /// The queries that a thread works on, kept so that a block allocates nothing.
    static QUERIES: Kept<[QueryBlock; TOGETHER]> = const { Kept::new() };
    /// The means of those, and their products.
    static MEANS: Kept<(Aligned<f32>, Aligned<f32>)> = const { Kept::new() };
    /// The keys of the head before, whose memory is used again.
    static KEYS: Kept<Option<PackedKeys>> = const { Kept::new() };
}

/// Bytes of queries that a thread keeps: blocks that are a few thousand numbers deep.
const KEPT: usize = 1 << 20;
