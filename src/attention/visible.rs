//! Which keys a query may see by its position: causal mask, sliding window, sequence lengths.

use super::AttentionConfig;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::attention::AttnMask;
use std::ops::Range;

/// Query `i` of batch element `b` sees the keys of one range.
#[derive(Debug, Clone)]
pub(super) struct Visible {
    keys: usize,
    /// Query `i` of a sequence stands at the position of key `i + offset`.
    offsets: Vec<isize>,
    /// The keys that are there, one number a sequence.
    lens: Vec<usize>,
    causal: bool,
    left: Option<usize>,
    right: Option<usize>,
}

impl Visible {
    /// # Errors
    /// [`Error::Config`] unless there is one length for each of `batch` sequences, none of them
    /// above `keys`.
    pub(super) fn new(
        (batch, queries, keys): (usize, usize, usize),
        mask: &AttnMask,
        config: &AttentionConfig,
    ) -> Result<Self> {
        if let Some(lens) = &config.kv_lens {
            if lens.len() != batch {
                let found = lens.len();
                return Err(Error::Config(format!("{found} kv_lens for a batch of {batch}")));
            }
            if let Some(len) = lens.iter().find(|&&len| len > keys) {
                return Err(Error::Config(format!(
                    "kv_lens holds {len}, but there are {keys} keys"
                )));
            }
        }
        let offset = match mask {
            AttnMask::Causal { kv_offset } => isize::try_from(*kv_offset).unwrap_or(isize::MAX / 2),
            _ => keys as isize - queries as isize,
        };
        Ok(Self {
            keys,
            offsets: vec![offset; batch],
            lens: config.kv_lens.clone().unwrap_or_else(|| vec![keys; batch]),
            causal: mask.is_causal(),
            left: config.window_left,
            right: config.window_right,
        })
    }

    /// Sequences with these numbers of keys, each with queries at its own end, or causal ones from a
    /// position of its own on.
    pub(super) fn of_sequences(
        lens: &[usize],
        queries: usize,
        causal: Option<&[usize]>,
        config: &AttentionConfig,
    ) -> Self {
        let offset = |(sequence, len): (usize, &usize)| match causal {
            Some(starts) => isize::try_from(starts[sequence]).unwrap_or(isize::MAX / 2),
            None => *len as isize - queries as isize,
        };
        Self {
            keys: lens.iter().copied().max().unwrap_or(0),
            offsets: lens.iter().enumerate().map(offset).collect(),
            lens: lens.to_vec(),
            causal: causal.is_some(),
            left: config.window_left,
            right: config.window_right,
        }
    }

    /// Keys around a query's position alone: query `i` stands at that of key `i + offset`.
    pub(super) fn around(
        keys: usize,
        offset: isize,
        left: Option<usize>,
        right: Option<usize>,
    ) -> Self {
        Self { keys, offsets: vec![offset], lens: vec![keys], causal: false, left, right }
    }

    /// The position of query `query` of sequence `batch` among the keys.
    pub(super) fn position(&self, batch: usize, query: usize) -> isize {
        self.offsets[batch].saturating_add_unsigned(query)
    }

    /// Hides the keys from these numbers on, one for each sequence.
    pub(super) fn limit(&mut self, lens: &[usize]) {
        self.lens.iter_mut().zip(lens).for_each(|(own, &len)| *own = len.min(*own));
    }

    /// The keys that query `query` of sequence `batch` sees.
    pub(super) fn range(&self, batch: usize, query: usize) -> Range<usize> {
        let at = self.position(batch, query);
        let len = self.lens[batch];
        let clamp = |x: isize| x.clamp(0, len as isize) as usize;
        let right = if self.causal { Some(0) } else { self.right };
        let end =
            right.map_or(len, |right| clamp(at.saturating_add_unsigned(right).saturating_add(1)));
        let start = self.left.map_or(0, |left| clamp(at.saturating_sub_unsigned(left)));
        start.min(end)..end
    }

    /// Whether every query sees every key.
    pub(super) fn is_everything(&self) -> bool {
        let all_there = self.lens.iter().all(|&len| len == self.keys);
        !self.causal && self.left.is_none() && self.right.is_none() && all_there
    }

    /// The same as a boolean tensor, `[B, 1, M, N]`.
    pub(super) fn to_tensor(
        &self,
        batch: usize,
        queries: usize,
        device: &Device,
    ) -> Result<Tensor> {
        let mut keep = vec![0u8; batch * queries * self.keys];
        for (row, keep) in keep.chunks_exact_mut(self.keys.max(1)).enumerate() {
            keep[self.range(row / queries, row % queries)].fill(1);
        }
        Ok(Tensor::from_vec(keep, (batch, 1, queries, self.keys), device)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(mask: AttnMask, config: AttentionConfig) -> Vec<Range<usize>> {
        let visible = Visible::new((1, 3, 5), &mask, &config).unwrap();
        (0..3).map(|query| visible.range(0, query)).collect()
    }

    #[test]
    fn causal_windows_and_lengths() {
        let config = AttentionConfig::default();
        assert_eq!(ranges(AttnMask::None, config.clone()), [0..5, 0..5, 0..5]);
        assert_eq!(ranges(AttnMask::causal(), config.clone()), [0..1, 0..2, 0..3]);
        assert_eq!(ranges(AttnMask::causal_with_offset(2), config.clone()), [0..3, 0..4, 0..5]);
        assert_eq!(ranges(AttnMask::causal_with_offset(usize::MAX), config.clone())[0], 0..5);
        // Without a causal offset the queries are the last of the keys: positions 2, 3, 4.
        let window =
            AttentionConfig { window_left: Some(1), window_right: Some(0), ..config.clone() };
        assert_eq!(ranges(AttnMask::None, window.clone()), [1..3, 2..4, 3..5]);
        assert_eq!(ranges(AttnMask::causal(), window), [0..1, 0..2, 1..3]);
        let lens = AttentionConfig { kv_lens: Some(vec![2]), ..config.clone() };
        assert_eq!(ranges(AttnMask::None, lens.clone()), [0..2, 0..2, 0..2]);
        assert_eq!(ranges(AttnMask::causal(), lens), [0..1, 0..2, 0..2]);
    }

    #[test]
    fn lengths_that_do_not_fit_are_named() {
        for (lens, message) in [(vec![2, 2], "2 kv_lens"), (vec![6], "6, but there are 5 keys")] {
            let config = AttentionConfig { kv_lens: Some(lens), ..AttentionConfig::default() };
            let error = Visible::new((1, 3, 5), &AttnMask::None, &config).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
