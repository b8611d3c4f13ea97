//! The steps of attention as tensor operations, whoever computes the scores.

use crate::Result;
use crate::attention::mask::{apply_tensor, keep, masked_softmax};
use crate::attention::shapes::{check_attention, check_float, check_scores};
use crate::attention::visible::Visible;
use crate::attention::{AttentionCall, AttentionConfig, Backend, ScoreConfig};
use candle_core::{DType, Device, Tensor};

const OP: &str = "attention";

/// What computes int8 scores.
pub(super) type Scores<'a> = &'a dyn Fn(&Tensor, &Tensor, &ScoreConfig) -> Result<Tensor>;

/// Repeats every head of `x` `[B, H_kv, S, D]` for the query heads that share it.
pub(crate) fn repeat_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, h_kv, s, d) = x.dims4()?;
    if h_kv == heads {
        return Ok(x.clone());
    }
    let group = heads / h_kv;
    let grouped = x.unsqueeze(2)?.expand((b, h_kv, group, s, d))?;
    Ok(grouped.reshape((b, heads, s, d))?)
}

/// Attention with int8 scores from `scores`.
pub(super) fn attention_with(
    scores: Scores<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: &AttentionCall,
    config: &AttentionConfig,
) -> Result<Tensor> {
    check_attention(OP, q.dims(), k.dims(), v.dims())?;
    check_float(OP, &[("v", v)])?;
    let v = repeat_heads(&v.to_dtype(DType::F32)?, q.dim(1)?)?.contiguous()?;
    let probs = probs_with(scores, q, k, call, config)?;
    if probs.elem_count() == 0 || v.elem_count() == 0 {
        let (b, h, m, _) = q.dims4()?;
        return Ok(Tensor::zeros((b, h, m, v.dim(3)?), q.dtype(), q.device())?);
    }
    Ok(probs.matmul(&v)?.to_dtype(q.dtype())?)
}

/// The probabilities of attention with int8 scores from `int8_scores`, f32 `[B, H, M, N]`.
pub(super) fn probs_with(
    int8_scores: Scores<'_>,
    q: &Tensor,
    k: &Tensor,
    call: &AttentionCall,
    config: &AttentionConfig,
) -> Result<Tensor> {
    check_scores(OP, q.dims(), k.dims())?;
    check_float(OP, &[("q", q), ("k", k)])?;
    let scores = match &config.backend {
        Backend::Fp32 => fp32_scores(q, k)?,
        Backend::Int8(int8) => int8_scores(q, k, &int8.scores)?,
    };
    let (b, h, m, d) = q.dims4()?;
    let n = k.dim(2)?;
    let spec = &config.spec;
    spec.check(h)?;
    let mut scores = (scores * f64::from(spec.scale(d)?))?;
    if let Some(cap) = spec.softcap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    let visible = Visible::new((b, m, n), call, spec)?;
    if let Some(slopes) = &spec.alibi_slopes {
        scores = scores.broadcast_add(&alibi(&visible, slopes, (b, m, n), q.device())?)?;
    }
    if let Some(mask) = &call.mask {
        scores = apply_tensor(&scores, mask)?;
    }
    if !visible.is_everything() {
        scores = keep(&scores, &visible.to_tensor(b, m, q.device())?)?;
    }
    masked_softmax(&scores)
}

/// `-slope * |position - key|`, `[B, H, M, N]`, or `[1, H, M, N]` where all sequences have the same.
fn alibi(
    visible: &Visible,
    slopes: &[f32],
    (b, m, n): (usize, usize, usize),
    device: &Device,
) -> Result<Tensor> {
    let sequences = if visible.is_one_for_all() { 1 } else { b };
    let mut distances = Vec::with_capacity(sequences * m * n);
    for (sequence, query) in (0..sequences).flat_map(|b| (0..m).map(move |query| (b, query))) {
        let position = visible.position(sequence, query);
        let distance = |key: usize| (position - key as isize).unsigned_abs() as f32;
        distances.extend((0..n).map(|key| -distance(key)));
    }
    let distances = Tensor::from_vec(distances, (sequences, 1, m, n), device)?;
    let slopes = Tensor::new(slopes, device)?.reshape((1, slopes.len(), 1, 1))?;
    Ok(distances.broadcast_mul(&slopes)?)
}

/// `q·k^T` in f32.
pub(super) fn fp32_scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let k = repeat_heads(&k.to_dtype(DType::F32)?, q.dim(1)?)?.contiguous()?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    let ((b, h, m, d), n) = (q.dims4()?, k.dim(2)?);
    if [b, h, m, n, d].contains(&0) {
        return Ok(Tensor::zeros((b, h, m, n), DType::F32, q.device())?);
    }
    Ok(q.matmul(&k.t()?)?)
}
