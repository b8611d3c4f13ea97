//! One head of a cache for the engine: pages of codes, and the rows that stay in f32.
//!
//! Queries are two int8 codes an element, the second for what the first leaves over: a query is practically
//! exact, and since a decode step waits for keys from memory, the second product is nearly free. What is
//! left of the error is that of the keys.
//!
//! For few rows of queries values are multiplied as they are stored, with probabilities in f32, or in 16 bits
//! beside values in int8; for many it pays to bring them into the order of faster kernels first, tile by tile.

use super::head::{GROUP, Head, PAGE, Page, Rows as FloatRows};
use crate::attention::engine::{
    Block, KeyValues, Queries, QueryBlock, Running, TILE, Tile, gather, pieces,
};
use crate::attention::float_head::{accumulate_in_place, score_in_place};
use crate::attention::operand::QuantizedRows;
use crate::attention::tensor_values::{accumulate, large_among, large_rows};
use crate::cpu::Level;
use crate::cpu::contracts::{self, BlockCodes, Format, LANES};
use crate::cpu::plain::widest;
use crate::memory::{Kept, overwrite};
use crate::product::{self, Int16Rows, PackedMatrix, ScoreScales};
use crate::view::View;
use std::ops::Range;

/// Up to this many rows, values are multiplied as they are stored.
const FEW: usize = 8;

/// A head, and the queries that see it.
pub(super) struct CacheHead<'a> {
    pub level: Level,
    pub head: &'a Head,
    pub queries: &'a View<'a>,
    pub shape: Queries,
    /// Multiplies every score.
    pub factor: f32,
    /// In which values are multiplied with many rows.
    pub many: Format,
}

thread_local! {
    /// The values of a tile in another order, and in f32.
    static VALUES: Kept<(Option<PackedMatrix>, Vec<f32>)> = const { Kept::new() };
    /// Probabilities of the keys of a page.
    static PROBS: Kept<Int16Rows> = const { Kept::new() };
}

/// Bytes of that which a thread keeps: tiles of values that are a thousand numbers wide.
const KEPT: usize = 4 << 20;

