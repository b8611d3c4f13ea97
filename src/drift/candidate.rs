//! The configurations to be measured, and how they are written in one word.

use super::bf16;
use crate::attention::attention_scores_requantized;
use crate::attention::reference::unfused;
use crate::attention::{
    AttentionCall, AttentionConfig, Int8Config, PvPrecision, RequantConfig, ScoreConfig, attention,
    attention_scores,
};
use crate::quant::{Granularity, RangeSource, Smoothing};
use crate::{Error, Result};
use candle_core::Tensor;
use std::str::FromStr;

/// A configuration of int8 attention with a name, or attention in bf16 to compare with.
///
/// Written in the words of an [`Int8Config`], with one choice more, or as one word:
///
/// | word | choice |
/// |---|---|
/// | `dequantized`, `requantized`, `requantized:tensor`, `:head`, `:token` | whether scores go through int8 |
/// | `default`, `sage` | [`Candidate::default`], [`Candidate::sage`] |
/// | `bf16` alone | [`Candidate::bf16`]; beside others it is the precision of P·V |
///
/// ```
/// use candle_int8_attention::drift::Candidate;
/// let candidate: Candidate = "token+local-k+rotate+bf16".parse()?;
/// assert!(candidate.config.scores.rotate && candidate.requant.is_none());
/// assert!("token+smoth-k".parse::<Candidate>().unwrap_err().to_string().contains("smoth-k"));
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// For people.
    pub name: String,
    /// What is measured.
    pub config: Int8Config,
    /// How scores go through int8, if they do. Attention is then computed step by step, with P·V in
    /// f32.
    pub requant: Option<RequantConfig>,
    /// Whether it is [`Candidate::bf16`]; the other choices are not used then.
    pub in_bf16: bool,
}

impl Default for Candidate {
    /// The default configuration.
    fn default() -> Self {
        Self::new("default", Int8Config::default())
    }
}

impl Candidate {
    /// A configuration under a name.
    pub fn new(name: impl Into<String>, config: Int8Config) -> Self {
        Self { name: name.into(), config, requant: None, in_bf16: false }
    }

    /// What int8 is to be seen beside: Q, K, P and V rounded to bf16 (to nearest, ties to even), products with
    /// sums in f32, softmax in f32, and an output that is not rounded. Computed step by step in f32, so
    /// that it is not timed.
    pub fn bf16() -> Self {
        Self { in_bf16: true, ..Self::new("bf16", Int8Config::plain()) }
    }

    /// The same with scores that go through int8.
    pub fn requantized(self, to: RequantConfig) -> Self {
        Self { requant: Some(to), ..self }
    }

    /// SageAttention's recipe: one scale for 128 queries and for 64 keys, smooth-K, P·V in f32.
    pub fn sage() -> Self {
        Self::new("SageAttention's recipe", Int8Config::sage())
    }

    /// The configurations worth comparing: bf16, every granularity, each step of smoothing, affine
    /// codes, scores requantized, and both precisions of P·V.
    pub fn all() -> Vec<Self> {
        let words = [
            "default",
            "bf16",
            "token+local-k+local-q+rotate+outliers+f32",
            "sage",
            "tensor",
            "head",
            "block:64",
            "token",
            "token+smooth-k",
            "token+smooth-k+smooth-q",
            "token+local-k+local-q",
            "token+local-k+local-q+rotate",
            "head+local-k+local-q+rotate+outliers",
            "affine+token",
            "affine+token+local-k+local-q+rotate+outliers",
            "token+local-k+local-q+rotate+outliers+requantized:token",
            "token+local-k+local-q+rotate+outliers+requantized:head",
            "token+local-k+local-q+rotate+outliers+requantized:tensor",
        ];
        words.iter().map(|word| word.parse().expect("a list of known words")).collect()
    }

    /// Whether it computes the same as another, whatever their names.
    pub fn is_same(&self, other: &Self) -> bool {
        let other = Self { name: self.name.clone(), ..other.clone() };
        *self == other
    }

    /// All of the configuration in words.
    pub fn description(&self) -> String {
        if self.in_bf16 {
            return "Q, K, P and V rounded to bf16, sums in f32".into();
        }
        let ScoreConfig { q, k, smooth_k, smooth_q, rotate, outliers } = &self.config.scores;
        let mut words = vec![q.scheme.to_string(), q.granularity.to_string()];
        if k.scheme != q.scheme {
            words.push(format!("keys {}", k.scheme));
        }
        if k.granularity != q.granularity {
            words.push(format!("keys {}", k.granularity));
        }
        for (side, config) in [("queries", q), ("keys", k)] {
            if config.range != RangeSource::Dynamic {
                words.push(format!("{side} with static ranges"));
            }
        }
        match (smooth_k, smooth_q) {
            (Smoothing::None, Smoothing::None) => {}
            (k, q) if k == q => words.push(format!("smoothed by {k}")),
            (k, q) => words.push(format!("keys smoothed by {k}, queries by {q}")),
        }
        words.extend(rotate.then(|| "rotated".to_string()));
        words.extend(outliers.then(|| "outliers apart".to_string()));
        words.push(match &self.requant {
            Some(to) => format!("requantized {}", to.granularity),
            None => "dequantized".to_string(),
        });
        words.push(match self.config.pv {
            PvPrecision::Auto => "P·V auto".to_string(),
            pv => format!("P·V in {pv}"),
        });
        words.join(", ")
    }

