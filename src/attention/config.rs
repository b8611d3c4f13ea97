//! What can be chosen: how scores are quantized, what leaves the op, which backend computes.

use crate::quant::{Granularity, QuantConfig, Scheme};

/// How `attention_scores` quantizes, and what it returns.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreConfig {
    /// How the queries are quantized.
    pub q: QuantConfig,
    /// How the keys are quantized.
    pub k: QuantConfig,
    /// Subtract from the keys their mean over tokens before quantizing, and add `q·mean(K)` back
    /// to every row of scores.
    pub smooth_k: bool,
    /// Subtract from the queries their mean over tokens before quantizing, and add
    /// `mean(Q)·k` back to every column of scores.
    pub smooth_q: bool,
    /// What leaves the op.
    pub output: ScoreOutput,
}

impl Default for ScoreConfig {
    /// Symmetric, one scale a token, smooth-K and smooth-Q, scores dequantized straight from
    /// int32: the most accurate of the configurations measured in the README.
    fn default() -> Self {
        Self {
            q: QuantConfig::default(),
            k: QuantConfig::default(),
            smooth_k: true,
            smooth_q: true,
            output: ScoreOutput::Dequantized,
        }
    }
}

impl ScoreConfig {
    /// The same scheme and granularity for queries and keys, without smoothing.
    pub fn plain(scheme: Scheme, granularity: Granularity) -> Self {
        let side = QuantConfig { scheme, granularity, ..QuantConfig::default() };
        Self {
            q: side.clone(),
            k: side,
            smooth_k: false,
            smooth_q: false,
            output: ScoreOutput::Dequantized,
        }
    }
}

/// What leaves the score op.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ScoreOutput {
    /// f32, straight from the int32 accumulators: `scale_q * scale_k * acc`.
    #[default]
    Dequantized,
    /// f32 that went through int8: requantized to int8, then dequantized. The classic pipeline of
    /// integer-only inference, and the largest error of all (see the `affine_walkthrough` example).
    Requantized(RequantConfig),
    /// The int32 accumulators themselves, zero points corrected, as an I32 tensor. Refused while
    /// smoothing is on, because an int32 cannot hold its correction.
    Int32,
    /// The int8 codes of [`ScoreOutput::Requantized`], as a U8 tensor that holds `code + 128`
    /// (Candle has no I8). `attention_scores_int8` returns them with their scales.
    Int8(RequantConfig),
}

/// How int32 scores become int8 scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RequantConfig {
    /// Symmetric or affine codes.
    pub scheme: Scheme,
    /// Per tensor, per head (`[M, N]` matrix) or per token (row of `N` scores).
    pub granularity: Granularity,
}

impl Default for RequantConfig {
    /// Affine, one scale a row.
    fn default() -> Self {
        Self { scheme: Scheme::Affine, granularity: Granularity::PerToken }
    }
}

/// Numeric choices of the int8 backend.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Int8Config {
    /// How scores are computed.
    pub scores: ScoreConfig,
}

/// Who computes attention. A model holds one per layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Backend {
    /// Candle's own fp32 operations.
    Fp32,
    /// Int8 scores.
    Int8(Int8Config),
}

impl Default for Backend {
    fn default() -> Self {
        Backend::Int8(Int8Config::default())
    }
}

/// Everything `attention` needs besides tensors and mask.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionConfig {
    /// Who computes.
    pub backend: Backend,
    /// Factor on the scores before the mask and the softmax; `None` means `1 / sqrt(D)`.
    pub softmax_scale: Option<f32>,
}

impl AttentionConfig {
    /// Candle's fp32 operations with the default scale.
    pub fn fp32() -> Self {
        Self { backend: Backend::Fp32, softmax_scale: None }
    }

    /// Int8 with the default configuration and the default scale.
    pub fn int8() -> Self {
        Self::default()
    }
}
