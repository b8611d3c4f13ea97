//! The values of one head of a tensor, packed, for whatever scores.

use super::engine::{Probs, Running, TILE, Tile, Words, pieces};
use super::seen::Seen;
use crate::cpu::contracts::{RUN, Rows as Matrix};
use crate::cpu::plain::widest;
use crate::memory::Kept;
use crate::product::{LARGEST, PackedMatrix};
use crate::view::View;
use std::ops::Range;

/// Rows that do not lie together, or not as f32; rows of runs; all of them as one slice.
type Gathered = (Vec<f32>, (Vec<f32>, Vec<f32>));

thread_local! {
    /// Where values are gathered that do not lie together.
    static GATHERED: Kept<Gathered> = const { Kept::new() };
}

/// Bytes of that which a thread keeps: blocks of values that are a few thousand numbers wide.
const KEPT: usize = 1 << 20;

/// Packs the values of `head` that are seen in the place of those that are there.
pub(super) fn pack_values(values: &View<'_>, head: usize, seen: &Seen, packed: &mut PackedMatrix) {
    let seen = seen.keys(head);
    packed.reset(seen.len(), values.depth());
    Kept::with(&GATHERED, KEPT, |(buffer, (gathered, slice))| {
        for block in pieces(0..seen.len(), RUN) {
            let rows = seen.rows(values, head, block.clone(), buffer, gathered);
            packed.put(block.start, rows.as_slice(slice));
        }
    });
}

/// Keys in tiles, from a whole step and run of values on.
pub(super) fn tiles(seen: Range<usize>, step: usize) -> Vec<Range<usize>> {
    let step = step.next_multiple_of(RUN);
    pieces(seen.start / step * step..seen.end, TILE).collect()
}

/// Those of `keys` with large values among the rows that stand beside others, by key.
pub(super) fn large_among(beside: &[(usize, Vec<f32>)], keys: Range<usize>) -> Vec<usize> {
    let large = beside.iter().filter(|(key, row)| keys.contains(key) && !is_ordinary(row));
    large.map(|(key, _)| *key).collect()
}

/// Those of `keys`, of which these are the values, that have a value beyond [`LARGEST`], infinity or NaN.
pub(super) fn large_rows(values: Matrix<'_>, keys: Range<usize>) -> Vec<usize> {
    if widest!(all_ordinary, values, Matrix<'_> => bool) {
        return Vec::new();
    }
    let rows = keys.zip(values.iter()).filter(|(_, row)| !is_ordinary(row));
    rows.map(|(key, _)| key).collect()
}

#[inline(always)]
fn all_ordinary(rows: Matrix<'_>) -> bool {
    rows.iter().all(is_ordinary)
}

#[inline(always)]
fn is_ordinary(row: &[f32]) -> bool {
    row.iter().fold(true, |all, x| all & (x.abs() <= LARGEST))
}

/// Adds values of `keys`, multiplied by their probabilities.
pub(super) fn accumulate(
    values: &PackedMatrix,
    keys: Range<usize>,
    tile: &Tile<'_>,
    running: &[Running],
    sums: &mut [f32],
) {
    for (key, value) in values.exceptions().iter().filter(|(key, _)| keys.contains(key)) {
        tile.add_exception(key - keys.start, value, running, sums);
    }
    let stride = tile.stride;
    match &tile.probs {
        Probs::F32 { .. } => values.accumulate_f32(keys, tile.scores, stride, sums),
        Probs::Bf16(halves) => values.accumulate_bf16(keys, halves, stride, sums),
        Probs::Int8 { codes, runs } => {
            let runs = &runs[..tile.visible.len() * keys.len().div_ceil(RUN)];
            values.accumulate_int8(keys, codes, stride, runs, sums);
        }
        Probs::Int16(Words { codes, stride, scales, .. }) => {
            let scales = &scales[..tile.visible.len() * keys.len().div_ceil(RUN)];
            values.accumulate_int16(keys, codes, *stride, scales, sums);
        }
    }
}
