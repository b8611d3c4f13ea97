//! What of attention belongs to one call: which keys its queries see.

use crate::Result;
use candle_core::Tensor;
use candle_nn::attention::AttnMask;
use std::ops::Range;

/// Which keys the queries of one call see; all of them by default. Everything that is given applies
/// at once. A query that sees no key gives zeros.
///
/// Candle's [`AttnMask`] converts into it, so a call that passes one compiles as it is.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttentionCall, AttentionConfig, attention};
///
/// // Two sequences of a padded batch: 16 tokens, and 9 with 7 of padding behind them.
/// let q = Tensor::randn(0f32, 1., (2, 4, 16, 32), &Device::Cpu)?;
/// let call = AttentionCall::default().with_kv_lens(vec![16, 9]);
/// let out = attention(&q, &q, &q, &call, &AttentionConfig::int8())?;
/// // The next token of both: one query a sequence, which stands at its last key.
/// let next = Tensor::randn(0f32, 1., (2, 4, 1, 32), &Device::Cpu)?;
/// let call = AttentionCall::causal().with_kv_lens(vec![16, 9]);
/// let out = attention(&next, &q, &q, &call, &AttentionConfig::int8())?;
/// assert_eq!(out.dims(), [2, 4, 1, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct AttentionCall {
    /// Broadcasts to `[B, H, M, N]`: U8 (boolean, non-zero = attend) or float (added to the scaled
    /// scores). Minus infinity and the smallest finite number of the mask's dtype both mean masked: a
    /// row of only those gives zeros, where PyTorch's eager attention gives the mean of the values. NaN is
    /// NaN: a query that sees such a key, by its position and lengths, has a result of NaN.
    pub mask: Option<Tensor>,
    /// Where the queries stand, and that they see no key behind their own.
    pub causal: Option<Causal>,
    /// How many keys of each sequence of the batch are real; the others are not seen. A cache
    /// knows its own lengths, and takes shorter ones.
    pub kv_lens: Option<Vec<usize>>,
    /// How many queries of each sequence of the batch are real; the others are padding: they see no
    /// key, give zeros, and have no influence on others.
    pub q_lens: Option<Vec<usize>>,
}

/// The key at which a query stands: its own, and the last that it sees.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Causal {
    /// Query `i` stands at key `i + offset`, as in [`AttnMask::Causal`].
    Offset(usize),
    /// The queries are the last of the keys of their sequence: of
    /// [`kv_lens`](AttentionCall::kv_lens) where they are given, or of what is in a cache; all `M` of
    /// them, or the first [`q_lens`](AttentionCall::q_lens) where those are given. A query that would
    /// stand before the first key sees nothing.
    End,
    /// The first query of each sequence stands at this key. After an append of chunks of different
    /// lengths to a cache that is the length each sequence had before.
    From(Vec<usize>),
}

impl AttentionCall {
    /// Each query sees the keys up to its own; the queries are the last of the keys
    /// ([`Causal::End`]).
    pub fn causal() -> Self {
        Causal::End.into()
    }

    /// The same with a mask tensor.
    pub fn with_mask(self, mask: Tensor) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// The same, where queries see no key behind their own.
    pub fn with_causal(self, causal: Causal) -> Self {
        Self { causal: Some(causal), ..self }
    }

    /// The same for a batch whose sequences have these numbers of keys.
    pub fn with_kv_lens(self, lens: Vec<usize>) -> Self {
        Self { kv_lens: Some(lens), ..self }
    }

    /// The same for a batch whose sequences have these numbers of queries.
    pub fn with_q_lens(self, lens: Vec<usize>) -> Self {
        Self { q_lens: Some(lens), ..self }
    }
}

impl AttentionCall {
    /// What of it concerns some sequences of a batch, for which there are lengths.
    pub(super) fn of_sequences(&self, sequences: &Range<usize>) -> Result<Self> {
        let of = |lens: &Vec<usize>| lens.get(sequences.clone()).unwrap_or(lens).to_vec();
        let mask = self.mask.as_ref().map(|mask| match *mask.dims() {
            [batch, _, _, _] if batch > 1 => mask.narrow(0, sequences.start, sequences.len()),
            // The same for all.
            _ => Ok(mask.clone()),
        });
        let causal = self.causal.as_ref().map(|causal| match causal {
            Causal::From(positions) => Causal::From(of(positions)),
            all => all.clone(),
        });
        let (kv_lens, q_lens) = (self.kv_lens.as_ref().map(of), self.q_lens.as_ref().map(of));
        Ok(Self { mask: mask.transpose()?, causal, kv_lens, q_lens })
    }
}

impl From<Causal> for AttentionCall {
    fn from(causal: Causal) -> Self {
        Self::default().with_causal(causal)
    }
}

impl From<AttnMask> for AttentionCall {
    fn from(mask: AttnMask) -> Self {
        match mask {
            AttnMask::None => Self::default(),
            AttnMask::Causal { kv_offset } => Causal::Offset(kv_offset).into(),
            AttnMask::Mask(mask) => Self::default().with_mask(mask),
        }
    }
}

impl From<&AttnMask> for AttentionCall {
    fn from(mask: &AttnMask) -> Self {
        mask.clone().into()
    }
}

impl From<&AttentionCall> for AttentionCall {
    fn from(call: &AttentionCall) -> Self {
        call.clone()
    }
}
