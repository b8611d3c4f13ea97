//! The tokens of one head of one sequence: pages of codes, and the rows that stay in f32.
//!
//! ```text
//! tokens   0 .. sinks        sinks .. packed            packed .. len
//!          f32               codes, in pages            f32: recent ones, or waiting for their group
//!                            (the oldest dropped by a window)
//! ```
//!
//! Once its key is quantized a token stays as it is. The tokens of the last group that was packed are kept in
//! f32 too, so that a truncation that ends among them leaves no trace of what was taken back.

use super::config::{CacheValues, KeySmoothing, KvCacheConfig};
use super::values::Values;
use crate::attention::operand::QuantizedRows;
use crate::cpu::Level;
use crate::cpu::contracts::{self, BlockCodes};
use crate::memory::Footprint;
use crate::product::{PackedRhs, RowSums};
use crate::quant::{Conditioned, Conditioning, KEY_BLOCK, Rotation, Smoothing, mean_of_rows};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of a page: a multiple of every kernel's panel, and long enough for the memory to stream.
pub(super) const PAGE: usize = 256;

/// Tokens that share an offset: a multiple of every kernel's panel.
pub(super) const GROUP: usize = KEY_BLOCK;

/// The codes of some tokens that follow each other.
#[derive(Clone)]
pub(super) struct Page {
    pub keys: PackedRhs,
    pub key_scales: Vec<f32>,
    /// What was subtracted from the keys of each group, `[PAGE / GROUP, D]`, where each has its own;
    /// otherwise empty.
    pub offsets: Vec<f32>,
    /// The keys that stand out of their group, by slot, as they are.
    pub outliers: Vec<(usize, Vec<f32>)>,
    pub values: Values,
}

impl Page {
    fn new(level: Level, dims: Dims, format: CacheValues, local: bool) -> Self {
        let groups = if local { PAGE / GROUP } else { 0 };
        Self {
            offsets: vec![0.0; groups * dims.depth],
            outliers: Vec::new(),
            keys: PackedRhs::new(level, PAGE, dims.depth, false),
            key_scales: vec![0.0; PAGE],
            values: Values::new(format, PAGE, dims.value_dim),
        }
    }

    /// Bytes in memory.
    fn size(&self) -> usize {
        let outliers: usize = self.outliers.iter().map(|(_, row)| row.len()).sum();
        let numbers = self.key_scales.len() + self.offsets.len() + outliers;
        self.keys.footprint() + numbers * size_of::<f32>() + self.values.size()
    }

    /// What was subtracted from the keys of a group, where each has its own.
    pub(super) fn offset(&mut self, group: usize, depth: usize) -> &mut [f32] {
        &mut self.offsets[group * depth..(group + 1) * depth]
    }

    /// Packs key codes from slot `first` on.
    pub(super) fn put_codes(&mut self, first: usize, codes: &[i8], scales: &[f32], sums: &[i32]) {
        self.keys.put(first, codes, RowSums { sums, zeros: &[] });
        self.key_scales[first..first + scales.len()].copy_from_slice(scales);
    }

    /// Forgets the tokens from a slot on, which are not seen any more.
    fn truncate(&mut self, used: usize) {
        self.values.truncate(used);
        self.outliers.retain(|(slot, _)| *slot < used);
    }
}

/// Elements of a key and of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dims {
    pub depth: usize,
    pub value_dim: usize,
}

/// Keys and values of some tokens in f32.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rows {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub tokens: usize,
}

impl Rows {
    /// Makes room for a group at a time.
    fn extend(&mut self, other: RowsRef<'_>) {
        let tokens = (self.tokens + other.tokens).next_multiple_of(GROUP) - self.tokens;
        let width = |row: &[f32]| row.len().checked_div(other.tokens).unwrap_or(0);
        self.keys.reserve_exact(tokens * width(other.keys));
        self.values.reserve_exact(tokens * width(other.values));
        self.keys.extend_from_slice(other.keys);
        self.values.extend_from_slice(other.values);
        self.tokens += other.tokens;
    }

