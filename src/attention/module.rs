//! Attention as a module that a model holds, one a layer.

use super::dispatch::attention;
use super::{AttentionCall, AttentionConfig, Backend};
use crate::Result;
use candle_core::Tensor;
use std::ops::Range;

/// Scaled dot-product attention with a switchable backend: `softmax(scale * q·k^T + mask)·v`.
///
/// It holds no weights. A model that keeps one per layer can run some layers in int8 and others
/// in fp32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttentionConfig, AttnMask, QuantizedAttention};
///
/// let q = Tensor::randn(0f32, 1., (1, 4, 16, 32), &Device::Cpu)?;
/// let int8 = QuantizedAttention::new(AttentionConfig::int8());
/// let fp32 = QuantizedAttention::new(AttentionConfig::fp32());
/// let drift = (int8.forward(&q, &q, &q, &AttnMask::None)?
///     - fp32.forward(&q, &q, &q, &AttnMask::None)?)?;
/// assert!(drift.abs()?.max_all()?.to_scalar::<f32>()? < 0.05);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct QuantizedAttention {
    config: AttentionConfig,
    /// Sequences of fewer tokens are in fp32.
    fp32_below: usize,
}

impl QuantizedAttention {
    /// A module with this configuration, for sequences of any length.
    pub fn new(config: AttentionConfig) -> Self {
        Self { config, fp32_below: 0 }
    }

    /// The configuration in use.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Switches the configuration, and with it the backend, for sequences of any length.
    pub fn set_config(&mut self, config: AttentionConfig) {
        *self = Self::new(config);
    }

    /// Computes sequences of fewer tokens than this in fp32, whatever the backend: it takes longer to round a few
    /// queries and keys than to multiply them. On x86, with heads of 32 and 64 channels, fp32 took less time up to 96
    /// tokens on each level that was measured; `docs/encoders.md` has the table.
    ///
    /// A sequence has as many tokens as [`AttentionCall::kv_lens`] says, or [`AttentionCall::q_lens`] where only
    /// those are given, else all of the `N` keys. Each is computed in the same way as it is by itself.
    pub fn set_fp32_below(&mut self, tokens: usize) {
        self.fp32_below = tokens;
    }

    /// The number of tokens from which the configuration holds, see [`QuantizedAttention::set_fp32_below`].
    pub fn fp32_below(&self) -> usize {
        self.fp32_below
    }