    /// Attention of this candidate with the model's part of `config`; arguments as for
    /// [`attention()`].
    ///
    /// # Errors
    /// Those of [`attention()`], and of [`unfused::attention_requantized`] where scores go through
    /// int8.
    pub fn attention(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        call: &AttentionCall,
        config: &AttentionConfig,
    ) -> Result<Tensor> {
        if self.in_bf16 {
            return bf16::attention((q, k, v), call, config);
        }
        let config = config.with_backend(self.config.clone().into());
        match &self.requant {
            None => attention(q, k, v, call, &config),
            Some(to) => unfused::attention_requantized(q, k, v, call, &config, to),
        }
    }

    /// The probabilities of [`Candidate::attention`].
    ///
    /// # Errors
    /// Those of [`Candidate::attention`].
    pub fn probabilities(
        &self,
        (q, k): (&Tensor, &Tensor),
        call: &AttentionCall,
        config: &AttentionConfig,
    ) -> Result<Tensor> {
        if self.in_bf16 {
            return bf16::probabilities((q, k), call, config);
        }
        let config = config.with_backend(self.config.clone().into());
        match &self.requant {
            None => unfused::attention_probs(q, k, call, &config),
            Some(to) => unfused::attention_probs_requantized(q, k, call, &config, to),
        }
    }

    /// The raw scores `q·k^T` of this candidate.
    ///
    /// # Errors
    /// Those of [`attention_scores`](crate::attention_scores) and of
    /// [`attention_scores_requantized`].
    pub fn scores(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        match &self.requant {
            _ if self.in_bf16 => bf16::scores(q, k),
            None => attention_scores(q, k, &self.config.scores),
            Some(to) => attention_scores_requantized(q, k, &self.config.scores, to),
        }
    }
}

impl FromStr for Candidate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "default" => return Ok(Self::default()),
            "sage" => return Ok(Self::sage()),
            "bf16" => return Ok(Self::bf16()),
            _ => {}
        }
        let words: Vec<&str> = text.split('+').map(str::trim).collect();
        let (outputs, others): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| {
            let name = word.split(':').next();
            matches!(name, Some("dequantized" | "requantized"))
        });
        let config = match others.as_slice() {
            [] => Int8Config::plain(),
            words => words.join("+").parse()?,
        };
        let requant = match outputs.as_slice() {
            [] => None,
            [word] => output(word)?,
            [first, second, ..] => {
                return Err(Error::Contradiction(format!(
                    "{first:?} and {second:?} in the configuration {text:?} choose the same; expected \
                     one of them"
                )));
            }
        };
        Ok(Self { requant, ..Self::new(words.join(" + "), config) })
    }
}

/// What becomes of the scores.
fn output(word: &str) -> Result<Option<RequantConfig>> {
    let granularity = match word {
        "dequantized" => return Ok(None),
        "requantized" => RequantConfig::default().granularity,
        "requantized:tensor" => Granularity::PerTensor,
        "requantized:head" => Granularity::PerHead,
        "requantized:token" => Granularity::PerToken,
        _ => {
            return Err(Error::InvalidArgument(format!(
                "{word:?}; expected words joined by +, of which dequantized and \
                 requantized[:tensor|head|token] say whether scores go through int8"
            )));
        }
    };
    Ok(Some(RequantConfig { granularity, ..RequantConfig::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_configuration_of_the_list_is_another() {
        let all = Candidate::all();
        for (i, a) in all.iter().enumerate() {
            let other = |b: &Candidate| !a.is_same(b);
            assert!(all[i + 1..].iter().all(other), "{}", a.name);
        }
        assert_eq!(all[0].config, Int8Config::default());
        let requantized = all.iter().filter(|candidate| candidate.requant.is_some());
        assert_eq!(requantized.count(), 3);
    }

    #[test]
    fn scores_through_int8_are_one_word_more() {
        let candidate: Candidate = "requantized:head + affine+token".parse().unwrap();
        assert_eq!(candidate.config, "affine+token".parse().unwrap());
        assert_eq!(candidate.requant.unwrap().granularity, Granularity::PerHead);
        assert_eq!("requantized".parse::<Candidate>().unwrap().config, Int8Config::plain());
        assert_eq!("dequantized".parse::<Candidate>().unwrap().requant, None);
    }

    #[test]
    fn bf16_alone_is_what_int8_is_compared_with() {
        let candidate: Candidate = "bf16".parse().unwrap();
        assert!(candidate == Candidate::bf16() && candidate.in_bf16);
        let pv: Candidate = "token+bf16".parse().unwrap();
        assert!(!pv.in_bf16 && pv.config.pv == PvPrecision::Bf16);
    }

    #[test]
    fn words_that_are_wrong_are_named() {
        for (text, word) in [
            ("", "\"\""),
            ("token+requantized+", "\"\""),
            ("requantized:block:4", "requantized:block:4"),
        ] {
            let error = text.parse::<Candidate>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("expected words"), "{text}: {error}");
        }
        let error = "dequantized+requantized:head".parse::<Candidate>().unwrap_err().to_string();
        assert!(error.contains("\"dequantized\" and \"requantized:head\""), "{error}");
    }
}
