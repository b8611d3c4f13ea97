//! Who computes attention: the fused op where it can, tensor operations elsewhere.

use super::reference::unfused;
use super::{AttentionCall, AttentionConfig, op, shapes};
use crate::Result;
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
/// What is finite in fp32 attention is finite here, up to queries, keys, values and scores of `f32::MAX`. A query
/// or key that holds NaN or infinity makes its own scores NaN, and no others.
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
/// Those of [`attention_scores`](super::attention_scores); [`Error::Shape`](crate::Error::Shape) for a `v` or a
/// mask that does not fit; [`Error::DType`](crate::Error::DType) for a mask that is neither U8 nor float;
/// [`Error::Mismatch`](crate::Error::Mismatch) for lengths, positions, slopes or sink logits that do not match
/// the shapes; [`Error::Shape`](crate::Error::Shape) for more elements than memory has addresses;
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a scale, softcap, slope or sink logit that
/// makes no sense; [`Error::Unsupported`](crate::Error::Unsupported) for a precision of P·V for which this
/// machine has no instruction.
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