    /// Takes the first `tokens` out.
    fn take(&mut self, tokens: usize, dims: Dims) -> Rows {
        if tokens == self.tokens {
            return std::mem::take(self);
        }
        self.tokens -= tokens;
        Rows {
            keys: self.keys.drain(..tokens * dims.depth).collect(),
            values: self.values.drain(..tokens * dims.value_dim).collect(),
            tokens,
        }
    }

    fn truncate(&mut self, tokens: usize, dims: Dims) {
        let tokens = tokens.min(self.tokens);
        self.keys.truncate(tokens * dims.depth);
        self.values.truncate(tokens * dims.value_dim);
        self.tokens = tokens;
    }

    fn size(&self) -> usize {
        size_of::<f32>() * (self.keys.capacity() + self.values.capacity())
    }
}

/// Row-major keys and values of some tokens.
#[derive(Clone, Copy)]
pub(super) struct RowsRef<'a> {
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub tokens: usize,
}

impl<'a> RowsRef<'a> {
    fn split_at(self, tokens: usize, dims: Dims) -> (Self, Self) {
        let (keys, later_keys) = self.keys.split_at(tokens * dims.depth);
        let (values, later_values) = self.values.split_at(tokens * dims.value_dim);
        let later = self.tokens - tokens;
        (
            Self { keys, values, tokens },
            Self { keys: later_keys, values: later_values, tokens: later },
        )
    }
}

#[derive(Clone)]
pub(super) struct Head {
    pub dims: Dims,
    pub level: Level,
    pub format: CacheValues,
    /// The first `sinks` tokens, as far as they are there.
    pub sinks: Rows,
    /// How many those are at most.
    sink_count: usize,
    /// Page `first_page` comes first; earlier ones are dropped or were never there.
    pub pages: VecDeque<Arc<Page>>,
    pub first_page: usize,
    /// Tokens before this one are in pages, or sinks.
    pub packed: usize,
    pub recent: Rows,
    /// The tokens of the last group in pages, where groups wait until they are complete.
    pub last: Rows,
    /// What is subtracted from keys, where it is one for all of them: `None` until it is known.
    pub offset: Option<Vec<f32>>,
    /// Whether each group has an offset of its own.
    pub local: bool,
    pub rotation: Option<Rotation>,
    /// Whether keys that stand out are kept as they are.
    outliers: bool,
}

/// What an append changes of a head, but for the slots of pages that were not in use.
pub(super) struct Mark {
    sinks: usize,
    pages: usize,
    packed: usize,
    recent: Rows,
    last: Rows,
    offset: Option<Vec<f32>>,
}

impl Head {
    pub(super) fn new(config: &KvCacheConfig, head: usize, dims: Dims, level: Level) -> Self {
        Self {
            dims,
            level,
            format: config.values,
            sinks: Rows::default(),
            sink_count: config.sinks,
            pages: VecDeque::new(),
            first_page: config.sinks / PAGE,
            packed: config.sinks,
            recent: Rows::default(),
            last: Rows::default(),
            offset: match &config.key_smoothing {
                KeySmoothing::None => Some(vec![0.0; dims.depth]),
                KeySmoothing::FirstTokens(_) | KeySmoothing::Groups => None,
                KeySmoothing::Given(offsets) => Some(offsets[head].clone()),
            },
            local: config.key_smoothing == KeySmoothing::Groups,
            rotation: config.rotate.then(|| Rotation::new(dims.depth)),
            outliers: config.outliers,
        }
    }

    /// Tokens.
    pub(super) fn len(&self) -> usize {
        match self.sinks.tokens < self.sink_count {
            true => self.sinks.tokens,
            false => self.packed + self.recent.tokens,
        }
    }

    /// Tokens that were dropped lie between the sinks and this one.
    pub(super) fn kept_from(&self) -> usize {
        (self.first_page * PAGE).max(self.sink_count)
    }

