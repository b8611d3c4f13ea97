//! Attention from the score op and Candle's tensor operations, with all `M * N` probabilities in
//! memory: the check of the fused op, the fp32 backend, and what gives probabilities to look at.

use super::tensor_ops::{self, repeat_heads};
use crate::attention::mask::{apply_tensor, keep, masked_softmax};
use crate::attention::shapes::{check_attention, check_float, check_scores};
use crate::attention::visible::Visible;
use crate::attention::{
    AttentionCall, AttentionConfig, Backend, RequantConfig, ScoreConfig, attention_scores,
    attention_scores_requantized,
};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

const OP: &str = "attention";

/// What computes int8 scores.
pub(super) type Scores<'a> = &'a dyn Fn(&Tensor, &Tensor, &ScoreConfig) -> Result<Tensor>;

/// The kernels are on the CPU.
fn scores_of(device: &Device) -> Scores<'static> {
    if device.is_cpu() { &attention_scores } else { &tensor_ops::attention_scores }
}

/// [`attention`](crate::attention()) without the fused op, in both backends, on any device.
/// Probabilities and values are f32 here whatever the P·V precision.
///
/// # Errors
/// Those of [`attention`](crate::attention()).
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
) -> Result<Tensor> {
    attention_with(scores_of(q.device()), q, k, v, &call.into(), config)
}

/// [`attention`] in int8 with scores that went through int8 themselves:
/// [`attention_scores_requantized`].
///
/// # Errors
/// Those of [`attention`] and of
/// [`attention_scores_int8`](crate::attention::attention_scores_int8), and [`Error::Contradiction`] for an fp32
/// configuration.
pub fn attention_requantized(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
    to: &RequantConfig,
) -> Result<Tensor> {
    check_int8(config)?;
    attention_with(&requantized(to), q, k, v, &call.into(), config)
}

/// The attention probabilities `softmax(scale * q·k^T + mask)`, f32 `[B, H, M, N]`; arguments as
/// for [`attention`].
///
/// # Errors
/// Those of [`attention`].
pub fn attention_probs(
    q: &Tensor,
    k: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
) -> Result<Tensor> {
    probs_with(scores_of(q.device()), q, k, &call.into(), config)
}

/// The probabilities of [`attention_requantized`].
///
/// # Errors
/// Those of [`attention_requantized`].
pub fn attention_probs_requantized(
    q: &Tensor,
    k: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
    to: &RequantConfig,
) -> Result<Tensor> {
    check_int8(config)?;
    probs_with(&requantized(to), q, k, &call.into(), config)
}

fn check_int8(config: &AttentionConfig) -> Result<()> {
    match &config.backend {
        Backend::Int8(_) => Ok(()),
        Backend::Fp32 => Err(Error::Contradiction("requantized scores in fp32 attention".into())),
    }
}

fn requantized(to: &RequantConfig) -> impl Fn(&Tensor, &Tensor, &ScoreConfig) -> Result<Tensor> {
    move |q, k, config| match q.device().is_cpu() {
        true => attention_scores_requantized(q, k, config, to),
        false => tensor_ops::attention_scores_requantized(q, k, config, to),
    }
}

/// [`attention`] with int8 scores from `scores`.
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

fn probs_with(
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
    if b * h * m * n * d == 0 {
        return Ok(Tensor::zeros((b, h, m, n), DType::F32, q.device())?);
    }
    Ok(q.matmul(&k.t()?)?)
}
