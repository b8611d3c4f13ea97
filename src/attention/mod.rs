//! Int8 attention for Candle tensors.
//!
//! * [`attention`]: scores, scale, mask, softmax, times V, in one fused op or in fp32.
//! * [`QuantizedAttention`]: the same as a module that a model holds, one per layer.
//! * [`attention_scores`]: raw `q·k^T` through int8, a differentiable Candle op;
//!   [`attention_scores_int32`], [`attention_scores_requantized`] and [`attention_scores_int8`] are
//!   its integers.
//! * [`position_mask`], [`restrict_mask`]: several conditions as one mask tensor.
//! * [`flash_attn`], [`flash_attn_varlen_cpu`]: the same with Candle's signatures and layouts.
//! * [`Int8KvCache`]: keys and values of past tokens, and attention over them.
//! * [`attention_probs`]: the probabilities, all of them in memory.

mod call;
mod combine;
mod config;
mod engine;
mod failure;
mod flash;
mod float_head;
mod int8_head;
mod keys;
mod kv_cache;
pub(crate) mod mask;
mod module;
mod op;
mod operand;
mod requantized;
mod scorer;
mod scores;
mod seen;
pub(crate) mod shapes;
mod spec;
mod tensor_values;
pub(crate) mod visible;
mod words;

pub use crate::reference::unfused::attention_probs;
pub use call::{AttentionCall, Causal};
pub use combine::{position_mask, restrict_mask};
pub use config::{
    AttentionConfig, Backend, Int8Config, PvPrecision, RequantConfig, RequantMode, ScoreConfig,
};
pub use flash::{flash_attn, flash_attn_varlen_cpu};
pub use kv_cache::{CacheValues, Int8KvCache, KeySmoothing, KvCacheConfig};
pub use module::QuantizedAttention;
pub use scores::{
    attention_scores, attention_scores_int8, attention_scores_int32, attention_scores_requantized,
};
pub use spec::{AttentionSpec, alibi_slopes};

use crate::Result;
use crate::reference::unfused;
use candle_core::Tensor;

/// `softmax(scale * q·k^T + mask)·v` with the backend that `config` names.
///
/// `q` `[B, H, M, D]`, `k` `[B, H_kv, N, D]`, `v` `[B, H_kv, N, Dv]`, each f32, f16 or bf16 with
/// any strides; `H_kv` divides `H`. The result is `[B, H, M, Dv]` in the dtype of `q`.
///
/// `call` says which keys the queries see: an [`AttentionCall`], or Candle's own
/// [`AttnMask`](candle_nn::attention::AttnMask), of which [`Causal`](candle_nn::attention::AttnMask::Causal)
/// lets query `i` attend to keys `j <= i + kv_offset`. A query with every key masked gives zeros.
///
/// What is finite in fp32 attention is finite here, up to values of `f32::MAX` and scores of 2.3e38 (they are
/// multiplied by log2(e)). A query or key that holds NaN or infinity makes its own scores NaN, and no others.
///
/// On a CPU both backends are one fused op. On other devices int8 is
/// [`tensor_ops::attention`](crate::reference::tensor_ops::attention), which has the same scores and holds
/// all `M * N` of them. Gradients are those of fp32 attention
/// on every device.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttentionConfig, AttnMask, attention};
///
/// let q = Tensor::randn(0f32, 1., (1, 8, 16, 32), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 16, 32), &Device::Cpu)?; // 4 query heads share one
/// let out = attention(&q, &kv, &kv, &AttnMask::causal(), &AttentionConfig::int8())?;
/// assert_eq!(out.dims(), [1, 8, 16, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`attention_scores`]; [`Error::Shape`](crate::Error::Shape) for a `v` or a mask that
/// does not fit; [`Error::DType`](crate::Error::DType) for a mask that is neither U8 nor float;
/// [`Error::Mismatch`](crate::Error::Mismatch) for lengths, positions, slopes or sink logits that
/// do not match the shapes; [`Error::Shape`](crate::Error::Shape) for more elements than memory has
/// addresses; [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a scale, softcap, slope
/// or sink logit that makes no sense; [`Error::Unsupported`](crate::Error::Unsupported) for a
/// precision of P·V for which this machine has no instruction.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let call = call.into();
    if !op_runs(q, &call) {
        return unfused::attention(q, k, v, call, config);
    }
    shapes::check_attention("attention", q.dims(), k.dims(), v.dims())?;
    shapes::check_float("attention", &[("q", q), ("k", k), ("v", v)])?;
    shapes::check_cpu("attention", &[("q", q), ("k", k), ("v", v)])?;
    config.spec.check(q.dim(1)?)?;
    op::attention(q, k, v, call, config)
}

/// Whether the op can compute this: on the CPU, unless a mask has a gradient, which an op of three inputs
/// cannot give.
fn op_runs(q: &Tensor, call: &AttentionCall) -> bool {
    q.device().is_cpu() && !call.mask.as_ref().is_some_and(Tensor::track_op)
}
