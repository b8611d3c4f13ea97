//! What can be chosen: how scores are quantized and requantized, which backend computes.

use super::AttentionSpec;
use crate::cpu::Level;
use crate::cpu::contracts::Format;
use crate::quant::words::words;
use crate::quant::{
    Conditioning, Granularity, QuantConfig, RangeSource, Rotation, Scheme, Smoothing,
};
use crate::{Error, Result};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;

/// How scores are quantized.
///
/// More fields may be added: end an expression in `..ScoreConfig::default()`.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreConfig {
    /// How the queries are quantized.
    pub q: QuantConfig,
    /// How the keys are quantized.
    pub k: QuantConfig,
    /// What is subtracted from the keys before they are quantized; `q·mean(K)` is added back to the
    /// scores.
    pub smooth_k: Smoothing,
    /// What is subtracted from the queries before they are quantized; `mean(Q)·k` is added back to the
    /// scores.
    pub smooth_q: Smoothing,
    /// Whether queries and keys, smoothed, are both multiplied by the same orthogonal matrix before they are
    /// quantized, which evens their channels out and changes no score: see
    /// [`Rotation`](crate::quant::Rotation).
    pub rotate: bool,
    /// Whether keys that stand out of their block of 64 are left out of its mean and its range and have
    /// their scores computed in f32. The first key of a sequence that is seen is always one of them: in language
    /// models it is an attention sink (Xiao et al. 2023, arXiv:2309.17453), which most queries attend to. Of the
    /// others a key stands out if its largest element, as it would be quantized, is more than 4
    /// times what the others of its block have on average. Queries that stand out of their block of 48
    /// are left out of its mean and range.
    pub outliers: bool,
}

impl Default for ScoreConfig {
    /// Affine, one scale a token, smoothed by blocks, rotated, outliers apart: the most accurate of the
    /// configurations measured in docs/accuracy.md.
    fn default() -> Self {
        let affine = QuantConfig { scheme: Scheme::Affine, ..QuantConfig::default() };
        Self {
            q: affine.clone(),
            k: affine,
            smooth_k: Smoothing::Block,
            smooth_q: Smoothing::Block,
            rotate: true,
            outliers: true,
        }
    }
}

impl ScoreConfig {
    /// The same scheme and granularity for queries and keys, and nothing else: no smoothing, no rotation,
    /// outliers like all others.
    pub fn plain(scheme: Scheme, granularity: Granularity) -> Self {
        let side = QuantConfig { scheme, granularity, ..QuantConfig::default() };
        let none = Smoothing::None;
        Self {
            q: side.clone(),
            k: side,
            smooth_k: none,
            smooth_q: none,
            rotate: false,
            outliers: false,
        }
    }

    /// What is done to rows of `depth` elements, of queries and of keys, before they are quantized.
    pub(crate) fn conditioning(&self, depth: usize) -> (Conditioning, Conditioning) {
        let rotation = self.rotate.then(|| Rotation::new(depth));
        let outliers = self.outliers;
        let of = |smoothing, sink| Conditioning { smoothing, rotation, outliers, sink };
        (of(self.smooth_q, false), of(self.smooth_k, outliers))
    }

    /// What is added to the int32 sums in f32, in words; `None` if nothing is.
    pub(crate) fn adds_floats(&self) -> Option<String> {
        let Self { smooth_k, smooth_q, outliers, .. } = self;
        let nothing = [smooth_k, smooth_q] == [&Smoothing::None; 2] && !outliers;
        let words = format!("smooth_k {smooth_k}, smooth_q {smooth_q} and outliers {outliers}");
        (!nothing).then_some(words)
    }
}

/// How int32 scores become int8 scores.
///
/// With neither smoothing nor outliers apart codes come straight from the int32 sums, in the arithmetic that
/// `mode` names, with static parameters equal to the bit to ONNX Runtime's `QLinearMatMul` and to gemmlowp.
/// What those add to the sums is in f32, so with them scores are rounded from f32.
///
/// More fields may be added: end an expression in `..RequantConfig::default()`.
#[derive(Debug, Clone, PartialEq)]
pub struct RequantConfig {
    /// Symmetric or affine codes.
    pub scheme: Scheme,
    /// Per tensor, per head (`[M, N]` matrix) or per token (row of `N` scores).
    pub granularity: Granularity,
    /// From the scores themselves, or given.
    pub range: RangeSource,
    /// How a sum is multiplied by `scale_q * scale_k / scale`.
    pub mode: RequantMode,
}

impl Default for RequantConfig {
    /// Affine, one scale a row, from the scores themselves, in fp32.
    fn default() -> Self {
        Self {
            scheme: Scheme::Affine,
            granularity: Granularity::PerToken,
            range: RangeSource::Dynamic,
            mode: RequantMode::Fp32,
        }
    }
}

