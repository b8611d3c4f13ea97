//! Which keys a query may see by its position: causal mask, sliding window, sequence lengths.

use super::{AttentionCall, AttentionSpec, Causal};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// Query `i` of batch element `b` sees the keys of one range.
#[derive(Debug, Clone)]
pub(crate) struct Visible {
    keys: usize,
    offsets: Offsets,
    causal: bool,
    left: Option<usize>,
    right: Option<usize>,
    lens: Option<Vec<usize>>,
    q_lens: Option<Vec<usize>>,
}

/// Query `i` stands at the position of key `i + offset`.
#[derive(Debug, Clone)]
enum Offsets {
    One(isize),
    /// One a sequence.
    Each(Vec<isize>),
}

impl Offsets {
    fn new((batch, queries, keys): (usize, usize, usize), call: &AttentionCall) -> Result<Self> {
        let large = |x: usize| isize::try_from(x).unwrap_or(isize::MAX / 2);
        Ok(match &call.causal {
            Some(Causal::Offset(offset)) => Self::One(large(*offset)),
            Some(Causal::From(starts)) if starts.len() != batch => {
                let found = starts.len();
                let problem = format!("{found} first positions for a batch of {batch}");
                return Err(Error::Mismatch(problem));
            }
            Some(Causal::From(starts)) => {
                Self::Each(starts.iter().map(|&start| large(start)).collect())
            }
            Some(Causal::End) if call.kv_lens.is_some() || call.q_lens.is_some() => {
                Self::ends(call, queries, |_| keys, batch)
            }
            Some(Causal::End) | None => Self::One(keys as isize - queries as isize),
        })
    }

    /// Each sequence's queries at the end of its own keys, of which there are `held` unless the call says
    /// otherwise.
    fn ends(
        call: &AttentionCall,
        queries: usize,
        held: impl Fn(usize) -> usize,
        batch: usize,
    ) -> Self {
        let own = |lens: &Option<Vec<usize>>, sequence: usize| lens.as_ref().map(|l| l[sequence]);
        let end = |sequence: usize| {
            let keys = own(&call.kv_lens, sequence).unwrap_or_else(|| held(sequence));
            keys as isize - own(&call.q_lens, sequence).unwrap_or(queries) as isize
        };
        Self::Each((0..batch).map(end).collect())
    }

    fn of(&self, sequence: usize) -> isize {
        match self {
            Self::One(offset) => *offset,
            Self::Each(offsets) => offsets[sequence],
        }
    }
}

impl Visible {
    /// # Errors
    /// [`Error::Mismatch`] unless there is one length, and one first position, for each of `batch`
    /// sequences, no length above `keys`.
    pub(crate) fn new(
        (batch, queries, keys): (usize, usize, usize),
        call: &AttentionCall,
        spec: &AttentionSpec,
    ) -> Result<Self> {
        check_lens("kv_lens", call.kv_lens.as_deref(), batch, (keys, "keys"))?;
        check_lens("q_lens", call.q_lens.as_deref(), batch, (queries, "queries"))?;
        Ok(Self {
            keys,
            offsets: Offsets::new((batch, queries, keys), call)?,
            causal: call.causal.is_some(),
            left: spec.window_left,
            right: spec.window_right,
            lens: call.kv_lens.clone(),
            q_lens: call.q_lens.clone(),
        })
    }

    /// What is in a cache: sequences of these numbers of keys, each with queries at its own end unless the
    /// call says otherwise.
    ///
    /// # Errors
    /// Those of [`Visible::new`].
    pub(super) fn of_cache(
        held: &[usize],
        queries: usize,
        call: &AttentionCall,
        spec: &AttentionSpec,
    ) -> Result<Self> {
        let keys = held.iter().copied().max().unwrap_or(0);
        let mut visible = Self::new((held.len(), queries, keys), call, spec)?;
        if let (None | Some(Causal::End), None) = (&call.causal, &call.kv_lens) {
            visible.offsets = Offsets::ends(call, queries, |index| held[index], held.len());
        }
        if let Some(lens) = &call.kv_lens
            && let Some((len, held)) = lens.iter().zip(held).find(|(len, held)| len > held)
        {
            let problem = format!("kv_lens holds {len}, but there are {held} keys");
            return Err(Error::Mismatch(problem));
        }
        visible.limit(held);
        Ok(visible)
    }

    /// Hides the keys from these numbers on, one for each sequence.
    pub(super) fn limit(&mut self, lens: &[usize]) {
        let own = self.lens.get_or_insert_with(|| vec![self.keys; lens.len()]);
        own.iter_mut().zip(lens).for_each(|(own, &len)| *own = len.min(*own));
    }

    /// Keys around a query's position alone: query `i` stands at that of key `i + offset`.
    pub(crate) fn around(
        keys: usize,
        offset: isize,
        left: Option<usize>,
        right: Option<usize>,
    ) -> Self {
        Self {
            keys,
            offsets: Offsets::One(offset),
            causal: false,
            left,
            right,
            lens: None,
            q_lens: None,
        }
    }

    /// The position of query `query` of a sequence among the keys.
    pub(crate) fn position(&self, sequence: usize, query: usize) -> isize {
        self.offsets.of(sequence).saturating_add_unsigned(query)
    }

    /// Whether queries stand at the same positions in all sequences.
    pub(crate) fn is_one_for_all(&self) -> bool {
        matches!(self.offsets, Offsets::One(_))
    }

