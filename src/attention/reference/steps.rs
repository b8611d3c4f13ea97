//! The steps of attention as tensor operations, whoever computes the scores.

use crate::Result;
use crate::attention::heads::repeat_heads;
use crate::attention::mask::{apply_tensor, attended, broadcast_mask, keep, masked_softmax};
use crate::attention::shapes::{check_attention, check_float, check_scores};
use crate::attention::visible::Visible;
use crate::attention::{AttentionCall, AttentionConfig, Backend, ScoreConfig};
use candle_core::{DType, Device, Tensor};

const OP: &str = "attention";

/// What computes int8 scores.
pub(super) type Scores<'a> = &'a dyn Fn(&Tensor, &Tensor, &ScoreConfig) -> Result<Tensor>;

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
    let (b, h, m, d) = q.dims4()?;
    let n = k.dim(2)?;
    let spec = &config.spec;
    spec.check(h)?;
    let visible = Visible::new((b, m, n), call, spec)?;
    let scores = match &config.backend {
        Backend::Fp32 => fp32_scores(q, k)?,
        Backend::Int8(int8) => {
            let seen = (&visible, call.mask.as_ref());
            straight_through(q, k, scores_of_seen(int8_scores, (q, k), &int8.scores, seen)?)?
        }
    };
    let mut scores = (scores * f64::from(spec.scale(d)?))?;
    if let Some(cap) = spec.softcap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    if let Some(slopes) = &spec.alibi_slopes {
        scores = scores.broadcast_add(&alibi(&visible, slopes, (b, m, n), q.device())?)?;
    }
    if let Some(mask) = &call.mask {
        scores = apply_tensor(&scores, mask)?;
    }
    if !visible.is_everything() {
        scores = keep(&scores, &visible.to_tensor(b, m, q.device())?)?;
    }
    let logits = spec.sink_logits.as_deref();
    let logits = logits.map(|logits| Tensor::new(logits, q.device())?.reshape((1, h, 1, 1)));
    masked_softmax(&scores, logits.transpose()?.as_ref())
}

/// Int8 scores in which what is not seen takes no part: a query that sees no key, and a key that no query
/// sees, are NaN, which has no influence on other codes, and such keys come after all others, so that they
/// are in no block with them.
fn scores_of_seen(
    int8_scores: Scores<'_>,
    (q, k): (&Tensor, &Tensor),
    config: &ScoreConfig,
    (visible, mask): (&Visible, Option<&Tensor>),
) -> Result<Tensor> {
    let (q, k) = (q.detach(), k.detach());
    if mask.is_none() && visible.is_everything() || q.elem_count() * k.elem_count() == 0 {
        return int8_scores(&q, &k, config);
    }
    let ((b, h, m, _), (_, h_kv, n, _)) = (q.dims4()?, k.dims4()?);
    let mut sees = visible.to_tensor(b, m, q.device())?.broadcast_as((b, h, m, n))?;
    if let Some(mask) = mask {
        sees = (sees * attended(&broadcast_mask(&mask.detach(), &[b, h, m, n])?)?)?;
    }
    let asking = sees.max_keepdim(3)?;
    let seen = sees.max_keepdim(2)?.reshape((b * h_kv, h / h_kv, n))?.max(1)?;
    let (order, back) = seen_first(&seen.to_vec2()?);
    let seen = seen.reshape((b, h_kv, n, 1))?;
    let (q, k) = (nan_unless(&asking, &q)?, nan_unless(&seen, &k)?);
    let Some(order) = order else { return int8_scores(&q, &k, config) };
    let index = |places: Vec<u32>| Tensor::from_vec(places, (b, h_kv, 1, n), k.device());
    let order = index(order)?.t()?.broadcast_as(k.shape())?.contiguous()?;
    let scores = int8_scores(&q, &k.contiguous()?.gather(&order, 2)?, config)?;
    let back = repeat_heads(&index(back)?, h)?.broadcast_as((b, h, m, n))?.contiguous()?;
    Ok(scores.gather(&back, 3)?)
}

/// The keys of each head with those that are seen first, unless that is how they are; and where each is then.
fn seen_first(heads: &[Vec<u8>]) -> (Option<Vec<u32>>, Vec<u32>) {
    let (mut order, mut back) = (Vec::new(), Vec::new());
    let mut is_other = false;
    for seen in heads {
        let first = order.len();
        for wanted in [true, false] {
            order.extend((0..seen.len() as u32).filter(|&key| (seen[key as usize] != 0) == wanted));
        }
        let mut places = vec![0; seen.len()];
        for (place, &key) in order[first..].iter().enumerate() {
            places[key as usize] = place as u32;
            is_other |= place as u32 != key;
        }
        back.extend(places);
    }
    (is_other.then_some(order), back)
}

/// `x` with NaN in the rows that are not marked.
fn nan_unless(marks: &Tensor, x: &Tensor) -> Result<Tensor> {
    let nan = Tensor::new(f32::NAN, x.device())?.to_dtype(x.dtype())?.broadcast_as(x.shape())?;
    Ok(marks.broadcast_as(x.shape())?.where_cond(x, &nan)?)
}

/// `scores` with the gradient of `q·k^T`.
pub(super) fn straight_through(q: &Tensor, k: &Tensor, scores: Tensor) -> Result<Tensor> {
    if !(q.track_op() || k.track_op()) {
        return Ok(scores);
    }
    // Zero, with the gradient of the exact scores.
    let exact = fp32_scores(q, k)?;
    let zero = (&exact - exact.detach())?;
    Ok((scores + zero)?)
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
