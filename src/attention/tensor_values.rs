//! The values of one head of a tensor, packed, for whatever scores.

use super::engine::{Probs, Running, TILE, Tile};
use crate::cpu::contracts::RUN;
use crate::product::PackedMatrix;
use crate::view::View;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    /// Where values are gathered that do not lie together.
    static GATHERED: RefCell<(Vec<f32>, Vec<f32>)> = RefCell::default();
}

/// Packs the values of `head` in the place of those that are there.
pub(super) fn pack_values(values: &View<'_>, head: usize, packed: &mut PackedMatrix) {
    packed.reset(values.tokens(), values.depth());
    GATHERED.with_borrow_mut(|(gathered, buffer)| {
        let tokens = values.tokens();
        let blocks = (0..tokens).step_by(RUN).map(|start| start..(start + RUN).min(tokens));
        if packed.needs_ranges() {
            for block in blocks.clone() {
                packed.observe(values.rows(head, block, gathered).as_slice(buffer));
            }
        }
        for block in blocks {
            let rows = values.rows(head, block.clone(), gathered);
            packed.put(block.start, rows.as_slice(buffer));
        }
    });
}

/// Keys in tiles, from a whole step and run of values on.
pub(super) fn tiles(seen: Range<usize>, step: usize) -> Vec<Range<usize>> {
    let step = step.next_multiple_of(RUN);
    let starts = (seen.start / step * step..seen.end).step_by(TILE);
    starts.map(|start| start..(start + TILE).min(seen.end)).collect()
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
        Probs::F32 => values.accumulate_f32(keys, tile.scores, stride, sums),
        Probs::Bf16(halves) => values.accumulate_bf16(keys, halves, stride, sums),
        Probs::Int8 { codes, runs } => {
            let runs = &runs[..tile.visible.len() * keys.len().div_ceil(RUN)];
            values.accumulate_int8(keys, codes, stride, runs, sums);
        }
        Probs::Int16 { codes, scales } => {
            let scales = &scales[..tile.visible.len() * keys.len().div_ceil(RUN)];
            values.accumulate_int16(keys, codes, stride, scales, sums);
        }
    }
}
