//! Attention from the score op and Candle's tensor operations.

use super::config::{AttentionConfig, Backend, ScoreOutput};
use super::mask::{apply_mask, masked_softmax};
use super::scores::attention_scores;
use super::shapes::{check_attention, check_float, check_scores};
use super::tensor_ops::repeat_heads;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::attention::AttnMask;

const OP: &str = "attention";

/// `softmax(scale * q·k^T + mask)·v` with the backend that `config` names.
///
/// `q` `[B, H, M, D]`, `k` `[B, H_kv, N, D]`, `v` `[B, H_kv, N, Dv]`, each f32, f16 or bf16 with
/// any strides; `H_kv` divides `H`. The result is `[B, H, M, Dv]` in the dtype of `q`.
///
/// Masks are Candle's own: [`AttnMask::None`]; [`AttnMask::Causal`], where query `i` attends to
/// keys `j <= i + kv_offset`; or a tensor that broadcasts to `[B, H, M, N]`, U8 (boolean, non-zero
/// = attend) or float (added to the scaled scores). Minus infinity and the smallest finite number
/// of the mask's dtype both mean masked. A query with every key masked gives zeros.
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
/// Those of [`attention_scores`]; [`Error::Shape`] for a `v` or a mask that does not fit;
/// [`Error::DType`] for a mask that is neither U8 nor float; [`Error::Config`] if the score
/// configuration asks for integers instead of f32 scores.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttnMask,
    config: &AttentionConfig,
) -> Result<Tensor> {
    check_attention(OP, q.dims(), k.dims(), v.dims())?;
    check_float(OP, &[("v", v)])?;
    let v = repeat_heads(&v.to_dtype(DType::F32)?, q.dim(1)?)?.contiguous()?;
    let probs = attention_probs(q, k, mask, config)?;
    if probs.elem_count() == 0 || v.elem_count() == 0 {
        let (b, h, m, _) = q.dims4()?;
        return Ok(Tensor::zeros((b, h, m, v.dim(3)?), q.dtype(), q.device())?);
    }
    Ok(probs.matmul(&v)?.to_dtype(q.dtype())?)
}

/// The attention probabilities `softmax(scale * q·k^T + mask)`, f32 `[B, H, M, N]`; arguments as
/// for [`attention`].
///
/// # Errors
/// Those of [`attention`].
pub fn attention_probs(
    q: &Tensor,
    k: &Tensor,
    mask: &AttnMask,
    config: &AttentionConfig,
) -> Result<Tensor> {
    check_scores(OP, q.dims(), k.dims())?;
    check_float(OP, &[("q", q), ("k", k)])?;
    let scores = match &config.backend {
        Backend::Fp32 => fp32_scores(q, k)?,
        Backend::Int8(int8) => match int8.scores.output {
            ScoreOutput::Dequantized | ScoreOutput::Requantized(_) => {
                attention_scores(q, k, &int8.scores)?
            }
            ScoreOutput::Int32 | ScoreOutput::Int8(_) => {
                return Err(Error::Config(format!(
                    "score output {:?} inside attention, expected Dequantized or Requantized",
                    int8.scores.output
                )));
            }
        },
    };
    let scale = config.softmax_scale.unwrap_or(1.0 / (q.dim(3)?.max(1) as f32).sqrt());
    if !scale.is_finite() {
        return Err(Error::Config(format!("softmax scale {scale}, expected a finite number")));
    }
    masked_softmax(&apply_mask(&(scores * f64::from(scale))?, mask)?)
}

fn fp32_scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let k = repeat_heads(&k.to_dtype(DType::F32)?, q.dim(1)?)?.contiguous()?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    let ((b, h, m, d), n) = (q.dims4()?, k.dim(2)?);
    if b * h * m * n * d == 0 {
        return Ok(Tensor::zeros((b, h, m, n), DType::F32, q.device())?);
    }
    Ok(q.matmul(&k.t()?)?)
}
