//! A decoder as one of the models whose attention is chosen by someone else.

use super::model::LlamaModel;
use crate::Result;
use crate::attention::{Causal, QuantizedAttention};
use crate::models::layered::{Attend, LayeredModel};
use candle_core::Tensor;

/// The input is token ids, U32 `[B, N]` without padding. Attention is causal over the whole
/// sequence, without a cache; the embedding is the normalized state of the last token, which
/// predicts the next one.
impl LayeredModel for LlamaModel {
    type Input = Tensor;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers().iter().map(|layer| &layer.attention).collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers_mut().iter_mut().map(|layer| &mut layer.attention).collect()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        LlamaModel::embed(self, input_ids)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let causal = Causal::Offset(0).into();
        self.layer_with(index, hidden, |q, k, v| attend(q, k, v, &causal))
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?;
        self.normalize(&last)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        let config = self.config();
        Some([config.num_attention_heads, config.num_key_value_heads])
    }
}