impl CacheHead<'_> {
    /// The rows in f32 that hold the keys of a tile, and the first token of them; `None` for keys in pages.
    fn float_rows(&self, keys: &Range<usize>) -> Option<(&FloatRows, usize)> {
        let Head { sinks, packed, recent, .. } = self.head;
        // The first tile of pages may start where the sinks are, whose slots are empty.
        if keys.end <= sinks.tokens {
            Some((sinks, 0))
        } else if keys.start < *packed {
            None
        } else {
            Some((recent, *packed))
        }
    }

    /// The pages that hold `keys`: where those of a page start among them, their slots, and the page.
    fn parts(&self, keys: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>, &Page)> {
        let keys = keys.clone();
        self.head.pages_of(keys.clone()).map(move |(start, used, page)| {
            let slots = keys.start.saturating_sub(start)..used.min(keys.end - start);
            (start + slots.start - keys.start, slots, page)
        })
    }

    /// What offsets that were subtracted from keys, row-major, add to the scores of each query:
    /// `[offsets, queries]`.
    fn biases(&self, queries: &[f32], offsets: &[f32]) -> Vec<f32> {
        if offsets.is_empty() {
            return Vec::new();
        }
        let of_depth = |rows| contracts::Rows::contiguous(rows, self.head.dims.depth);
        let (queries, offsets) = (of_depth(queries), of_depth(offsets));
        let mut biases = vec![0.0; queries.count() * offsets.count()];
        self.level.dots(queries, offsets, &mut biases);
        biases.iter_mut().for_each(|bias| *bias *= self.factor);
        biases
    }

    /// Int8 scores.
    fn score_pages(
        &self,
        queries: &QueryBlock,
        tokens: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        const NO_BIAS: [f32; PAGE] = [0.0; PAGE];
        let rows = queries.rows.scales.len() / 2;
        let groups = if self.head.local { PAGE / GROUP } else { 1 };
        let mut biases = queries.biases.clone();
        biases.resize(2 * rows * groups);
        for (at, slots, page) in self.parts(&tokens) {
            let of_groups = self.biases(&queries.values, &page.offsets);
            for (biases, group) in biases.chunks_mut(2 * rows).zip(of_groups.chunks(rows)) {
                biases[..rows].copy_from_slice(group);
            }
            let scales = ScoreScales {
                row_scales: &queries.rows.scales,
                row_biases: &biases,
                bias_columns: PAGE / groups,
                column_scales: &page.key_scales,
                column_biases: &NO_BIAS,
            };
            let out = &mut scores[at..];
            // SAFETY: `score_tiles` writes numbers.
            let all = unsafe { overwrite(out) };
            product::score_tiles(queries.packed(), &page.keys, slots.clone(), &scales, all, stride);
            self.score_outliers(queries, page, slots, out, stride);
        }
        let (first, left_over) = scores[..2 * rows * stride].split_at_mut(rows * stride);
        widest!(add, (first, &*left_over), (&mut [f32], &[f32]) => ());
    }

    /// Scores of the keys of a page that stand out, in both halves of the rows.
    fn score_outliers(
        &self,
        queries: &QueryBlock,
        page: &Page,
        slots: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let rows = queries.rows.scales.len() / 2;
        for (slot, key) in page.outliers.iter().filter(|(slot, _)| slots.contains(slot)) {
            let column = &mut scores[slot - slots.start..];
            column[rows * stride..].iter_mut().step_by(stride).take(rows).for_each(|x| *x = 0.0);
            let exact = self.biases(&queries.values, key);
            column.iter_mut().step_by(stride).zip(exact).for_each(|(score, exact)| *score = exact);
            // Those of a query that is not finite are NaN, as with all other keys.
            let poison = queries.rows.scales[..rows].iter().map(|scale| scale * 0.0);
            column.iter_mut().step_by(stride).zip(poison).for_each(|(score, x)| *score += x);
        }
    }

    /// Multiplies values as they are stored.
    fn accumulate_few(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    ) {
        let stride = tile.stride;
        for (at, slots, page) in self.parts(&keys) {
            add_exceptions(page, (at, &slots), tile, running, sums);
            let (matrix, scales) = (page.values.matrix(slots.clone()), page.values.scales());
            if scales.is_empty() {
                matrix.accumulate(self.level, &tile.scores[at..], stride, sums);
                continue;
            }
            for probs in tile.scores.chunks_mut(stride).take(running.len()) {
                let probs = &mut probs[at..at + slots.len()];
                let scales = &scales[slots.clone()];
                probs.iter_mut().zip(scales).for_each(|(p, scale)| *p *= scale);
            }
            let probs = &tile.scores[at..];
            let probs = contracts::Rows::new(probs, running.len(), slots.len(), stride);
            Kept::with(&PROBS, KEPT, |rounded| {
                rounded.put(probs);
                matrix.accumulate_int16(self.level, rounded, sums);
            });
        }
    }

    /// Multiplies values in f32, a copy of them where they are no whole vectors.
    fn accumulate_float(&self, values: &[f32], tile: &Tile<'_>, sums: &mut [f32]) {
        let (dim, width) = (self.head.dims.value_dim, self.width());
        if dim == width {
            let values = contracts::Rows::contiguous(values, dim);
            return accumulate_in_place(self.level, values, tile, sums);
        }
        Kept::with(&VALUES, KEPT, |(_, padded)| {
            padded.clear();
            padded.resize(values.len() / dim * width, 0.0);
            for (padded, row) in padded.chunks_exact_mut(width).zip(values.chunks_exact(dim)) {
                padded[..dim].copy_from_slice(row);
            }
            let values = contracts::Rows::contiguous(padded, width);
            accumulate_in_place(self.level, values, tile, sums);
        });
    }

    /// Multiplies a copy of the tile's values in the order of a kernel for many rows.
    fn accumulate_many(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    ) {
        let dim = self.head.dims.value_dim;
        Kept::with(&VALUES, KEPT, |(kept, rows)| {
            let packed = kept.take().filter(|packed| {
                (packed.level(), packed.format()) == (self.level, tile.probs.format())
            });
            let packed = kept.insert(
                packed.unwrap_or_else(|| PackedMatrix::new(self.level, tile.probs.format(), 0, 0)),
            );
            packed.reset(keys.len(), dim);
            rows.clear();
            if let Some((floats, first)) = self.float_rows(&keys) {
                let part = (keys.start - first) * dim..(keys.end - first) * dim;
                packed.put(0, &floats.values[part]);
            } else {
                for (at, slots, page) in self.parts(&keys) {
                    add_exceptions(page, (at, &slots), tile, running, sums);
                    page.values.decode(slots, rows);
                }
                packed.put(0, rows);
            }
            accumulate(packed, 0..keys.len(), tile, running, sums);
        });
    }
}