impl RequantConfig {
    /// The same choices for [`QuantizedTensor::quantize`](crate::quant::QuantizedTensor::quantize),
    /// which quantizes numbers that are in f32.
    pub fn to_quant_config(&self) -> QuantConfig {
        let Self { scheme, granularity, range, .. } = self.clone();
        QuantConfig { scheme, granularity, range }
    }
}

/// The arithmetic of a requantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RequantMode {
    /// [`Requantizer::fp32`](crate::quant::Requantizer::fp32): an f32 multiplication, ties to even.
    #[default]
    Fp32,
    /// [`Requantizer::fixed_point`](crate::quant::Requantizer::fixed_point): integers alone, with
    /// gemmlowp's rounding.
    FixedPoint,
}

/// In which precision probabilities are multiplied with values; sums are f32 in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum PvPrecision {
    /// Int16; bf16 on 64-bit Arm where the processor multiplies it.
    #[default]
    Auto,
    /// f32.
    F32,
    /// bf16; an error on a machine for which there is no kernel, which only 64-bit Arm with the bf16
    /// extension has.
    Bf16,
    /// Int16 on every machine, with exact int32 sums over runs of 64 keys, and the same bits on every
    /// [level](crate::cpu). Probabilities have twelve bits, with a scale for each query and run; values
    /// fourteen with their sign and a scale for each channel and run, but for the few that are far larger
    /// than the rest of their run, which stay in f32.
    Int16,
    /// Int8 on every machine, with exact int32 sums over runs of keys. Probabilities are rounded to
    /// 1/255 of the largest that their query has in the run, so small ones vanish beside a large
    /// one. Values have one scale for each channel, over all keys of a head, so an outlier makes
    /// its channel coarse. The error is larger than that of the int8 scores (the README has
    /// figures): never chosen by `Auto`.
    Int8,
}

words!(
    PvPrecision,
    "P·V precision {:?}",
    Auto = "auto",
    F32 = "f32",
    Bf16 = "bf16",
    Int16 = "int16",
    Int8 = "int8",
);

impl PvPrecision {
    /// The format that it stands for on this machine.
    ///
    /// # Errors
    /// [`Error::Unsupported`] on a machine without an instruction for it.
    pub(super) fn format(self, level: Level) -> Result<Format> {
        let bf16 = level.panels(Format::Bf16).is_some();
        match self {
            Self::Auto if bf16 => Ok(Format::Bf16),
            Self::Auto | Self::Int16 => Ok(Format::Int16),
            Self::F32 => Ok(Format::F32),
            Self::Bf16 if bf16 => Ok(Format::Bf16),
            Self::Bf16 => Err(Error::Unsupported(format!(
                "P·V precision {self}: there is no kernel for it on this machine; use auto, f32, int16 or \
                 int8"
            ))),
            Self::Int8 => Ok(Format::Int8),
        }
    }
}

/// Numeric choices of the int8 backend. They are written in words on command lines and in reports,
/// and as JSON in files: see its `FromStr`.
///
/// More fields may be added: end an expression in `..Int8Config::default()`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Int8Config {
    /// How scores are computed.
    pub scores: ScoreConfig,
    /// How the probabilities are multiplied with the values.
    pub pv: PvPrecision,
}

/// Who computes attention. A model holds one per layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "backend", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Backend {
    /// In fp32, by the op that has int8 scores too: tile by tile, with memory for `O(N)` numbers.
    #[serde(deserialize_with = "no_settings")]
    Fp32,
    /// Int8 scores.
    Int8(Int8Config),
}

/// Refuses keys beside the tag of a backend without settings, which serde would drop.
fn no_settings<'de, D: Deserializer<'de>>(other_keys: D) -> std::result::Result<(), D::Error> {
    match BTreeMap::<String, IgnoredAny>::deserialize(other_keys)?.keys().next() {
        Some(key) => {
            Err(D::Error::custom(format!("key {key:?}, but backend fp32 has no settings")))
        }
        None => Ok(()),
    }
}

impl Default for Backend {
    fn default() -> Self {
        Backend::Int8(Int8Config::default())
    }
}

/// Everything about attention that is the same in every call: what the model asks for, and who
/// computes it in which precision. What belongs to a call is an
/// [`AttentionCall`](super::AttentionCall).
///
/// The usual choices are one level deep. Those of the precision are for the int8 backend: on an fp32
/// configuration they choose int8 with its defaults first.
///
/// ```
/// use candle_int8_attention::quant::Granularity;
/// use candle_int8_attention::{AttentionConfig, PvPrecision};
///
/// let exact = AttentionConfig::fp32().softmax_scale(0.1).window(Some(1024), None);
/// let int8 = exact.clone().granularity(Granularity::PerHead).pv(PvPrecision::F32);
/// assert_eq!(int8.spec, exact.spec);
/// assert_ne!(int8.backend, exact.backend);
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AttentionConfig {
    /// What belongs to the model.
    pub spec: AttentionSpec,
    /// What belongs to the precision.
    pub backend: Backend,
}