    /// The keys that query `query` of sequence `batch` sees.
    pub(crate) fn range(&self, batch: usize, query: usize) -> Range<usize> {
        if self.q_lens.as_ref().is_some_and(|lens| query >= lens[batch]) {
            return 0..0;
        }
        let at = self.position(batch, query);
        let len = self.lens.as_ref().map_or(self.keys, |lens| lens[batch]);
        let clamp = |x: isize| x.clamp(0, len as isize) as usize;
        let right = if self.causal { Some(0) } else { self.right };
        let end =
            right.map_or(len, |right| clamp(at.saturating_add_unsigned(right).saturating_add(1)));
        let start = self.left.map_or(0, |left| clamp(at.saturating_sub_unsigned(left)));
        start.min(end)..end
    }

    /// Whether every query sees every key.
    pub(crate) fn is_everything(&self) -> bool {
        self.is_the_same_for_all_queries() && self.lens.is_none()
    }

    /// Whether what a query sees does not depend on its position.
    pub(crate) fn is_the_same_for_all_queries(&self) -> bool {
        let anywhere = !self.causal && self.left.is_none() && self.right.is_none();
        anywhere && self.q_lens.is_none()
    }

    /// Whether all queries of a sequence see the same keys.
    pub(crate) fn is_one_for_all_queries(&self, batch: usize, queries: usize) -> bool {
        let all = self.range(batch, 0);
        (1..queries).all(|query| self.range(batch, query) == all)
    }

    /// The same as a boolean tensor, `[B, 1, M, N]`.
    pub(crate) fn to_tensor(
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

/// # Errors
/// [`Error::Mismatch`] unless there is a length for each sequence, none above `most`.
fn check_lens(
    name: &str,
    lens: Option<&[usize]>,
    batch: usize,
    (most, what): (usize, &str),
) -> Result<()> {
    let Some(lens) = lens else { return Ok(()) };
    let problem = match lens.iter().find(|&&len| len > most) {
        _ if lens.len() != batch => format!("{} {name} for a batch of {batch}", lens.len()),
        Some(len) => format!("{name} holds {len}, but there are {most} {what}"),
        None => return Ok(()),
    };
    Err(Error::Mismatch(problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::attention::AttnMask;

    fn ranges(call: impl Into<AttentionCall>, spec: &AttentionSpec) -> Vec<Range<usize>> {
        let visible = Visible::new((1, 3, 5), &call.into(), spec).unwrap();
        (0..3).map(|query| visible.range(0, query)).collect()
    }

    #[test]
    fn causal_windows_and_lengths() {
        let spec = AttentionSpec::default();
        assert_eq!(ranges(AttnMask::None, &spec), [0..5, 0..5, 0..5]);
        assert_eq!(ranges(AttnMask::causal(), &spec), [0..1, 0..2, 0..3]);
        assert_eq!(ranges(AttnMask::causal_with_offset(2), &spec), [0..3, 0..4, 0..5]);
        assert_eq!(ranges(AttnMask::causal_with_offset(usize::MAX), &spec)[0], 0..5);
        assert_eq!(ranges(AttentionCall::causal(), &spec), [0..3, 0..4, 0..5]);
        // Without a causal mask the queries are the last of the keys: positions 2, 3, 4.
        let window = AttentionSpec { window_left: Some(1), window_right: Some(0), ..spec.clone() };
        assert_eq!(ranges(AttnMask::None, &window), [1..3, 2..4, 3..5]);
        assert_eq!(ranges(AttnMask::causal(), &window), [0..1, 0..2, 1..3]);
        let lens = |call: AttentionCall| call.with_kv_lens(vec![2]);
        assert_eq!(ranges(lens(AttentionCall::default()), &spec), [0..2, 0..2, 0..2]);
        assert_eq!(ranges(lens(AttnMask::causal().into()), &spec), [0..1, 0..2, 0..2]);
    }

    #[test]
    fn each_sequence_has_positions_of_its_own() {
        let spec = AttentionSpec::default();
        let ranges = |call: AttentionCall| -> Vec<Vec<Range<usize>>> {
            let visible = Visible::new((3, 2, 5), &call, &spec).unwrap();
            (0..3).map(|b| (0..2).map(|query| visible.range(b, query)).collect()).collect()
        };
        // The last two of 5, 3 and 1 keys; in the last sequence the first query stands before them.
        let end = AttentionCall::causal().with_kv_lens(vec![5, 3, 1]);
        assert_eq!(ranges(end), [[0..4, 0..5], [0..2, 0..3], [0..0, 0..1]]);
        let from = Causal::From(vec![0, 3, 7]);
        assert_eq!(ranges(from.clone().into()), [[0..1, 0..2], [0..4, 0..5], [0..5, 0..5]]);
        let from = AttentionCall::from(from).with_kv_lens(vec![5, 3, 1]);
        assert_eq!(ranges(from), [[0..1, 0..2], [0..3, 0..3], [0..1, 0..1]]);
    }

    #[test]
    fn lengths_and_positions_that_do_not_fit_are_named() {
        let lens = |lens| AttentionCall::default().with_kv_lens(lens);
        for (call, message) in [
            (lens(vec![2, 2]), "2 kv_lens"),
            (lens(vec![6]), "6, but there are 5 keys"),
            (Causal::From(vec![0, 0]).into(), "2 first positions for a batch of 1"),
        ] {
            let error = Visible::new((1, 3, 5), &call, &AttentionSpec::default()).unwrap_err();
            assert!(matches!(error, Error::Mismatch(_)), "{error}");
            assert!(error.to_string().contains(message), "{error}");
        }
    }
}
