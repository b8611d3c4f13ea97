//! Calls with the signatures and layouts of Candle's own CPU attention: a swap is one line.
//!
//! ```diff
//! -use candle_nn::attention::flash_attn;
//! +use candle_int8_attention::flash_attn;
//! ```

mod varlen;

pub use varlen::flash_attn_varlen_cpu;

use super::dispatch::attention;
use super::heads::same_heads;
use super::mask::{attended, keep};
use super::{AttentionCall, AttentionConfig, AttentionSpec, Causal};
use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::{DType, Tensor, WithDType};
use candle_nn::attention::AttnMask;

const OP: &str = "flash_attn";

/// [`candle_nn::attention::flash_attn`] with int8 scores: the same arguments, layouts and result.
///
/// `q` `(B, S, H, D)`, `k` `(B, N, H_kv, D)`, `v` `(B, N, H_v, Dv)`; `H_kv` and `H_v` divide `H`.
/// The result is `(B, H, S, Dv)`: f32 for one sequence whatever the inputs, as Candle's is, and in
/// the dtype of `q` for a batch. Tensors are read through their strides, never copied whole (but
/// f64 ones, and keys and values of different numbers of heads).
///
/// It does all that Candle's does, with the configuration [`AttentionConfig::int8`], and what
/// Candle's refuses: a batch with a mask tensor, softcap or bf16, `Dv != D`, boolean masks, masks
/// that broadcast or differ between heads, gradients, and devices other than the CPU. `T` is there
/// for the signature; the dtypes of the tensors count.
///
/// * [`AttnMask::Causal`] means what it means in Candle 0.11. One sequence with `S > 1`: query `i`
///   sees keys `j <= i + kv_offset`. One query, and every query of a batch: `kv_offset` is not
///   read, the queries are the last `S` of the `N` keys.
/// * `max_bias` is ALiBi with slopes `2^(-max_bias * (h + 1) / n)`, where `n` is the smallest
///   power of two that is not below `H`. It biases causal attention, and a batch without mask, by
///   distance. A mask tensor is multiplied by the slopes instead, and one sequence without mask has
///   no bias: both as in Candle. `None` and 0 turn it off.
/// * `softcap` bends scores to `softcap * tanh(score / softcap)`; `None` and 0 turn it off.
/// * What has no place in Candle's signature, as sink logits have none, is for
///   [`attention()`](crate::attention()).
/// * In a mask tensor the smallest finite number of its dtype means masked, as minus infinity
///   does. A query that sees no key gives zeros.
///
/// One result differs on purpose. Candle 0.11.1 adds `j - (N - 1)` to the scores of a single f32
/// query with softcap and without `max_bias`, which neither its f16 path nor its path for several
/// queries does.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttnMask, flash_attn};
///
/// let q = Tensor::randn(0f32, 1., (1, 16, 8, 32), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 16, 2, 32), &Device::Cpu)?;
/// let scale = 1.0 / 32f32.sqrt();
/// let ours = flash_attn::<f32>(&q, &kv, &kv, scale, AttnMask::causal(), None, None)?;
/// let candles =
///     candle_nn::attention::flash_attn::<f32>(&q, &kv, &kv, scale, AttnMask::causal(), None, None)?;
/// assert_eq!(ours.dims(), [1, 8, 16, 32]);
/// assert!((ours - candles)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.05);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`attention()`](crate::attention()), whose messages name shapes as `[B, H, S, D]`, and
/// [`Error::Unsupported`] for a boolean mask with `max_bias`.
pub fn flash_attn<T>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    attn_mask: AttnMask,
    max_bias: Option<f32>,
    softcap: Option<f32>,
) -> candle_core::Result<Tensor>
where
    T: WithDType + num_traits::Float,
{
    let heads_first = |name, x| heads_first(OP, name, x);
    let (dtype, q) = (result_dtype(q), heads_first("q", q)?);
    let (k, v) = same_heads(OP, heads_first("k", k)?, heads_first("v", v)?)?;
    let slopes = max_bias.filter(|bias| *bias > 0.0).map(|bias| slopes(bias, q.dims()[1]));
    let (call, alibi_slopes) = positions(attn_mask, slopes, q.dims()[0] == 1, q.dims()[2])?;
    let spec = AttentionSpec {
        softmax_scale: Some(softmax_scale),
        // tanh is odd, so the sign of a cap does not matter.
        softcap: softcap.map(f32::abs).filter(|cap| *cap != 0.0),
        alibi_slopes,
        ..AttentionSpec::default()
    };
    attention(&q, &k, &v, call, &AttentionConfig { spec, ..AttentionConfig::int8() })?
        .to_dtype(dtype)
}

/// The dtype of Candle's result.
fn result_dtype(q: &Tensor) -> DType {
    match q.dims().first() {
        Some(1) => DType::F32,
        _ => q.dtype(),
    }
}

/// `(B, S, H, D)` seen as `[B, H, S, D]`, in a dtype that `attention` reads.
fn heads_first(op: &'static str, tensor: &'static str, x: &Tensor) -> Result<Tensor> {
    if x.rank() != 4 {
        let shape = x.dims().to_vec();
        return Err(Error::Rank { op, tensor, shape, expected: "(B, S, H, D)" });
    }
    check_size(op, tensor, x.dims())?;
    let x = x.transpose(1, 2)?;
    Ok(if x.dtype() == DType::F64 { x.to_dtype(DType::F32)? } else { x })
}

/// Candle's ALiBi slopes: powers of `2^(-max_bias / n)`, `n` a power of two.
fn slopes(max_bias: f32, heads: usize) -> Vec<f32> {
    let n = heads.next_power_of_two() as f32;
    (1..=heads).map(|head| (-max_bias * head as f32 / n).exp2()).collect()
}

/// Which keys the queries see, and the slopes that bias the scores.
fn positions(
    mask: AttnMask,
    slopes: Option<Vec<f32>>,
    one_sequence: bool,
    queries: usize,
) -> Result<(AttentionCall, Option<Vec<f32>>)> {
    Ok(match (mask, slopes) {
        (AttnMask::Causal { kv_offset }, slopes) if one_sequence && queries > 1 => {
            (Causal::Offset(kv_offset).into(), slopes)
        }
        (AttnMask::Causal { .. }, slopes) => (AttentionCall::causal(), slopes),
        (AttnMask::None, slopes) => (AttentionCall::default(), slopes.filter(|_| !one_sequence)),
        (AttnMask::Mask(mask), None) => (AttentionCall::default().with_mask(mask), None),
        (AttnMask::Mask(mask), Some(slopes)) => {
            (AttentionCall::default().with_mask(scaled(&mask, slopes)?), None)
        }
    })
}

/// A mask for each head, multiplied by the head's slope: `[.., H, S, N]` in f32.
fn scaled(mask: &Tensor, slopes: Vec<f32>) -> Result<Tensor> {
    if !mask.dtype().is_float() {
        return Err(Error::Unsupported(format!(
            "max_bias with a mask of dtype {:?}: slopes multiply an additive mask, expected a float",
            mask.dtype()
        )));
    }
    check_size(OP, "the mask", mask.dims())?;
    // The smallest number would no longer mean masked after the multiplication.
    let attended = attended(mask)?;
    let slopes = Tensor::from_vec(slopes, ((), 1, 1), mask.device())?;
    let shape = mask.shape().broadcast_shape_binary_op(slopes.shape(), OP)?;
    check_size(OP, "the mask, one for each head,", shape.dims())?;
    let scaled = mask.to_dtype(DType::F32)?.broadcast_mul(&slopes)?;
    keep(&scaled, &attended)
}
