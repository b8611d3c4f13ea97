//! x
mod config;
mod mask;
mod module;
use crate::Result;
use candle_core::Tensor;
use candle_nn::attention::AttnMask;
pub use config::*;
pub use mask::{apply_mask, masked_softmax};
pub use module::QuantizedAttention;

/// STUB until the int8 path is there: computes in fp32 whatever the backend
pub fn attention_probs(
    q: &Tensor,
    k: &Tensor,
    mask: &AttnMask,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let scale = config.softmax_scale.unwrap_or(1.0 / (q.dim(3)? as f32).sqrt());
    let s = (q.contiguous()?.matmul(&k.contiguous()?.t()?)? * scale as f64)?;
    masked_softmax(&apply_mask(&s, mask)?)
}
/// STUB
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttnMask,
    config: &AttentionConfig,
) -> Result<Tensor> {
    Ok(attention_probs(q, k, mask, config)?.matmul(&v.contiguous()?)?)
}
