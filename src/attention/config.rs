//! What can be chosen: how scores are quantized, what leaves the op, which backend computes.

use crate::cpu::Level;
use crate::cpu::contracts::Format;
use crate::quant::{Granularity, QuantConfig, Scheme};
use crate::{Error, Result};

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
    /// int32: of the configurations measured in the README, the most accurate that needs no
    /// zero-point correction of every score (affine codes gain 1 dB more).
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

/// In which precision probabilities are multiplied with values; sums are f32 in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PvPrecision {
    /// bf16 where the hardware multiplies it (AVX512-BF16, the bf16 extension of Arm), f32
    /// elsewhere.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16; an error on a machine without an instruction for it.
    Bf16,
    /// Int8 on every machine, with exact int32 sums over runs of keys. Probabilities are rounded to
    /// 1/255 of the largest that their query has in the run, so small ones vanish beside a large
    /// one. Values have one scale for each channel, over all keys of a head, so an outlier makes
    /// its channel coarse. The error is larger than that of the int8 scores (the README has
    /// figures): never chosen by `Auto`.
    Int8,
}

impl std::str::FromStr for PvPrecision {
    type Err = Error;

    /// `auto`, `f32`, `bf16` or `int8`.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::Config(format!(
                "P·V precision {text:?}, expected auto, f32, bf16 or int8"
            ))),
        }
    }
}

impl std::fmt::Display for PvPrecision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl PvPrecision {
    /// The format that it stands for on this machine.
    ///
    /// # Errors
    /// [`Error::Config`] on a machine without an instruction for it.
    pub(super) fn format(self, level: Level) -> Result<Format> {
        let bf16 = level.panels(Format::Bf16).is_some();
        match self {
            Self::Auto if bf16 => Ok(Format::Bf16),
            Self::Auto | Self::F32 => Ok(Format::F32),
            Self::Bf16 if bf16 => Ok(Format::Bf16),
            Self::Bf16 => Err(Error::Config(format!(
                "P·V precision {self}: this machine has no instruction for it; use auto, f32 or int8"
            ))),
            Self::Int8 => Ok(Format::Int8),
        }
    }
}

/// Numeric choices of the int8 backend.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Int8Config {
    /// How scores are computed.
    pub scores: ScoreConfig,
    /// How the probabilities are multiplied with the values.
    pub pv: PvPrecision,
}

/// Who computes attention. A model holds one per layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Backend {
    /// In fp32: Candle's own operations, or, in the BERT encoder of [`models`](crate::models), a fused
    /// fp32 op of this crate.
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
///
/// A query's position among the keys, which windows and ALiBi need, is that of the causal mask's
/// `kv_offset` where there is one; otherwise the queries are the last `M` of the `N` keys.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionConfig {
    /// Who computes.
    pub backend: Backend,
    /// Factor on the scores before everything else; `None` means `1 / sqrt(D)`.
    pub softmax_scale: Option<f32>,
    /// Bends scaled scores: `cap * tanh(score / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// One slope for each query head: `-slope * |position - key|` is added to the scores (Press et
    /// al. 2021, arXiv:2108.12409).
    pub alibi_slopes: Option<Vec<f32>>,
    /// Sliding window: a query sees at most this many keys to the left of its position.
    pub window_left: Option<usize>,
    /// And at most this many to the right.
    pub window_right: Option<usize>,
    /// How many keys of each sequence of the batch are real; the others are not seen.
    pub kv_lens: Option<Vec<usize>>,
}

impl AttentionConfig {
    /// Fp32 with the default scale, see [`Backend::Fp32`].
    pub fn fp32() -> Self {
        Self { backend: Backend::Fp32, ..Self::default() }
    }

    /// Int8 with the default configuration and the default scale.
    pub fn int8() -> Self {
        Self::default()
    }

    /// The same for a batch whose sequences have these numbers of keys.
    pub fn with_kv_lens(&self, lens: Vec<usize>) -> Self {
        Self { kv_lens: Some(lens), ..self.clone() }
    }

    /// The factor on scores of `depth` elements.
    pub(super) fn scale(&self, depth: usize) -> Result<f32> {
        let scale = self.softmax_scale.unwrap_or(1.0 / (depth.max(1) as f32).sqrt());
        match scale.is_finite() {
            true => Ok(scale),
            false => Err(Error::Config(format!("softmax scale {scale}, expected a finite number"))),
        }
    }

    /// # Errors
    /// [`Error::Config`] for numbers that make no sense with `heads` query heads.
    pub(super) fn check(&self, heads: usize) -> Result<()> {
        if let Some(cap) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(Error::Config(format!("softcap {cap}, expected finite and positive")));
        }
        let Some(slopes) = &self.alibi_slopes else { return Ok(()) };
        if slopes.len() != heads {
            let found = slopes.len();
            return Err(Error::Config(format!("{found} ALiBi slopes for {heads} heads")));
        }
        match slopes.iter().find(|slope| !slope.is_finite()) {
            Some(slope) => Err(Error::Config(format!("ALiBi slope {slope}, expected finite"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_have_one_name_everywhere() {
        for pv in [PvPrecision::Auto, PvPrecision::F32, PvPrecision::Bf16, PvPrecision::Int8] {
            assert_eq!(pv.to_string().parse::<PvPrecision>().unwrap(), pv);
            assert_eq!(serde_json::to_value(pv).unwrap(), pv.to_string());
        }
        let error = "f16".parse::<PvPrecision>().unwrap_err().to_string();
        assert!(error.contains("\"f16\", expected auto, f32, bf16 or int8"), "{error}");
    }
}
