//! The queries of a call as rows: one query of one head each, in blocks.

use crate::cpu::contracts::LANES;
use crate::memory::Aligned;
use crate::parallel::Pace;
use crate::view::View;
use std::ops::Range;

/// Rows that are prepared and multiplied at a time; they fit L1 and L2 at any head dim.
pub(in crate::attention) const BLOCK: usize = crate::quant::QUERY_BLOCK;

/// A range in pieces of at most `most`.
pub(in crate::attention) fn pieces(
    range: Range<usize>,
    most: usize,
) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(most).map(move |start| start..(start + most).min(end))
}

/// `0..count` in runs of [`BLOCK`].
pub(in crate::attention) fn blocks(count: usize) -> impl Iterator<Item = Range<usize>> {
    pieces(0..count, BLOCK)
}

/// Blocks that are prepared together: what each has to do with all keys is done while the keys are at hand.
pub(in crate::attention) const TOGETHER: usize = 4;

/// How many of the blocks of a head are prepared together, so that every thread that may help finds some.
pub(in crate::attention) fn together(pace: Pace, blocks: usize) -> usize {
    match pace {
        Pace::Serial => TOGETHER,
        Pace::Parallel => (blocks / (2 * rayon::current_num_threads())).clamp(1, TOGETHER),
    }
}

/// Their shape, `[B, H, M, ..]`, and how they become blocks.
#[derive(Debug, Clone, Copy)]
pub(in crate::attention) struct Queries {
    pub heads: usize,
    pub tokens: usize,
    /// Query heads that share a head of keys.
    pub group: usize,
    /// Whether all rows of a block are of one query head.
    pub apart: bool,
}

/// Some rows of the queries that share a head of keys: row `i` is query `i % M` of query head `i / M`,
/// counted among those.
#[derive(Debug, Clone)]
pub(in crate::attention) struct Rows {
    /// The head of keys, counted over the batch.
    pub head: usize,
    pub range: Range<usize>,
}

/// Rows, and the tiles of keys with which they are scored.
#[derive(Debug)]
pub(in crate::attention) struct Block {
    pub rows: Rows,
    pub tiles: Vec<Range<usize>>,
}

impl Queries {
    /// Rows that share a head of keys.
    pub(super) fn rows(&self) -> usize {
        self.group * self.tokens
    }

    /// Those in blocks.
    pub(super) fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let (parts, rows) = if self.apart { (self.group, self.tokens) } else { (1, self.rows()) };
        (0..parts).flat_map(move |part| {
            blocks(rows).map(move |block| part * rows + block.start..part * rows + block.end)
        })
    }

    /// The sequence and the query head of a row of a key head, and its token.
    pub(in crate::attention) fn at(&self, head: usize, row: usize) -> [usize; 3] {
        let key_heads = (self.heads / self.group.max(1)).max(1);
        let (batch, key_head) = (head / key_heads, head % key_heads);
        [batch, key_head * self.group + row / self.tokens, row % self.tokens]
    }

    /// The same of all `rows`, without a division for each.
    pub(super) fn all_at(self, rows: &Rows) -> impl Iterator<Item = [usize; 3]> {
        let mut next = self.at(rows.head, rows.range.start);
        rows.range.clone().map(move |_| {
            let at = next;
            next[2] += 1;
            if next[2] == self.tokens {
                next = [at[0], at[1] + 1, 0];
            }
            at
        })
    }
}

/// Copies rows of queries, which the heads that share keys have at different places, to `values`.
pub(in crate::attention) fn gather(
    queries: &View<'_>,
    shape: &Queries,
    rows: &Rows,
    values: &mut Aligned<f32>,
    buffer: &mut Vec<f32>,
) {
    let depth = queries.depth();
    values.resize(rows.range.len() * depth);
    let mut to = values.chunks_exact_mut(depth.max(1));
    let mut row = rows.range.start;
    while row < rows.range.end {
        let [batch, head, token] = shape.at(rows.head, row);
        let count = (shape.tokens - token).min(rows.range.end - row);
        let found = queries.rows(batch * shape.heads + head, token..token + count, buffer);
        found.iter().zip(&mut to).for_each(|(row, to)| copy(row, to));
        row += count;
    }
}

/// A call for each row would take longer than its moves.
fn copy(from: &[f32], to: &mut [f32]) {
    let ((from, tail), (to, to_tail)) = (from.as_chunks::<LANES>(), to.as_chunks_mut());
    from.iter().zip(to).for_each(|(from, to)| *to = *from);
    if !tail.is_empty() {
        to_tail.copy_from_slice(tail);
    }
}
