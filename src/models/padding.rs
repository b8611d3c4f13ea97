//! Masks of padding, as tokenizers give them, on their way to attention.

use crate::attention::AttentionCall;
use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use candle_nn::attention::AttnMask;

/// `attention_mask` `[B, N]` (1 = token, 0 = padding, any integer or float dtype) as a boolean
/// mask over keys, `[B, 1, 1, N]`.
///
/// # Errors
/// [`Error::Shape`] unless it has rank 2.
pub fn padding_mask(attention_mask: &Tensor) -> Result<AttnMask> {
    let (b, n) = dims2("padding_mask", attention_mask)?;
    let keep = attention_mask.to_dtype(DType::F32)?.ne(0f32)?;
    Ok(AttnMask::Mask(keep.reshape((b, 1, 1, n))?))
}

/// The same for keys and queries, where padding follows the tokens: it has no part in their numbers then.
pub(super) fn padding_call(attention_mask: &Tensor) -> Result<AttentionCall> {
    let call = AttentionCall::from(padding_mask(attention_mask)?);
    let rows = attention_mask.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let len = |row: &Vec<f32>| {
        let tokens = row.iter().take_while(|x| **x != 0.0).count();
        row[tokens..].iter().all(|x| *x == 0.0).then_some(tokens)
    };
    let lens: Option<Vec<usize>> = rows.iter().map(len).collect();
    Ok(match lens {
        Some(lens) => call.with_q_lens(lens),
        None => call,
    })
}

/// `[B, N]`.
///
/// # Errors
/// [`Error::Shape`] for a mask of another rank, and more elements than memory has addresses.
pub(super) fn dims2(op: &'static str, mask: &Tensor) -> Result<(usize, usize)> {
    match *mask.dims() {
        [b, n] => {
            check_size(op, "attention_mask", &[b, n])?;
            Ok((b, n))
        }
        ref shape => {
            let (shape, expected) = (shape.to_vec(), "[B, N]".to_string());
            Err(Error::Shape { op, tensor: "attention_mask", shape, expected })
        }
    }
}
