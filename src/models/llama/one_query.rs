//! Attention of one fp32 query to the cache, which is what each new token asks for.
//!
//! Tensor operations would copy and repeat the keys of all tokens for it, and Candle's flash
//! attention keeps threads of its own spinning, which then are in the way of rayon's.

use crate::quant::rows::{Rows, dots};
use crate::simd::widest;
use crate::{AttentionConfig, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// The first `len` tokens of a buffer `[B, H_kv, capacity, D]`.
pub(super) struct Tokens<'a> {
    pub data: &'a [f32],
    pub capacity: usize,
    pub len: usize,
}

impl Tokens<'_> {
    /// The tokens of head `head` of all sequences, `[len, depth]`.
    fn head(&self, head: usize, depth: usize) -> &[f32] {
        &self.data[head * self.capacity * depth..][..self.len * depth]
    }
}

/// `q` `[B, H, 1, D]` to `[B, H, 1, D]`; the query sees all tokens.
pub(super) fn attention(
    (q, [b, heads, depth]): (&[f32], [usize; 3]),
    keys: &Tokens<'_>,
    values: &Tokens<'_>,
    kv_heads: usize,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let scale = config.spec.softmax_scale.unwrap_or(1.0 / (depth as f32).sqrt());
    let group = heads / kv_heads * depth;
    let mut out = vec![0f32; b * heads * depth];
    out.par_chunks_mut(group).zip(q.par_chunks(group)).enumerate().for_each(|(head, (out, q))| {
        let mut probs = vec![0f32; keys.len];
        for (out, q) in out.chunks_exact_mut(depth).zip(q.chunks_exact(depth)) {
            let keys = Rows::contiguous(keys.head(head, depth), depth);
            dots(keys, None, q, &mut probs);
            softmax(&mut probs, scale, config.spec.softcap);
            let values = values.head(head, depth);
            widest!(weighted_sum, (&probs[..], values, out), (&[f32], &[f32], &mut [f32]) => ());
        }
    });
    Ok(Tensor::from_vec(out, (b, heads, 1, depth), &Device::Cpu)?)
}

/// Scores to probabilities.
fn softmax(scores: &mut [f32], scale: f32, softcap: Option<f32>) {
    for score in scores.iter_mut() {
        *score *= scale;
        if let Some(cap) = softcap {
            *score = cap * (*score / cap).tanh();
        }
    }
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// `out = sum of weights[i] * rows[i]`.
#[inline(always)]
fn weighted_sum((weights, rows, out): (&[f32], &[f32], &mut [f32])) {
    out.fill(0.0);
    for (weight, row) in weights.iter().zip(rows.chunks_exact(out.len().max(1))) {
        for (out, x) in out.iter_mut().zip(row) {
            *out += weight * x;
        }
    }
}