    /// The pages that hold `tokens`, each with its first token and how many slots are in use.
    pub(super) fn pages_of(
        &self,
        tokens: Range<usize>,
    ) -> impl Iterator<Item = (usize, usize, &Page)> {
        let first = (tokens.start / PAGE).max(self.first_page);
        let pages = self.pages.iter().enumerate().skip(first - self.first_page);
        pages
            .map(|(index, page)| ((self.first_page + index) * PAGE, &**page))
            .take_while(move |(start, _)| *start < tokens.end)
            .map(|(start, page)| (start, PAGE.min(self.packed - start), page))
    }

    /// How it is before an append.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            sinks: self.sinks.tokens,
            pages: self.pages.len(),
            packed: self.packed,
            recent: self.recent.clone(),
            last: self.last.clone(),
            offset: self.offset.clone(),
        }
    }

    /// Takes back an append that has ended anywhere.
    pub(super) fn restore(&mut self, mark: Mark) {
        let Mark { sinks, pages, packed, recent, last, offset } = mark;
        self.sinks.truncate(sinks, self.dims);
        self.pages.truncate(pages);
        (self.packed, self.recent, self.last, self.offset) = (packed, recent, last, offset);
        self.forget_unused();
    }

    /// Adds tokens at the end.
    pub(super) fn append(&mut self, rows: RowsRef<'_>, config: &KvCacheConfig) {
        let missing = self.sink_count - self.sinks.tokens;
        let (sinks, rows) = rows.split_at(missing.min(rows.tokens), self.dims);
        self.sinks.extend(sinks);
        self.recent.extend(rows);
        if self.offset.is_none() {
            self.offset = self.first_mean(&config.key_smoothing);
        }
        let mut packer = Packer::default();
        while let Some(tokens) = self.next_run(self.recent.tokens.saturating_sub(config.recent)) {
            self.pack(tokens, &mut packer);
        }
    }

    /// The mean of the first tokens, once they are there. Until then nothing is packed.
    fn first_mean(&self, offset: &KeySmoothing) -> Option<Vec<f32>> {
        let KeySmoothing::FirstTokens(tokens) = *offset else { return None };
        let depth = self.dims.depth;
        let complete = self.recent.tokens >= tokens;
        complete.then(|| mean_of_rows(&self.recent.keys[..tokens * depth], depth))
    }

    /// How many of the first `ready` recent tokens are packed next.
    fn next_run(&self, ready: usize) -> Option<usize> {
        let step = if self.local { GROUP } else { PAGE };
        let rest = step - self.packed % step;
        let waits = match self.local {
            // A group that a truncation cut keeps its offset.
            true => ready < rest && !self.in_group(),
            false => self.offset.is_none(),
        };
        (ready > 0 && !waits).then_some(rest.min(ready))
    }

    /// Whether the group of the next packed token has tokens in pages.
    fn in_group(&self) -> bool {
        self.packed > (self.packed / GROUP * GROUP).max(self.sink_count)
    }

    /// Quantizes the first `tokens` of the recent ones, which are in one page, and in one group where each
    /// has its own offset.
    fn pack(&mut self, tokens: usize, packer: &mut Packer) {
        let (dims, slot, level) = (self.dims, self.packed % PAGE, self.level);
        let group = slot / GROUP;
        let rows = self.recent.take(tokens, dims);
        let known = match self.local {
            true if self.in_group() => Some(self.last_page().offset(group, dims.depth).to_vec()),
            true => None,
            false => self.offset.clone(),
        };
        packer.quantize(self, &rows, known.as_deref());
        let local = self.local;
        let page = self.last_page();
        page.put_codes(slot, &packer.rows.codes, &packer.rows.scales, &packer.rows.sums);
        page.values.put(level, slot, &rows.values);
        if local && let Some(mean) = packer.conditioned.mean() {
            page.offset(group, dims.depth).copy_from_slice(mean);
        }
        for &row in &packer.conditioned.outliers {
            let key = rows.keys[row * dims.depth..(row + 1) * dims.depth].to_vec();
            page.outliers.push((slot + row, key));
        }
        page.outliers.sort_unstable_by_key(|(slot, _)| *slot);
        self.packed += tokens;
        if local {
            // One that a truncation cut is not known any more as it was.
            self.last = if known.is_none() { rows } else { Rows::default() };
        }
    }

    /// The page that the next packed token belongs to.
    pub(super) fn last_page(&mut self) -> &mut Page {
        let index = self.packed / PAGE - self.first_page;
        if index == self.pages.len() {
            let page = Page::new(self.level, self.dims, self.format, self.local);
            self.pages.push_back(Arc::new(page));
        }
        self.page(index)
    }

    /// A page to write to; one that is shared with a clone is copied first.
    pub(super) fn page(&mut self, index: usize) -> &mut Page {
        Arc::make_mut(&mut self.pages[index])
    }

    /// Drops the pages before token `first`.
    pub(super) fn drop_before(&mut self, first: usize) {
        // The page that is being filled stays, also where more recent tokens wait than a window has.
        let first = first.min(self.packed);
        while (self.first_page + 1) * PAGE <= first && !self.pages.is_empty() {
            self.pages.pop_front();
            self.first_page += 1;
        }
    }

    /// Forgets the tokens from `len` on.
    pub(super) fn truncate(&mut self, len: usize) {
        self.sinks.truncate(len, self.dims);
        self.recent.truncate(len.saturating_sub(self.packed), self.dims);
        if len >= self.packed {
            return;
        }
        let last = std::mem::take(&mut self.last);
        if len > self.packed - last.tokens {
            // Its group was not complete yet: it waits again.
            self.packed -= last.tokens;
            self.recent = last;
            self.recent.truncate(len - self.packed, self.dims);
        } else {
            self.packed = len.max(self.sink_count);
        }
        if self.packed <= self.first_page * PAGE {
            // Everything that was kept is forgotten, and with it that something was dropped.
            self.pages.clear();
            self.first_page = self.packed / PAGE;
        }
        self.pages.truncate(self.packed.div_ceil(PAGE) - self.first_page);
        self.forget_unused();
    }

    /// Forgets what stands beside the values of a page, in slots of it that are not in use.
    fn forget_unused(&mut self) {
        let used = self.packed % PAGE;
        if used > 0 && !self.pages.is_empty() {
            self.page(self.pages.len() - 1).truncate(used);
        }
    }

    /// Bytes in memory.
    pub(super) fn size(&self) -> usize {
        let pages: usize = self.pages.iter().map(|page| page.size()).sum();
        let offset = self.offset.as_ref().map_or(0, |offset| size_of_val(offset.as_slice()));
        pages + self.sinks.size() + self.recent.size() + self.last.size() + offset
    }
}

