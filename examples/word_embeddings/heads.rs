//! One attention block computed by one path, and what two paths differ in, head by head.

use crate::common::extremes::ascending;
use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_int8_attention::attention::attention_probs;
use candle_int8_attention::drift::{Candidate, Drift, ProbabilityDrift};
use candle_int8_attention::models::{EncoderModel, LayeredModel};
use candle_int8_attention::{AttentionCall, AttentionConfig, Backend, attention};
use rayon::prelude::*;
use serde::Serialize;

/// Queries, keys and values `[1, H, N, D]`.
pub struct Qkv {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    /// What the model asks of their attention, such as a window.
    pub config: AttentionConfig,
}

impl Qkv {
    /// What enters the attention of a layer, whose input is `hidden`, and what leaves the layer.
    pub fn of(model: &EncoderModel, layer: usize, hidden: &Tensor) -> Result<(Self, Tensor)> {
        let config = model.attention()[layer].config();
        let mut block = None;
        let output = model.layer(layer, hidden, &mut |q, k, v, call| {
            let (q_, k_, v_) = (q.clone(), k.clone(), v.clone());
            block = Some(Self { q: q_, k: k_, v: v_, config: config.clone() });
            attention(q, k, v, call, config)
        })?;
        Ok((block.context("a layer without attention")?, output))
    }
}

/// What one path makes of them.
pub struct Path {
    /// `[1, H, N, N]`
    pub probs: Tensor,
    /// `[1, H, N, D]`
    pub output: Tensor,
}

impl Path {
    /// Runs the block in fp32 without a mask: one text, no padding, every token sees every token, or those in
    /// the window of its layer.
    pub fn fp32(block: &Qkv) -> Result<Self> {
        let Qkv { q, k, v, config } = block;
        let config = config.with_backend(Backend::Fp32);
        Ok(Self {
            probs: attention_probs(q, k, AttentionCall::default(), &config)?,
            output: attention(q, k, v, AttentionCall::default(), &config)?,
        })
    }

    /// The same in int8.
    pub fn int8(block: &Qkv, candidate: &Candidate) -> Result<Self> {
        let call = AttentionCall::default();
        let Qkv { q, k, v, config } = block;
        Ok(Self {
            probs: candidate.probabilities((q, k), &call, config)?,
            output: candidate.attention((q, k, v), &call, config)?,
        })
    }
}

/// What int8 changes in one head.
#[derive(Debug, Clone, Serialize)]
pub struct HeadDrift {
    pub head: usize,
    #[serde(flatten)]
    pub output: Drift,
    pub probabilities: ProbabilityDrift,
}

/// The drift of every head.
pub fn drift_per_head(fp32: &Path, int8: &Path) -> Result<Vec<HeadDrift>> {
    let (_, heads, tokens, dim) = fp32.output.dims4()?;
    let (p, q) = (flat(&fp32.probs)?, flat(&int8.probs)?);
    let (a, b) = (flat(&fp32.output)?, flat(&int8.output)?);
    let of_head = |head: usize| {
        let probs = head * tokens * tokens..(head + 1) * tokens * tokens;
        let output = head * tokens * dim..(head + 1) * tokens * dim;
        Ok(HeadDrift {
            head,
            output: Drift::of_outputs(&a[output.clone()], &b[output])?,
            probabilities: ProbabilityDrift::of_rows(&p[probs.clone()], &q[probs], tokens.max(1))?,
        })
    };
    (0..heads).into_par_iter().map(of_head).collect()
}

/// The head with the lowest signal-to-noise ratio.
pub fn worst_head(heads: &[HeadDrift]) -> Option<&HeadDrift> {
    heads.iter().min_by(|a, b| ascending(a.output.sqnr_db, b.output.sqnr_db))
}

/// The numbers of a tensor in row-major order.
pub fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
