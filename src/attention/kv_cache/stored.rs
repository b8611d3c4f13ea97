//! A head as it is written to a file: rows of codes, whatever the panels of this machine's kernel.

use super::head::{Dims, GROUP, Head, PAGE, Rows};
use super::values::StoredRows;
use std::ops::Range;

/// Everything that a head holds.
pub(super) struct Stored {
    pub dims: Dims,
    /// Tokens in pages.
    pub tokens: usize,
    /// `[tokens, D]`.
    pub keys: Vec<i8>,
    pub key_scales: Vec<f32>,
    pub values: StoredRows,
    /// Values that their format cannot hold, by token.
    pub exceptions: Vec<(usize, Vec<f32>)>,
    /// Sinks, and the recent tokens.
    pub rows: [Rows; 2],
    pub offset: Option<Vec<f32>>,
    /// Those of the groups with tokens in pages, where offsets move: `[groups, D]`.
    pub offsets: Vec<f32>,
}

impl Stored {
    pub(super) fn empty(dims: Dims, tokens: usize) -> Self {
        Self {
            dims,
            tokens,
            keys: Vec::new(),
            key_scales: Vec::new(),
            values: StoredRows { bytes: Vec::new(), scales: Vec::new() },
            exceptions: Vec::new(),
            rows: [Rows::default(), Rows::default()],
            offset: None,
            offsets: Vec::new(),
        }
    }

    /// Whether `len` tokens can have these in pages.
    pub(super) fn fits(len: usize, pages: Range<usize>, sinks: usize) -> bool {
        // Pages start with a whole page, or behind the sinks.
        let start = (pages.start / PAGE * PAGE).max(sinks);
        let in_order = pages.start <= pages.end && sinks <= pages.end;
        let starts = pages.start == start || pages.is_empty();
        in_order && starts && (pages.end <= len || (pages.is_empty() && pages.end == sinks))
    }

    /// The groups that tokens in these pages belong to.
    pub(super) fn groups(pages: Range<usize>) -> Range<usize> {
        match pages.is_empty() {
            true => 0..0,
            false => pages.start / GROUP..pages.end.div_ceil(GROUP),
        }
    }

    /// What a head holds, tokens in pages from `first` on.
    pub(super) fn of(head: &Head, first: usize) -> Self {
        let mut stored = Self::empty(head.dims, head.packed - first);
        let mut codes = vec![0i8; head.dims.depth];
        for (start, used, page) in head.pages_of(first..head.packed) {
            let slots = first.saturating_sub(start)..used;
            for slot in slots.clone() {
                page.keys.get(slot, &mut codes);
                stored.keys.extend_from_slice(&codes);
            }
            stored.key_scales.extend_from_slice(&page.key_scales[slots.clone()]);
            let groups = slots.start / GROUP..slots.end.div_ceil(GROUP);
            let depth = if head.moving { head.dims.depth } else { 0 };
            let offsets = &page.offsets[groups.start * depth..groups.end * depth];
            stored.offsets.extend_from_slice(offsets);
            let rows = page.values.stored(slots);
            stored.values.bytes.extend(rows.bytes);
            stored.values.scales.extend(rows.scales);
            let mut exceptions = page.values.exceptions().to_vec();
            exceptions.sort_by_key(|(slot, _)| *slot);
            let by_token = exceptions.into_iter().map(|(slot, row)| (start + slot, row));
            stored.exceptions.extend(by_token);
        }
        stored.rows = [head.sinks.clone(), head.recent.clone()];
        stored.offset = head.offset.clone();
        stored
    }
}

impl Head {
    /// An empty head with what was stored, tokens in pages from `first` on.
    pub(super) fn restored(mut self, first: usize, stored: Stored) -> Self {
        let Dims { depth, value_dim } = self.dims;
        let width = value_dim * self.format.size();
        self.first_page = first / PAGE;
        self.packed = first;
        let mut done = 0;
        while done < stored.tokens {
            let slot = self.packed % PAGE;
            let count = (PAGE - slot).min(stored.tokens - done);
            let rows = done..done + count;
            let codes = &stored.keys[rows.start * depth..rows.end * depth];
            let sum = |row: usize| {
                let row = &codes[row * depth..(row + 1) * depth];
                row.iter().map(|&code| i32::from(code)).sum()
            };
            let sums: Vec<i32> = (0..count).map(sum).collect();
            let values = StoredRows {
                bytes: stored.values.bytes[rows.start * width..rows.end * width].to_vec(),
                scales: stored.values.scales.get(rows.clone()).unwrap_or_default().to_vec(),
            };
            let page = self.last_page();
            page.put_codes(slot, codes, &stored.key_scales[rows.clone()], &sums);
            page.values.restore(slot, &values);
            self.packed += count;
            done += count;
        }
        if self.moving {
            let groups = Stored::groups(first..self.packed);
            for (group, offset) in groups.zip(stored.offsets.chunks_exact(depth.max(1))) {
                let index = group * GROUP / PAGE - self.first_page;
                let group = group % (PAGE / GROUP);
                self.page(index).offset(group, depth).copy_from_slice(offset);
            }
        }
        for (token, row) in stored.exceptions {
            let index = token / PAGE - self.first_page;
            self.page(index).values.restore_exception(token % PAGE, row);
        }
        [self.sinks, self.recent] = stored.rows;
        self.offset = stored.offset;
        self
    }
}
