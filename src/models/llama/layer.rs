//! One layer of the decoder.

use super::cache::LayerCache;
use super::config::LlamaConfig;
use super::linear::Linear;
use super::rope::Rotation;
use super::weights::{Loader, Part};
use crate::Result;
use crate::attention::{AttentionConfig, KvCacheConfig, QuantizedAttention};
use candle_core::Tensor;
use candle_nn::{Module, RmsNorm};

/// Attention block, then feed-forward block, each after an RMSNorm and with a residual.
#[derive(Clone)]
pub struct LlamaLayer {
    /// The attention in use; switch it with
    /// [`set_config`](crate::QuantizedAttention::set_config).
    pub attention: QuantizedAttention,
    /// How a new cache holds the keys and values of this layer while its attention is int8.
    pub kv_cache: KvCacheConfig,
    heads: usize,
    kv_heads: usize,
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    ffn_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl LlamaLayer {
    pub(super) fn load(from: &Loader<'_>, config: &LlamaConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let width = config.num_attention_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            attention: QuantizedAttention::new(AttentionConfig::fp32()),
            kv_cache: KvCacheConfig::default(),
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            attention_norm: from.norm(Part::ATTENTION_NORM, hidden)?,
            query: from.linear(Part::QUERY, width, hidden)?,
            key: from.linear(Part::KEY, kv_width, hidden)?,
            value: from.linear(Part::VALUE, kv_width, hidden)?,
            output: from.linear(Part::ATTENTION_OUTPUT, hidden, width)?,
            ffn_norm: from.norm(Part::FFN_NORM, hidden)?,
            gate: from.linear(Part::GATE, inner, hidden)?,
            up: from.linear(Part::UP, inner, hidden)?,
            down: from.linear(Part::DOWN, hidden, inner)?,
        })
    }

    /// `[B, N, hidden_size]` to the same; the tokens are added to the cache.
    pub(super) fn forward(
        &self,
        hidden: &Tensor,
        rotation: &Rotation,
        cache: &mut LayerCache,
    ) -> Result<Tensor> {
        self.forward_with(hidden, rotation, |q, k, v| {
            cache.append(k, v)?;
            cache.attend(q, self.attention.config())
        })
    }

    /// The same with attention by someone else: `attend` gets queries `[B, H, N, head_dim]`, keys
    /// and values `[B, H_kv, N, head_dim]`, and returns `[B, H, N, head_dim]`.
    pub(super) fn forward_with(
        &self,
        hidden: &Tensor,
        rotation: &Rotation,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let x = self.attention_norm.forward(hidden)?;
        let q = rotation.apply(&split_heads(&self.query.forward(&x)?, self.heads)?)?;
        let k = rotation.apply(&split_heads(&self.key.forward(&x)?, self.kv_heads)?)?;
        let v = split_heads(&self.value.forward(&x)?, self.kv_heads)?;
        let context = attend(&q, &k, &v)?.transpose(1, 2)?.flatten_from(2)?;
        let hidden = (self.output.forward(&context)? + hidden)?;
        let x = self.ffn_norm.forward(&hidden)?;
        let inner = (self.gate.forward(&x)?.silu()? * self.up.forward(&x)?)?;
        Ok((self.down.forward(&inner)? + hidden)?)
    }
}

/// `[B, N, H * D]` as a view `[B, H, N, D]`.
fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, width) = x.dims3()?;
    Ok(x.reshape((b, n, heads, width / heads))?.transpose(1, 2)?)
}
