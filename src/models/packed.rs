//! Sequences of different lengths, one after the other: what a batch without padding is.
//!
//! ```text
//! [a0 a1 a2 | b0 | c0 c1 ..]    [1, total, hidden]     embeddings, linear layers and norms: over all tokens at once
//!  ---------  --   --------     [1, H, N_i, D] each    attention: of each sequence by itself
//! ```
//!
//! Every row of a linear layer and of a norm depends on its own row alone, and a sequence attends to itself:
//! each has the bits that it has alone.

use crate::attention::{AttentionCall, QuantizedAttention};
use crate::{Result, parallel};
use candle_core::Tensor;
use std::ops::Range;

/// Where each sequence lies among the tokens.
pub(super) struct Sequences {
    ranges: Vec<Range<usize>>,
}

impl Sequences {
    pub(super) fn new(lens: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let range = |len: usize| {
            let start = end;
            end += len;
            start..end
        };
        Self { ranges: lens.into_iter().map(range).collect() }
    }

    /// Attention of each sequence to itself: `[1, H, total, D]` each, to the same.
    pub(super) fn attend(
        &self,
        attention: &QuantizedAttention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let one = |range: &Range<usize>| -> Result<Tensor> {
            let of = |x: &Tensor| x.narrow(2, range.start, range.len());
            attention.forward(&of(q)?, &of(k)?, &of(v)?, AttentionCall::default())
        };
        match self.ranges.as_slice() {
            [only] => one(only),
            ranges => {
                let ranges: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).collect();
                let outputs = parallel::map(ranges, one).into_iter().collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&outputs, 2)?)
            }
        }
    }

    /// The tokens of each sequence, `[N_i, hidden]`, of all of them, `[1, total, hidden]`.
    pub(super) fn split(&self, hidden: &Tensor) -> Result<Vec<Tensor>> {
        let hidden = hidden.squeeze(0)?;
        let one = |range: &Range<usize>| Ok(hidden.narrow(0, range.start, range.len())?);
        self.ranges.iter().map(one).collect()
    }
}