impl KeyValues for CacheHead<'_> {
    fn width(&self) -> usize {
        self.head.dims.value_dim.next_multiple_of(LANES)
    }

    fn step(&self) -> usize {
        GROUP
    }

    /// Scores of the second codes lie behind those of the first.
    fn rows_of_scores(&self) -> usize {
        2
    }

    fn tiles(&self, seen: Range<usize>) -> Vec<Range<usize>> {
        let sinks = seen.start..seen.end.min(self.head.sinks.tokens);
        let packed = self.head.kept_from().max(seen.start)..self.head.packed.min(seen.end);
        let recent = self.head.packed.max(seen.start)..self.head.len().min(seen.end);
        // Tiles of pages start with a group, so that panels are whole, and those of a page lie together.
        let start = packed.start / GROUP * GROUP;
        let mut tiles: Vec<_> = pieces(sinks, TILE).collect();
        if !packed.is_empty() {
            let in_pages = (start / TILE * TILE..packed.end).step_by(TILE);
            tiles.extend(in_pages.map(|at| at.max(start)..packed.end.min(at + TILE)));
        }
        tiles.extend(pieces(recent, TILE));
        tiles
    }

    fn prepare(&self, blocks: &[Block], queries: &mut [QueryBlock]) {
        for (block, queries) in blocks.iter().zip(queries) {
            let QueryBlock { values, rotated, buffer, rows: codes, biases, .. } = queries;
            gather(self.queries, &self.shape, &block.rows, values, buffer);
            let (count, depth) = (block.rows.range.len(), self.head.dims.depth);
            rotated.clear();
            rotated.extend_from_slice(values);
            if let Some(rotation) = self.head.rotation {
                rotation.apply_whole(rotated);
            }
            two_codes(self.level, rotated, (count, depth), codes, buffer);
            codes.scales.iter_mut().for_each(|x| *x *= self.factor);
            biases.clear();
            biases.resize(2 * count);
            if let Some(offset) = &self.head.offset {
                biases.iter_mut().zip(self.biases(values, offset)).for_each(|(x, bias)| *x = bias);
            }
            queries.pack(self.level, 2 * count, depth, false);
        }
    }

    fn score(&self, queries: &QueryBlock, keys: Range<usize>, scores: &mut [f32], stride: usize) {
        let Some((rows, first)) = self.float_rows(&keys) else {
            return self.score_pages(queries, keys, scores, stride);
        };
        let depth = self.head.dims.depth;
        let of_keys = &rows.keys[(keys.start - first) * depth..(keys.end - first) * depth];
        let of_keys = contracts::Rows::new(of_keys, keys.len(), depth, depth);
        let rows = queries.rows.scales.len() / 2;
        let queries = contracts::Rows::new(&queries.values, rows, depth, depth);
        score_in_place(self.level, (queries, of_keys), self.factor, scores, stride);
    }

    fn large(&self, keys: Range<usize>) -> Vec<usize> {
        let dim = self.head.dims.value_dim;
        if let Some((rows, first)) = self.float_rows(&keys) {
            let part = &rows.values[(keys.start - first) * dim..(keys.end - first) * dim];
            return large_rows(contracts::Rows::new(part, keys.len(), dim, dim), keys);
        }
        let of_page = |(at, slots, page): (usize, Range<usize>, &Page)| {
            let first = keys.start + at - slots.start;
            large_among(page.values.exceptions(), slots).into_iter().map(move |slot| first + slot)
        };
        self.parts(&keys).flat_map(of_page).collect()
    }

    fn format(&self, rows: usize) -> Format {
        if rows <= FEW { Format::F32 } else { self.many }
    }

    fn accumulate(
        &self,
        keys: Range<usize>,
        tile: &mut Tile<'_>,
        running: &[Running],
        sums: &mut [f32],
    ) {
        match self.float_rows(&keys) {
            _ if self.head.dims.value_dim == 0 => {}
            _ if running.len() > FEW => self.accumulate_many(keys, tile, running, sums),
            None => self.accumulate_few(keys, tile, running, sums),
            Some((rows, first)) => {
                let dim = self.head.dims.value_dim;
                let values = &rows.values[(keys.start - first) * dim..(keys.end - first) * dim];
                self.accumulate_float(values, tile, sums);
            }
        }
    }
}

