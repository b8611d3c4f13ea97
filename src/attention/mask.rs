//! Masks on scores, and the softmax that survives a row in which everything is masked.

use crate::{Error, Result};
use candle_core::{D, DType, Tensor};

/// The smallest finite number of a mask's dtype. Hugging Face models write it where they mean
/// minus infinity, so both count as masked.
fn masked_below(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => half::f16::MIN.to_f64(),
        DType::BF16 => half::bf16::MIN.to_f64(),
        DType::F64 => f64::MIN,
        _ => f64::from(f32::MIN),
    }
}

/// Applies a mask tensor to f32 `scores` `[B, H, M, N]`: masked scores become minus infinity
/// whatever they were (NaN included), an additive mask is added to the others.
///
/// # Errors
/// [`Error::Shape`] if the mask does not broadcast to the scores, [`Error::DType`] if it is
/// neither U8 (boolean, non-zero = attend) nor a float (additive).
pub(crate) fn apply_tensor(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let mask = broadcast_mask(mask, scores.dims())?;
    let attended = attended(&mask)?;
    match mask.dtype() {
        DType::U8 => keep(scores, &attended),
        _ => keep(&(scores + mask.to_dtype(DType::F32)?)?, &attended),
    }
}

/// 1 where `mask` lets a score through, 0 where it masks it. A NaN masks nothing: the score becomes NaN.
///
/// # Errors
/// [`Error::DType`] if it is neither U8 (boolean) nor a float (additive).
pub(crate) fn attended(mask: &Tensor) -> Result<Tensor> {
    match mask.dtype() {
        DType::U8 => Ok(mask.ne(0u8)?),
        DType::F32 | DType::F16 | DType::BF16 | DType::F64 => {
            Ok(mask.le(masked_below(mask.dtype()))?.eq(0u8)?)
        }
        dtype => Err(unsupported(dtype)),
    }
}

/// `scores` where `attended` (U8, broadcasts) is not 0, minus infinity elsewhere.
pub(crate) fn keep(scores: &Tensor, attended: &Tensor) -> Result<Tensor> {
    let masked = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(scores.shape())?;
    Ok(attended.broadcast_as(scores.shape())?.where_cond(scores, &masked)?)
}

pub(crate) fn unsupported(dtype: DType) -> Error {
    Error::DType {
        op: "attention",
        tensor: "mask",
        dtype,
        expected: "U8 (boolean, non-zero = attend) or a float (additive)",
    }
}

/// The mask as a view of shape `[B, H, M, N]`, not a copy.
pub(crate) fn broadcast_mask(mask: &Tensor, scores: &[usize]) -> Result<Tensor> {
    if !matches!(mask.dtype(), DType::U8 | DType::F32 | DType::F16 | DType::BF16 | DType::F64) {
        return Err(unsupported(mask.dtype()));
    }
    mask.broadcast_as(scores).map_err(|_| {
        let expected = format!("something that broadcasts to the scores {scores:?}");
        Error::shape("attention", "mask", mask.dims(), expected)
    })
}

/// Softmax over the last dimension of `[B, H, M, N]`, where each head may have a logit beside its scores,
/// `[1, H, 1, 1]`. A row of minus infinities gives zeros, not NaN.
///
/// # Errors
/// Candle's own, on an unsupported dtype.
pub(crate) fn masked_softmax(scores: &Tensor, sink_logits: Option<&Tensor>) -> Result<Tensor> {
    if scores.elem_count() == 0 {
        return Ok(scores.zeros_like()?);
    }
    // A row without any key has maximum -inf; -inf - (-inf) would be NaN. The clamp keeps NaN.
    let mut max = scores.max_keepdim(D::Minus1)?;
    if let Some(logits) = sink_logits {
        max = max.broadcast_maximum(logits)?;
    }
    let max = max.maximum(f64::from(f32::MIN))?;
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let mut sum = exp.sum_keepdim(D::Minus1)?;
    if let Some(logits) = sink_logits {
        sum = (sum + logits.broadcast_sub(&max)?.exp()?)?;
    }
    Ok(exp.broadcast_div(&sum.maximum(f64::from(f32::MIN_POSITIVE))?)?)
}
