//! The tokens of one head of one sequence: pages of codes, and the rows that stay in f32.
//!
//! ```text
//! tokens   0 .. sinks        sinks .. packed            packed .. len
//!          f32               codes, in pages            f32: recent ones, or waiting for the offset
//!                            (the oldest dropped by a window)
//! ```
//!
//! A token never moves back to the left: once its key is quantized it stays as it is.

use super::config::{CacheValues, KeySmoothing, KvCacheConfig};
use super::values::Values;
use crate::cpu::Level;
use crate::cpu::contracts::{self, BlockCodes};
use crate::memory::Footprint;
use crate::product::PackedRhs;
use crate::quant::token_mean;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of a page: a multiple of every kernel's panel, and long enough for the memory to stream.
pub(super) const PAGE: usize = 256;

/// Tokens that share a moving offset: a multiple of every kernel's panel.
pub(super) const GROUP: usize = 64;

/// The codes of some tokens that follow each other.
#[derive(Clone)]
pub(super) struct Page {
    pub keys: PackedRhs,
    pub key_scales: Vec<f32>,
    /// What was subtracted from the keys of each group, `[PAGE / GROUP, D]`, where offsets move;
    /// otherwise empty.
    pub offsets: Vec<f32>,
    pub values: Values,
}

impl Page {
    fn new(level: Level, dims: Dims, format: CacheValues, moving: bool) -> Self {
        let groups = if moving { PAGE / GROUP } else { 0 };
        Self {
            offsets: vec![0.0; groups * dims.depth],
            keys: PackedRhs::new(level, PAGE, dims.depth),
            key_scales: vec![0.0; PAGE],
            values: Values::new(format, PAGE, dims.value_dim),
        }
    }

    /// Bytes in memory.
    fn size(&self) -> usize {
        let numbers = self.key_scales.len() + self.offsets.len();
        self.keys.footprint() + numbers * size_of::<f32>() + self.values.size()
    }

    /// What was subtracted from the keys of a group, where offsets move.
    pub(super) fn offset(&mut self, group: usize, depth: usize) -> &mut [f32] {
        &mut self.offsets[group * depth..(group + 1) * depth]
    }

    /// Packs key codes from slot `first` on.
    pub(super) fn put_codes(&mut self, first: usize, codes: &[i8], scales: &[f32], sums: &[i32]) {
        self.keys.put(first, codes, sums);
        self.key_scales[first..first + scales.len()].copy_from_slice(scales);
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
    fn extend(&mut self, other: RowsRef<'_>) {
        self.keys.extend_from_slice(other.keys);
        self.values.extend_from_slice(other.values);
        self.tokens += other.tokens;
    }

    fn truncate(&mut self, tokens: usize, dims: Dims) {
        let tokens = tokens.min(self.tokens);
        self.keys.truncate(tokens * dims.depth);
        self.values.truncate(tokens * dims.value_dim);
        self.tokens = tokens;
    }

    fn size(&self) -> usize {
        size_of_val(self.keys.as_slice()) + size_of_val(self.values.as_slice())
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
    /// What is subtracted from the next key; `None` until it is known.
    pub offset: Option<Vec<f32>>,
    /// Whether each group has an offset of its own.
    pub moving: bool,
}

/// What an append changes of a head, but for the slots of pages that were not in use.
pub(super) struct Mark {
    sinks: usize,
    pages: usize,
    packed: usize,
    recent: Rows,
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
            offset: match &config.key_smoothing {
                KeySmoothing::None => Some(vec![0.0; dims.depth]),
                KeySmoothing::FirstTokens(_) | KeySmoothing::Moving => None,
                KeySmoothing::Given(offsets) => Some(offsets[head].clone()),
            },
            moving: config.key_smoothing == KeySmoothing::Moving,
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
            offset: self.offset.clone(),
        }
    }

    /// Takes back an append that has ended anywhere.
    pub(super) fn restore(&mut self, mark: Mark) {
        let Mark { sinks, pages, packed, recent, offset } = mark;
        self.sinks.truncate(sinks, self.dims);
        self.pages.truncate(pages);
        (self.packed, self.recent, self.offset) = (packed, recent, offset);
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
        if let Some(offset) = self.offset.take() {
            self.pack(self.recent.tokens.saturating_sub(config.recent), offset);
        }
    }

    /// The mean of the first tokens, once they are there. Until then nothing is packed.
    fn first_mean(&self, offset: &KeySmoothing) -> Option<Vec<f32>> {
        let tokens = match *offset {
            KeySmoothing::FirstTokens(tokens) => tokens,
            KeySmoothing::Moving => GROUP,
            KeySmoothing::None | KeySmoothing::Given(_) => return None,
        };
        let depth = self.dims.depth;
        let complete = self.recent.tokens >= tokens;
        complete.then(|| token_mean(&self.recent.keys[..tokens * depth], depth))
    }