/// Adds those values in some slots of a page that its format cannot hold; the slots are keys of a tile from `at`
/// on.
fn add_exceptions(
    page: &Page,
    (at, slots): (usize, &Range<usize>),
    tile: &mut Tile<'_>,
    running: &[Running],
    sums: &mut [f32],
) {
    for (slot, row) in page.values.exceptions().iter().filter(|(slot, _)| slots.contains(slot)) {
        tile.add_exception(at + slot - slots.start, row, running, sums);
    }
}

#[inline(always)]
fn add((sums, others): (&mut [f32], &[f32])) {
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
}

/// Rows in two int8 codes an element, `x ~ scale * code + scale' * code'`: codes and scales of all
/// rows, then those of what the first codes leave over.
fn two_codes(
    level: Level,
    values: &[f32],
    (rows, depth): (usize, usize),
    out: &mut QuantizedRows,
    left_over: &mut Vec<f32>,
) {
    out.resize(2 * rows, depth);
    if depth == 0 {
        return out.scales.fill(1.0);
    }
    let QuantizedRows { codes, scales, zeros, sums } = out;
    let (first, second) = codes.split_at_mut(values.len());
    let (first_scales, second_scales) = scales.split_at_mut(rows);
    let mut quantize = |values: &[f32], codes: &mut [i8], scales: &mut [f32]| {
        let (zeros, sums) = (&mut zeros[..rows], &mut sums[..rows]);
        let out = BlockCodes { codes, scales, zeros, sums };
        level.quantize(false, contracts::Rows::contiguous(values, depth), None, out);
    };
    quantize(values, first, first_scales);
    left_over.clear();
    left_over.extend_from_slice(values);
    let of_rows = left_over.chunks_exact_mut(depth).zip(first.chunks_exact(depth));
    for ((left_over, codes), &scale) in of_rows.zip(&*first_scales) {
        left_over.iter_mut().zip(codes).for_each(|(x, &code)| *x -= scale * f32::from(code));
    }
    quantize(left_over, second, second_scales);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;

    fn of(values: &[f32], rows: usize) -> QuantizedRows {
        let mut out = QuantizedRows::default();
        let shape = (rows, values.len() / rows);
        two_codes(runnable()[0], values, shape, &mut out, &mut Vec::new());
        out
    }

    #[test]
    fn two_codes_are_sixteen_bits() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let QuantizedRows { codes, scales, .. } = of(&values, 2);
        for (i, x) in values.iter().enumerate() {
            let row = i / 50;
            let rounded =
                scales[row] * f32::from(codes[i]) + scales[2 + row] * f32::from(codes[100 + i]);
            assert!((x - rounded).abs() < 3.0 / 127.0 / 127.0 / 3.0, "{x} {rounded}");
        }
        // Zeros, and what has no codes.
        assert_eq!(of(&[0.0; 4], 1).codes[..], [0; 8]);
        assert!(of(&[1.0, f32::NAN], 1).scales[0].is_nan());
        assert!(of(&[], 3).codes.is_empty());
    }
}