impl AttentionConfig {
    /// Fp32 with the default scale, see [`Backend::Fp32`].
    pub fn fp32() -> Self {
        Self { spec: AttentionSpec::default(), backend: Backend::Fp32 }
    }

    /// Int8 with the default configuration and the default scale.
    pub fn int8() -> Self {
        Self::default()
    }

    /// The same with what queries and keys share a scale; chooses int8.
    pub fn granularity(self, granularity: Granularity) -> Self {
        self.with_int8(|int8| {
            int8.scores.q.granularity = granularity;
            int8.scores.k.granularity = granularity;
        })
    }

    /// The same with symmetric or affine codes of queries and keys; chooses int8.
    pub fn scheme(self, scheme: Scheme) -> Self {
        self.with_int8(|int8| {
            int8.scores.q.scheme = scheme;
            int8.scores.k.scheme = scheme;
        })
    }

    /// The same with this smoothing of keys and of queries; chooses int8.
    pub fn smoothing(self, k: Smoothing, q: Smoothing) -> Self {
        self.with_int8(|int8| (int8.scores.smooth_k, int8.scores.smooth_q) = (k, q))
    }

    /// The same with scores whose other choices `change` makes; chooses int8.
    pub fn with_scores(self, change: impl FnOnce(&mut ScoreConfig)) -> Self {
        self.with_int8(|int8| change(&mut int8.scores))
    }

    /// The same with this precision of P·V; chooses int8.
    pub fn pv(self, pv: PvPrecision) -> Self {
        self.with_int8(|int8| int8.pv = pv)
    }

    /// The same with this factor on the scores.
    pub fn softmax_scale(mut self, scale: f32) -> Self {
        self.spec.softmax_scale = Some(scale);
        self
    }

    /// The same with scores that are bent to `cap * tanh(score / cap)`.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.spec.softcap = Some(cap);
        self
    }

    /// The same with one ALiBi slope for each query head.
    pub fn alibi_slopes(mut self, slopes: Vec<f32>) -> Self {
        self.spec.alibi_slopes = Some(slopes);
        self
    }

    /// The same with one learned logit for each query head in the softmax's denominator.
    pub fn sink_logits(mut self, logits: Vec<f32>) -> Self {
        self.spec.sink_logits = Some(logits);
        self
    }

    /// The same with at most this many keys seen to the left and to the right of a query's
    /// position.
    pub fn window(mut self, left: Option<usize>, right: Option<usize>) -> Self {
        (self.spec.window_left, self.spec.window_right) = (left, right);
        self
    }

    /// The same attention by another backend.
    pub fn with_backend(&self, backend: Backend) -> Self {
        Self { spec: self.spec.clone(), backend }
    }

    fn with_int8(mut self, change: impl FnOnce(&mut Int8Config)) -> Self {
        let mut int8 = match self.backend {
            Backend::Int8(int8) => int8,
            Backend::Fp32 => Int8Config::default(),
        };
        change(&mut int8);
        self.backend = Backend::Int8(int8);
        self
    }
}

impl From<Int8Config> for Backend {
    fn from(int8: Int8Config) -> Self {
        Backend::Int8(int8)
    }
}

impl From<Int8Config> for AttentionConfig {
    fn from(int8: Int8Config) -> Self {
        Self { spec: AttentionSpec::default(), backend: Backend::Int8(int8) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_have_one_name_everywhere() {
        use PvPrecision::*;
        for pv in [Auto, F32, Bf16, Int16, Int8] {
            assert_eq!(pv.to_string().parse::<PvPrecision>().unwrap(), pv);
            assert_eq!(serde_json::to_value(pv).unwrap(), pv.to_string());
        }
        let error = "f16".parse::<PvPrecision>().unwrap_err().to_string();
        assert!(error.contains("\"f16\", expected auto, f32, bf16, int16 or int8"), "{error}");
    }

    #[test]
    fn a_choice_of_precision_on_fp32_is_int8_with_it() {
        let int8 = AttentionConfig::fp32().softcap(30.0).pv(PvPrecision::F32);
        assert_eq!(int8, AttentionConfig::int8().pv(PvPrecision::F32).softcap(30.0));
        let scores = ScoreConfig::plain(Scheme::Affine, Granularity::PerHead);
        let plain = AttentionConfig::from(Int8Config { scores, ..Int8Config::default() });
        let built =
            AttentionConfig::fp32().scheme(Scheme::Affine).granularity(Granularity::PerHead);
        let built = built.smoothing(Smoothing::None, Smoothing::None);
        assert_eq!(
            built.with_scores(|scores| (scores.rotate, scores.outliers) = (false, false)),
            plain
        );
    }
}
