//! The rows of a tile by what they see, for kernels that take some rows at once.

use crate::cpu::contracts::{LANES, RUN, Scores};
use std::ops::Range;

/// Rows of a tile that see the same keys, a row alone where there are runs that it does not see: a call for
/// several costs as much as a short row.
pub(super) struct Part {
    pub rows: Range<usize>,
    pub keys: Range<usize>,
    /// Whole vectors that hold these.
    pub vectors: Range<usize>,
    /// Those that hold them.
    pub runs: Range<usize>,
    /// Runs of a row, and elements, in whole vectors.
    pub per_row: usize,
    len: usize,
}

impl Part {
    /// All rows in order, in parts of up to `most`, of a tile of so many keys; vectors start at the last multiple of
    /// `step`, or with the first key where that is 1, so that its place makes no difference. They may end behind the
    /// tile's last one.
    pub(super) fn all(
        visible: &[Range<usize>],
        tile: usize,
        (most, step): (usize, usize),
    ) -> impl Iterator<Item = Part> {
        let (per_row, len) = (tile.div_ceil(RUN).max(1), tile.next_multiple_of(LANES));
        let mut start = 0;
        std::iter::from_fn(move || {
            let seen = visible.get(start)?;
            let keys = if seen.is_empty() { 0..0 } else { seen.clone() };
            let runs = keys.start / RUN..keys.end.div_ceil(RUN);
            let start_of_vectors = keys.start / step * step;
            let vectors = (keys.end - start_of_vectors).next_multiple_of(LANES);
            let vectors = start_of_vectors..start_of_vectors + vectors;
            let most = if runs == (0..per_row) { most } else { 1 };
            let alike = visible[start..].iter().take(most).take_while(|other| *other == seen);
            let rows = start..start + alike.count();
            start = rows.end;
            Some(Part { rows, keys, vectors, runs, per_row, len })
        })
    }

    /// Its scores, from the first row of a tile on; `None` where nothing is seen.
    pub(super) fn scores<'a>(&self, scores: &'a [f32], stride: usize) -> Option<Scores<'a>> {
        let Self { rows, vectors, .. } = self;
        let (data, rows, len) = (&scores[vectors.start..], rows.len(), vectors.len());
        (len > 0).then_some(Scores { data, rows, len, stride })
    }

    /// Scores around those that are seen, in the same vectors, become minus infinity.
    pub(super) fn hide_others(&self, scores: &mut [f32], stride: usize) {
        let Self { rows, keys, vectors, .. } = self;
        if keys == vectors {
            return;
        }
        for row in scores.chunks_mut(stride).take(rows.len()) {
            row[vectors.start..keys.start].fill(f32::NEG_INFINITY);
            row[keys.end..vectors.end].fill(f32::NEG_INFINITY);
        }
    }

    /// Probabilities in other vectors of the rows become 0.
    pub(super) fn clear_others<T: Copy + Default>(&self, probs: &mut [T], stride: usize) {
        let Self { rows, vectors, len, .. } = self;
        if *vectors == (0..*len) {
            return;
        }
        for row in probs.chunks_mut(stride).take(rows.len()) {
            row[..vectors.start].fill(T::default());
            row[vectors.end.min(*len)..*len].fill(T::default());
        }
    }
}