    /// `q` `[B, H, M, D]`, `k` `[B, H_kv, N, D]`, `v` `[B, H_kv, N, Dv]` to `[B, H, M, Dv]`; see
    /// [`attention`].
    ///
    /// # Errors
    /// Those of [`attention`].
    pub fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        call: impl Into<AttentionCall>,
    ) -> Result<Tensor> {
        let call = call.into();
        match self.short_and_long(k, &call).as_slice() {
            [] => attention(q, k, v, call, &self.config),
            [(_, short)] => attention(q, k, v, call, &self.config_of(*short)),
            runs => {
                let one = |(sequences, short): &(Range<usize>, bool)| -> Result<Tensor> {
                    let of = |x: &Tensor| x.narrow(0, sequences.start, sequences.len());
                    let call = call.of_sequences(sequences)?;
                    attention(&of(q)?, &of(k)?, &of(v)?, call, &self.config_of(*short))
                };
                let outputs = runs.iter().map(one).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::cat(&outputs, 0)?)
            }
        }
    }

    fn config_of(&self, short: bool) -> AttentionConfig {
        if short { self.config.with_backend(Backend::Fp32) } else { self.config.clone() }
    }

    /// The sequences of a batch in runs that are all short, or all not; nothing where it does not matter, or
    /// arguments do not fit each other.
    fn short_and_long(&self, k: &Tensor, call: &AttentionCall) -> Vec<(Range<usize>, bool)> {
        let Ok((batch, _, n, _)) = k.dims4() else { return Vec::new() };
        if self.fp32_below == 0 || self.config.backend == Backend::Fp32 {
            return Vec::new();
        }
        let Some(lens) = call.kv_lens.as_ref().or(call.q_lens.as_ref()) else {
            return vec![(0..batch, n < self.fp32_below)];
        };
        if lens.len() != batch {
            return Vec::new();
        }
        let short: Vec<bool> = lens.iter().map(|&len| len < self.fp32_below).collect();
        let mut end = 0;
        let runs = short.chunk_by(|a, b| a == b).map(|run| {
            let start = end;
            end += run.len();
            (start..end, run[0])
        });
        runs.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Causal;
    use crate::testing::randn;
    use candle_core::{DType, Device};

    /// Sequences of 3, 9, 2, 1, 12 and 10 tokens, of which those below 10 are short.
    const LENS: [usize; 6] = [3, 9, 2, 1, 12, 10];
    const N: usize = 12;

    fn bits(x: &Tensor) -> Vec<u32> {
        let x = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        x.into_iter().map(f32::to_bits).collect()
    }

    fn calls() -> Vec<AttentionCall> {
        let hidden = |i: usize| u8::from(i % 7 != 3);
        let len = LENS.len() * 2 * N * N;
        let mask = Tensor::from_iter((0..len).map(hidden), &Device::Cpu).unwrap();
        let mask = mask.reshape((LENS.len(), 2, N, N)).unwrap();
        let one = mask.narrow(0, 1, 1).unwrap();
        let lens = LENS.to_vec();
        let both = AttentionCall::default().with_kv_lens(lens.clone()).with_q_lens(lens.clone());
        vec![
            both.clone().with_mask(mask),
            both.clone().with_mask(one.squeeze(0).unwrap()),
            both.clone().with_mask(one).with_causal(Causal::End),
            both.with_causal(Causal::From((0..LENS.len()).collect())),
            AttentionCall::default().with_q_lens(lens.clone()),
            AttentionCall::default().with_kv_lens(lens),
        ]
    }

    #[test]
    fn every_sequence_is_computed_as_by_itself() {
        let [q, k, v] = [(); 3].map(|()| randn((LENS.len(), 2, N, 16)));
        let mut module = QuantizedAttention::new(AttentionConfig::int8());
        module.set_fp32_below(10);
        for call in calls() {
            let all = module.forward(&q, &k, &v, &call).unwrap();
            for (i, len) in LENS.into_iter().enumerate() {
                let of = |x: &Tensor| x.narrow(0, i, 1).unwrap();
                let alone = call.of_sequences(&(i..i + 1)).unwrap();
                let configs = [AttentionConfig::fp32(), AttentionConfig::int8()];
                let config = &configs[usize::from(len >= 10)];
                let expected = attention(&of(&q), &of(&k), &of(&v), &alone, config).unwrap();
                assert_eq!(bits(&of(&all)), bits(&expected), "{i} {call:?}");
                let alone = module.forward(&of(&q), &of(&k), &of(&v), &alone).unwrap();
                assert_eq!(bits(&alone), bits(&expected), "{i} alone {call:?}");
            }
        }
    }

    #[test]
    fn without_lengths_all_keys_count() {
        let x = randn((2, 2, N, 16));
        let call = AttentionCall::default();
        let of = |config| bits(&attention(&x, &x, &x, &call, &config).unwrap());
        let (fp32, int8) = (of(AttentionConfig::fp32()), of(AttentionConfig::int8()));
        assert_ne!(fp32, int8);
        let mut module = QuantizedAttention::default();
        for (below, expected) in [(0, &int8), (N, &int8), (N + 1, &fp32)] {
            module.set_fp32_below(below);
            let found = module.forward(&x, &x, &x, &call).unwrap();
            assert_eq!(bits(&found), *expected, "{below}");
        }
        module.set_config(AttentionConfig::int8());
        assert_eq!(module.fp32_below(), 0);
    }

    #[test]
    fn arguments_that_do_not_fit_are_those_of_attention() {
        let mut module = QuantizedAttention::default();
        module.set_fp32_below(64);
        let x = randn((2, 2, N, 16));
        let call = AttentionCall::default().with_kv_lens(vec![3, 4, 5]);
        let error = module.forward(&x, &x, &x, &call).unwrap_err().to_string();
        let expected = attention(&x, &x, &x, &call, module.config()).unwrap_err().to_string();
        assert_eq!(error, expected);
        let mask = Tensor::zeros((3, 1, 1, N), DType::U8, &Device::Cpu).unwrap();
        let call = AttentionCall::default().with_kv_lens(vec![3, 70]).with_mask(mask);
        assert!(module.forward(&x, &x, &x, &call).is_err());
        let flat = x.flatten_all().unwrap();
        assert!(module.forward(&flat, &flat, &flat, AttentionCall::default()).is_err());
    }
}
