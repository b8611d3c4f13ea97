//! Attention from the score op and Candle's tensor operations, with all `M * N` probabilities in
//! memory: the check of the op, and what gives probabilities to look at.

use super::steps::{Scores, attention_with, probs_with};
use super::tensor_ops;
use crate::attention::{
    AttentionCall, AttentionConfig, Backend, RequantConfig, ScoreConfig, attention_scores,
    attention_scores_requantized,
};
use crate::{Error, Result};
use candle_core::{Device, Tensor};

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
