//! A head as it is written to a file: rows of codes, whatever the panels of this machine's kernel.

use super::config::{CacheValues, KeySmoothing, KvCacheConfig};
use super::head::{Dims, GROUP, Head, PAGE, Rows};
use super::values::StoredRows;
use half::{bf16, f16};
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
    /// Keys that stand out of their group, by token.
    pub outliers: Vec<(usize, Vec<f32>)>,
    /// Sinks, the recent tokens, and those of the last group in pages.
    pub rows: [Rows; 3],
    pub offset: Option<Vec<f32>>,
    /// Those of the groups with tokens in pages, where each has its own: `[groups, D]`.
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
            outliers: Vec::new(),
            rows: Default::default(),
            offset: None,
            offsets: Vec::new(),
        }
    }

    /// Whether `len` tokens can have these in pages: nothing lies between the sinks and the pages
    /// but what a window has dropped, and nothing between the pages and the recent tokens.
    pub(super) fn fits(len: usize, pages: Range<usize>, config: &KvCacheConfig) -> bool {
        let sinks = config.sinks;
        if len < sinks {
            return pages == (sinks..sinks);
        }
        // The window drops whole pages, of tokens that no later query sees.
        let unseen = config.window.map_or(0, |window| len.saturating_sub(window));
        let starts = pages.start == sinks
            || (pages.start > sinks && pages.start.is_multiple_of(PAGE) && pages.start <= unseen);
        starts && pages.start <= pages.end && pages.end <= len
    }

    /// The groups that tokens in these pages belong to.
    pub(super) fn groups(pages: Range<usize>) -> Range<usize> {
        match pages.is_empty() {
            true => 0..0,
            false => pages.start / GROUP..pages.end.div_ceil(GROUP),
        }
    }

    /// Refuses what no head can hold, tokens in pages from `first` on. Shapes are right.
    pub(super) fn check(
        &self,
        head: usize,
        first: usize,
        config: &KvCacheConfig,
    ) -> Result<(), String> {
        if self.keys.contains(&i8::MIN) {
            return Err("a key code of -128, expected -127 to 127".into());
        }
        // That of a key which holds NaN or infinity is NaN.
        if let Some(scale) = self.key_scales.iter().find(|x| !(is_scale(**x) || x.is_nan())) {
            return Err(format!("a key scale of {scale}, expected a positive number"));
        }
        self.check_offset(head, config)?;
        self.check_last(first + self.tokens, config)?;
        self.check_outliers(first, config)?;
        self.check_values(config.values)?;
        self.check_exceptions(first, config.values)
    }

    /// Whether the offset of keys is there where it must be known, and what it must be.
    fn check_offset(&self, head: usize, config: &KvCacheConfig) -> Result<(), String> {
        if self.offset.iter().flatten().chain(&self.offsets).any(|x| x.is_nan()) {
            return Err("a key offset of NaN".into());
        }
        let waiting = self.rows[1].tokens;
        let most = match config.key_smoothing {
            KeySmoothing::Groups => config.recent.saturating_add(GROUP - 1),
            KeySmoothing::FirstTokens(tokens) if self.offset.is_none() => tokens.max(1) - 1,
            _ => config.recent,
        };
        if waiting > most {
            return Err(format!("{waiting} tokens in f32, expected at most {most}"));
        }
        let as_configured = match (&config.key_smoothing, &self.offset) {
            (KeySmoothing::None, Some(offset)) => offset.iter().all(|x| *x == 0.0),
            (KeySmoothing::Given(given), Some(offset)) => given.get(head) == Some(offset),
            (KeySmoothing::FirstTokens(_), offset) => offset.is_some() || self.tokens == 0,
            (KeySmoothing::Groups, offset) => offset.is_none(),
            (KeySmoothing::None | KeySmoothing::Given(_), None) => false,
        };
        match as_configured {
            true => Ok(()),
            false => Err("another key offset than the configuration has".into()),
        }
    }

    /// The last group is kept in f32 whole or not at all.
    fn check_last(&self, packed: usize, config: &KvCacheConfig) -> Result<(), String> {
        let tokens = self.rows[2].tokens;
        let start = (packed.saturating_sub(1) / GROUP * GROUP).max(config.sinks);
        let whole = config.key_smoothing == KeySmoothing::Groups
            && packed.is_multiple_of(GROUP)
            && tokens == packed.saturating_sub(start);
        match tokens == 0 || whole && tokens <= self.tokens {
            true => Ok(()),
            false => Err(format!("{tokens} tokens of a last group that ends with token {packed}")),
        }
    }

    /// Each token has one key at most, and no codes in its place.
    fn check_outliers(&self, first: usize, config: &KvCacheConfig) -> Result<(), String> {
        if !self.outliers.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err("outliers that are not in the order of their tokens".into());
        }
        let depth = self.dims.depth;
        for (token, _) in &self.outliers {
            let codes = &self.keys[(token - first) * depth..(token - first + 1) * depth];
            if !config.outliers || codes.iter().any(|code| *code != 0) {
                return Err(format!("token {token} has codes and a key in f32"));
            }
        }
        Ok(())
    }

    /// Values in pages are what their format holds; all else is an exception.
    fn check_values(&self, format: CacheValues) -> Result<(), String> {
        let StoredRows { bytes, scales } = &self.values;
        let halves = || bytes.as_chunks::<2>().0.iter().copied();
        let held = match format {
            CacheValues::F16 => halves().all(|x| f16::from_le_bytes(x).is_finite()),
            CacheValues::Bf16 => {
                halves().all(|x| bf16::from_le_bytes(x).to_f32().abs() <= format.limit())
            }
            CacheValues::Int8 => {
                // The largest code stands for the largest value, but for rounding.
                let most = format.limit() / 126.0;
                let scales = scales.iter().all(|x| is_scale(*x) && *x <= most);
                scales && !bytes.contains(&(i8::MIN as u8))
            }
        };
        match held {
            true => Ok(()),
            false => Err(format!("values or scales that {format:?} does not hold")),
        }
    }

    /// Each token has one row at most, and zeros in its place.
    fn check_exceptions(&self, first: usize, format: CacheValues) -> Result<(), String> {
        if !self.exceptions.is_sorted_by(|(a, _), (b, _)| a < b) {
            return Err("exceptions that are not in the order of their tokens".into());
        }
        let width = self.dims.value_dim * format.size();
        for (token, row) in &self.exceptions {
            let place = (token - first) * width;
            if self.values.bytes[place..place + width].iter().any(|byte| *byte != 0) {
                return Err(format!("token {token} has a value and an exception"));
            }
            if row.iter().all(|x| x.abs() <= format.limit()) {
                return Err(format!("the exception of token {token} is none"));
            }
        }
        Ok(())
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
            let depth = if head.local { head.dims.depth } else { 0 };
            let offsets = &page.offsets[groups.start * depth..groups.end * depth];
            stored.offsets.extend_from_slice(offsets);
            let rows = page.values.stored(slots);
            stored.values.bytes.extend(rows.bytes);
            stored.values.scales.extend(rows.scales);
            let mut exceptions = page.values.exceptions().to_vec();
            exceptions.sort_by_key(|(slot, _)| *slot);
            let by_token = |(slot, row)| (start + slot, row);
            stored.exceptions.extend(exceptions.into_iter().map(by_token));
            stored.outliers.extend(page.outliers.iter().cloned().map(by_token));
        }
        stored.rows = [head.sinks.clone(), head.recent.clone(), head.last.clone()];
        stored.offset = head.offset.clone();
        stored
    }
}

fn is_scale(x: f32) -> bool {
    x.is_finite() && x > 0.0
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
        if self.local {
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
        for (token, row) in stored.outliers {
            let index = token / PAGE - self.first_page;
            self.page(index).outliers.push((token % PAGE, row));
        }
        [self.sinks, self.recent, self.last] = stored.rows;
        self.offset = stored.offset;
        self
    }
}