/// Keys on their way into a page.
#[derive(Default)]
struct Packer {
    conditioned: Conditioned,
    values: Vec<f32>,
    rows: QuantizedRows,
}

impl Packer {
    /// Quantizes keys less an offset that is known, or less their own mean.
    fn quantize(&mut self, head: &Head, rows: &Rows, known: Option<&[f32]>) {
        let depth = head.dims.depth;
        self.rows.resize(rows.tokens, depth);
        if depth == 0 {
            return self.rows.scales.fill(1.0);
        }
        let smoothing = if known.is_some() { Smoothing::Head } else { Smoothing::Block };
        let outliers = head.outliers && known.is_none();
        let (rotation, sink) = (head.rotation, outliers);
        let conditioning = Conditioning { smoothing, rotation, outliers, sink };
        let keys = contracts::Rows::contiguous(&rows.keys, depth);
        let first = head.packed == 0;
        self.values.resize(rows.keys.len(), 0.0);
        let out = (&mut self.conditioned, &mut self.values[..]);
        conditioning.apply(head.level, keys, (None, first), known, out);
        let QuantizedRows { codes, scales, zeros, sums } = &mut self.rows;
        let conditioned = contracts::Rows::contiguous(&self.values, depth);
        let out = BlockCodes { codes, scales, zeros, sums };
        head.level.quantize(false, conditioned, Some(&self.conditioned.ranges), out);
        for &row in &self.conditioned.outliers {
            self.rows.forget(row, depth);
            // That of codes which are all 0.
            self.rows.scales[row] = 1.0;
        }
    }
}
