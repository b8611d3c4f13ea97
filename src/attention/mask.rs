//! Masks on scores, and the softmax that survives a row in which everything is masked.

use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::attention::AttnMask;

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

/// `keep[i, j] = j <= i + kv_offset`, U8, `[M, N]`.
fn causal(m: usize, n: usize, kv_offset: usize, device: &Device) -> Result<Tensor> {
    let keep: Vec<u8> = (0..m)
        .flat_map(|i| (0..n).map(move |j| u8::from(j <= i.saturating_add(kv_offset))))
        .collect();
    Ok(Tensor::from_vec(keep, (m, n), device)?)
}

/// Applies `mask` to f32 `scores` `[B, H, M, N]`: masked scores become minus infinity whatever
/// they were (NaN included), an additive mask is added to the others.
///
/// # Errors
/// [`Error::Shape`] if a mask tensor does not broadcast to the scores, [`Error::DType`] if it is
/// neither U8 (boolean, non-zero = attend) nor a float (additive).
pub fn apply_mask(scores: &Tensor, mask: &AttnMask) -> Result<Tensor> {
    let (_, _, m, n) = scores.dims4()?;
    let (keep, scores) = match mask {
        AttnMask::None => return Ok(scores.clone()),
        AttnMask::Causal { kv_offset } => {
            (causal(m, n, *kv_offset, scores.device())?, scores.clone())
        }
        AttnMask::Mask(mask) => match mask.dtype() {
            DType::U8 => (mask.ne(0u8)?, scores.clone()),
            DType::F32 | DType::F16 | DType::BF16 | DType::F64 => {
                let keep = mask.gt(masked_below(mask.dtype()))?;
                let wide = broadcast(&mask.to_dtype(DType::F32)?, scores)?;
                (keep, (scores + wide)?)
            }
            dtype => {
                return Err(Error::DType {
                    op: "attention",
                    tensor: "mask",
                    dtype,
                    expected: "U8 (boolean, non-zero = attend) or a float (additive)",
                });
            }
        },
    };
    let masked = Tensor::new(f32::NEG_INFINITY, scores.device())?.broadcast_as(scores.shape())?;
    Ok(broadcast(&keep, &scores)?.where_cond(&scores, &masked)?)
}

fn broadcast(mask: &Tensor, scores: &Tensor) -> Result<Tensor> {
    mask.broadcast_as(scores.shape()).map_err(|_| Error::Shape {
        op: "attention",
        tensor: "mask",
        shape: mask.dims().to_vec(),
        expected: format!("something that broadcasts to the scores {:?}", scores.dims()),
    })
}

/// Softmax over the last dimension. A row of minus infinities gives zeros, not NaN.
///
/// # Errors
/// Candle's own, on an unsupported dtype.
pub fn masked_softmax(scores: &Tensor) -> Result<Tensor> {
    if scores.elem_count() == 0 {
        return Ok(scores.zeros_like()?);
    }
    // A row without any key has maximum -inf; -inf - (-inf) would be NaN. The clamp keeps NaN.
    let max = scores.max_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN))?;
    let exp = scores.broadcast_sub(&max)?.exp()?;
    let sum = exp.sum_keepdim(D::Minus1)?.maximum(f64::from(f32::MIN_POSITIVE))?;
    Ok(exp.broadcast_div(&sum)?)
}