    /// Quantizes the first `tokens` of the recent ones.
    fn pack(&mut self, tokens: usize, mut offset: Vec<f32>) {
        let Dims { depth, value_dim } = self.dims;
        let mut packer = KeyCodes::default();
        let mut recent = std::mem::take(&mut self.recent);
        let mut done = 0;
        while done < tokens {
            let slot = self.packed % PAGE;
            let step = if self.moving { GROUP } else { PAGE };
            let count = (step - slot % step).min(tokens - done);
            let rows = done..done + count;
            packer.quantize(
                self.level,
                &recent.keys[rows.start * depth..rows.end * depth],
                &offset,
                count,
            );
            let (moving, level) = (self.moving, self.level);
            let page = self.last_page();
            if moving {
                page.offset(slot / GROUP, depth).copy_from_slice(&offset);
            }
            page.put_codes(slot, &packer.codes, &packer.scales, &packer.sums);
            page.values.put(
                level,
                slot,
                &recent.values[rows.start * value_dim..rows.end * value_dim],
            );
            self.packed += count;
            done += count;
            offset = self.moved_offset().unwrap_or(offset);
        }
        self.offset = Some(offset);
        recent.keys.drain(..tokens * depth);
        recent.values.drain(..tokens * value_dim);
        recent.tokens -= tokens;
        self.recent = recent;
    }

    /// What is subtracted from the next packed token, as far as pages say so.
    fn moved_offset(&self) -> Option<Vec<f32>> {
        let depth = self.dims.depth;
        let in_group = self.packed % GROUP;
        if !self.moving {
            return None;
        }
        if in_group == 0 && self.packed > self.sink_count {
            return self.group_mean(self.packed - GROUP);
        }
        let page = self.pages.get((self.packed / PAGE).checked_sub(self.first_page)?)?;
        let group = self.packed % PAGE / GROUP;
        page.offsets.get(group * depth..(group + 1) * depth).map(<[f32]>::to_vec)
    }

    /// The mean of the keys in a group that starts with token `start`, as they are stored. What is
    /// not finite does not count.
    fn group_mean(&self, start: usize) -> Option<Vec<f32>> {
        let depth = self.dims.depth;
        let page = self.pages.get((start / PAGE).checked_sub(self.first_page)?)?;
        let group = start % PAGE / GROUP;
        let mut mean: Vec<f64> = vec![0.0; depth];
        let (mut codes, mut count) = (vec![0i8; depth], 0);
        for token in start.max(self.sink_count)..start + GROUP {
            let slot = token % PAGE;
            let scale = page.key_scales[slot];
            if scale.is_finite() {
                page.keys.get(slot, &mut codes);
                let codes = mean.iter_mut().zip(&codes);
                codes.for_each(|(sum, &code)| *sum += f64::from(scale) * f64::from(code));
                count += 1;
            }
        }
        let offset = &page.offsets[group * depth..(group + 1) * depth];
        let mean = mean.iter().zip(offset);
        Some(mean.map(|(sum, x)| (sum / f64::from(count.max(1)) + f64::from(*x)) as f32).collect())
    }

    /// The page that the next packed token belongs to.
    pub(super) fn last_page(&mut self) -> &mut Page {
        let index = self.packed / PAGE - self.first_page;
        if index == self.pages.len() {
            let page = Page::new(self.level, self.dims, self.format, self.moving);
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
        self.packed = len.max(self.sink_count);
        self.offset = self.moved_offset().or(self.offset.take());
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
            self.page(self.pages.len() - 1).values.truncate(used);
        }
    }

    /// Bytes in memory.
    pub(super) fn size(&self) -> usize {
        let pages: usize = self.pages.iter().map(|page| page.size()).sum();
        let offset = self.offset.as_ref().map_or(0, |offset| size_of_val(offset.as_slice()));
        pages + self.sinks.size() + self.recent.size() + offset
    }
}

/// Keys on their way into a page.
#[derive(Default)]
struct KeyCodes {
    codes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<i32>,
    sums: Vec<i32>,
}

impl KeyCodes {
    fn quantize(&mut self, level: Level, keys: &[f32], offset: &[f32], tokens: usize) {
        self.codes.resize(keys.len(), 0);
        self.scales.resize(tokens, 1.0);
        self.zeros.resize(tokens, 0);
        self.sums.resize(tokens, 0);
        if offset.is_empty() {
            return;
        }
        let out = BlockCodes {
            codes: &mut self.codes,
            scales: &mut self.scales,
            zeros: &mut self.zeros,
            sums: &mut self.sums,
        };
        let rows = contracts::Rows::contiguous(keys, offset.len());
        level.quantize_symmetric(rows, Some(offset), out);
    }
}
