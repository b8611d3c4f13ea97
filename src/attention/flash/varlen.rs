//! Sequences of different lengths, packed one after the other without padding.

use crate::attention::dispatch::attention;
use crate::attention::heads::same_heads;
use crate::attention::{AttentionCall, AttentionConfig, AttentionSpec};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "flash_attn_varlen_cpu";

/// [`candle_nn::attention::flash_attn_varlen_cpu`] with int8 scores: the same arguments, layouts
/// and result.
///
/// `q` `[total_q, H, D]`, `k` `[total_k, H_kv, D]` and `v` `[total_k, H_v, Dv]` hold the sequences
/// one after the other; `seqlens_q` and `seqlens_k` `[B]` are their lengths (U32), which may be 0.
/// `alibi_slopes` `[H]`. The result is `[total_q, H, Dv]` in the dtype of `q`.
///
/// The queries of a sequence are the last of its keys: with `causal`, or with `window_left` alone,
/// query `i` sees keys `j <= i + N - M`, and with `window_left` those with `j >= i + N - M -
/// window_left`. A query that sees no key gives zeros.
///
/// Beyond Candle's it takes bf16, `Dv != D`, tensors of different dtypes, more queries than keys
/// under a causal mask (the first of them see nothing), `window_right` without `window_left` (no
/// limit to the left; Candle gives zeros), gradients, and devices other than the CPU. The maximal
/// lengths are not read, as in Candle.
///
/// # Errors
/// Those of [`attention()`](crate::attention()), and [`Error::Shape`] for tensors that do not fit the
/// lengths.
#[expect(clippy::too_many_arguments, reason = "Candle's signature")]
pub fn flash_attn_varlen_cpu(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    alibi_slopes: Option<&Tensor>,
    seqlens_q: &Tensor,
    seqlens_k: &Tensor,
    _max_seqlen_q: usize,
    _max_seqlen_k: usize,
    softmax_scale: f32,
    causal: bool,
    window_left: Option<usize>,
    window_right: Option<usize>,
) -> candle_core::Result<Tensor> {
    let tokens_first = |name, x: &Tensor| match x.rank() {
        3 => Ok(x.transpose(0, 1)?.unsqueeze(0)?),
        _ => Err(Error::shape(OP, name, x.dims(), "[total, H, D]")),
    };
    let (queries, keys) =
        (ranges("seqlens_q", seqlens_q, q, "q")?, ranges("seqlens_k", seqlens_k, k, "k")?);
    if queries.len() != keys.len() {
        let expected = format!("[{}] like seqlens_q", queries.len());
        Err(Error::shape(OP, "seqlens_k", &[keys.len()], expected))?;
    }
    if v.dims().first() != k.dims().first() {
        let expected = format!("as many tokens as k {:?}", k.dims());
        Err(Error::shape(OP, "v", v.dims(), expected))?;
    }
    let all_q = tokens_first("q", q)?;
    let (k, v) = same_heads(OP, tokens_first("k", k)?, tokens_first("v", v)?)?;
    let slopes = alibi_slopes.map(|slopes| slopes.to_dtype(DType::F32)?.to_vec1()).transpose()?;
    // A window to the left alone ends at the query.
    let ends_at_query = causal || (window_left.is_some() && window_right.is_none());
    let spec = AttentionSpec {
        softmax_scale: Some(softmax_scale),
        alibi_slopes: slopes,
        window_left,
        window_right: if ends_at_query { Some(0) } else { window_right },
        ..AttentionSpec::default()
    };
    let config = AttentionConfig { spec, ..AttentionConfig::int8() };
    let sequence = |(queries, keys): (Range<usize>, Range<usize>)| -> Result<Tensor> {
        let of = |x: &Tensor, tokens: &Range<usize>| x.narrow(2, tokens.start, tokens.len());
        let (k, v) = (of(&k, &keys)?, of(&v, &keys)?);
        attention(&of(&all_q, &queries)?, &k, &v, AttentionCall::default(), &config)
    };
    let sequences: Vec<_> = queries.into_iter().zip(keys).collect();
    let outputs = sequences.into_par_iter().map(sequence).collect::<Result<Vec<_>>>()?;
    match outputs.as_slice() {
        [] => {
            let (heads, value_dim) = (all_q.dim(1)?, v.dim(3)?);
            Tensor::zeros((0, heads, value_dim), q.dtype(), q.device())
        }
        outputs => Tensor::cat(outputs, 2)?.squeeze(0)?.transpose(0, 1)?.contiguous(),
    }
}

/// Where each sequence lies.
fn ranges(
    name: &'static str,
    lens: &Tensor,
    packed: &Tensor,
    packed_name: &'static str,
) -> Result<Vec<Range<usize>>> {
    let lens = lens.to_dtype(DType::U32)?.to_vec1::<u32>()?;
    let mut end = 0usize;
    let mut ranges = Vec::with_capacity(lens.len());
    for len in lens {
        ranges.push(end..end + len as usize);
        end += len as usize;
    }
    if packed.dims().first() != Some(&end) {
        let expected = format!("[{end}, H, D], because {name} sums up to {end}");
        return Err(Error::shape(OP, packed_name, packed.dims(), expected));
    }
    Ok(ranges)
}
