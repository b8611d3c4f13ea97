//! The configurations to be measured, and how they are written in one word.

use crate::quant::{Granularity, QuantConfig, Scheme};
use crate::{Error, Int8Config, PvPrecision, RequantConfig, ScoreConfig, ScoreOutput};
use std::str::FromStr;

/// A configuration of int8 attention with a name.
///
/// Written as words joined by `+`, in any order, with spaces or without, at most one for each
/// choice; what is left out is as in the plainest configuration (symmetric, per token, nothing
/// smoothed, dequantized, P·V in f32):
///
/// | word | choice |
/// |---|---|
/// | `symmetric`, `affine` | scheme |
/// | `tensor`, `head`, `token`, `block:N`, `block:M/N` | what shares a scale (queries / keys) |
/// | `smooth-k`, `smooth-q` | subtract the mean of keys, of queries |
/// | `dequantized`, `requantized`, `requantized:tensor`, `:head`, `:token` | whether scores go through int8 |
/// | `f32`, `bf16`, `int8`, `auto` | precision of P·V |
/// | `default` | alone: this crate's default |
/// | `sage` | alone: SageAttention's recipe, `block:128/64+smooth-k+f32` (arXiv:2410.02367) |
///
/// ```
/// use candle_int8_attention::drift::Candidate;
/// let candidate: Candidate = "token+smooth-k+bf16".parse()?;
/// assert!(candidate.config.scores.smooth_k && !candidate.config.scores.smooth_q);
/// assert!("token+smoth-k".parse::<Candidate>().unwrap_err().to_string().contains("smoth-k"));
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// For people.
    pub name: String,
    /// What is measured.
    pub config: Int8Config,
}

impl Default for Candidate {
    /// The default configuration.
    fn default() -> Self {
        Self { name: "default".into(), config: Int8Config::default() }
    }
}

impl Candidate {
    /// A configuration under a name.
    pub fn new(name: impl Into<String>, config: Int8Config) -> Self {
        Self { name: name.into(), config }
    }

    /// SageAttention's recipe: one scale for 128 queries and for 64 keys, smooth-K, P·V in f32.
    pub fn sage() -> Self {
        let side = |tokens| QuantConfig {
            granularity: Granularity::PerBlock(tokens),
            ..QuantConfig::default()
        };
        let scores = ScoreConfig {
            q: side(128),
            k: side(64),
            smooth_k: true,
            ..ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken)
        };
        Self::new("SageAttention's recipe", Int8Config { scores, pv: PvPrecision::F32 })
    }

    /// The configurations worth comparing: every granularity, each step of smoothing, affine
    /// codes, scores requantized, and both precisions of P·V.
    pub fn all() -> Vec<Self> {
        let words = [
            "default",
            "token+smooth-k+smooth-q+f32",
            "sage",
            "tensor",
            "head",
            "block:64",
            "token",
            "token+smooth-q",
            "token+smooth-k",
            "head+smooth-k+smooth-q",
            "affine+token",
            "affine+token+smooth-k+smooth-q",
            "token+smooth-k+smooth-q+requantized:token",
            "token+smooth-k+smooth-q+requantized:head",
            "token+smooth-k+smooth-q+requantized:tensor",
        ];
        words.iter().map(|word| word.parse().expect("a list of known words")).collect()
    }

    /// All of the configuration in words.
    pub fn description(&self) -> String {
        let ScoreConfig { q, k, smooth_k, smooth_q, output } = &self.config.scores;
        let mut words = vec![q.scheme.to_string(), q.granularity.to_string()];
        if k.scheme != q.scheme {
            words.push(format!("keys {}", k.scheme));
        }
        if k.granularity != q.granularity {
            words.push(format!("keys {}", k.granularity));
        }
        for (side, config) in [("queries", q), ("keys", k)] {
            if config.range != crate::quant::RangeSource::Dynamic {
                words.push(format!("{side} with static ranges"));
            }
        }
        words.extend(smooth_k.then(|| "smooth-K".to_string()));
        words.extend(smooth_q.then(|| "smooth-Q".to_string()));
        words.push(match output {
            ScoreOutput::Requantized(to) => format!("requantized {}", to.granularity),
            _ => "dequantized".to_string(),
        });
        words.push(match self.config.pv {
            PvPrecision::Auto => "P·V as fast as the CPU can".to_string(),
            pv => format!("P·V in {pv}"),
        });
        words.join(", ")
    }
}

impl FromStr for Candidate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "default" => return Ok(Self::default()),
            "sage" => return Ok(Self::sage()),
            _ => {}
        }
        let scores = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
        let mut config = Int8Config { scores, pv: PvPrecision::F32 };
        let words: Vec<&str> = text.split('+').map(str::trim).collect();
        let mut chosen: Vec<(Choice, &str)> = Vec::new();
        for word in &words {
            let choice = apply(&mut config, word).ok_or_else(|| {
                Error::InvalidArgument(format!(
                    "{word:?} in the configuration {text:?}; expected words joined by +, of \
                     symmetric, affine, tensor, head, token, block:N, block:M/N, smooth-k, \
                     smooth-q, requantized[:tensor|head|token], f32, bf16, int8, auto; or default, or \
                     sage"
                ))
            })?;
            if let Some((_, first)) = chosen.iter().find(|(known, _)| *known == choice) {
                return Err(Error::Contradiction(format!(
                    "{first:?} and {word:?} in the configuration {text:?} choose the same; expected \
                     one of them"
                )));
            }
            chosen.push((choice, word));
        }
        Ok(Self::new(words.join(" + "), config))
    }
}

/// What a word decides; no two words may decide the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Scheme,
    Granularity,
    SmoothK,
    SmoothQ,
    Output,
    Pv,
}

/// `None` for a word that is not one.
fn apply(config: &mut Int8Config, word: &str) -> Option<Choice> {
    let Int8Config { scores, pv } = config;
    match word {
        "symmetric" | "affine" => {
            scores.q.scheme = word.parse().ok()?;
            scores.k.scheme = scores.q.scheme;
            Some(Choice::Scheme)
        }
        "smooth-k" => {
            scores.smooth_k = true;
            Some(Choice::SmoothK)
        }
        "smooth-q" => {
            scores.smooth_q = true;
            Some(Choice::SmoothQ)
        }
        _ => {
            if let Some(output) = output(word) {
                scores.output = output;
                return Some(Choice::Output);
            }
            if let Ok(precision) = word.parse() {
                *pv = precision;
                return Some(Choice::Pv);
            }
            (scores.q.granularity, scores.k.granularity) = granularities(word)?;
            Some(Choice::Granularity)
        }
    }
}

/// What becomes of the scores.
fn output(word: &str) -> Option<ScoreOutput> {
    let granularity = match word {
        "dequantized" => return Some(ScoreOutput::Dequantized),
        "requantized" => RequantConfig::default().granularity,
        "requantized:tensor" | "requantized:head" | "requantized:token" => {
            word.split_once(':')?.1.parse().ok()?
        }
        _ => return None,
    };
    Some(ScoreOutput::Requantized(RequantConfig { granularity, ..RequantConfig::default() }))
}

/// What shares a scale in queries and in keys.
fn granularities(word: &str) -> Option<(Granularity, Granularity)> {
    let (q, k) = match word.split_once('/') {
        Some((q, k)) if q.starts_with("block:") => (q.parse().ok()?, format!("block:{k}")),
        Some(_) => return None,
        None => (word.parse().ok()?, word.to_string()),
    };
    Some((q, k.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_configuration_of_the_list_is_another() {
        let all = Candidate::all();
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a.config != b.config), "{}", a.name);
        }
        assert_eq!(all[0].config, Int8Config::default());
    }

    #[test]
    fn sage_is_what_it_says() {
        let written: Candidate = "block:128/64+smooth-k+f32".parse().unwrap();
        assert_eq!(written.config, Candidate::sage().config);
    }

    #[test]
    fn unknown_words_are_named() {
        for (text, word) in [("", "\"\""), ("token+", "\"\""), ("head/token", "head/token")] {
            let error = text.parse::<Candidate>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("expected words"), "{text}: {error}");
        }
        assert!("block:0".parse::<Candidate>().is_err());
    }

    #[test]
    fn words_that_choose_the_same_are_named() {
        for (text, first, second) in [
            ("token+head", "token", "head"),
            ("block:64+smooth-k+block:64", "block:64", "block:64"),
            ("affine+token+symmetric", "affine", "symmetric"),
            ("smooth-k+smooth-k", "smooth-k", "smooth-k"),
            ("dequantized+requantized:head", "dequantized", "requantized:head"),
            ("f32+token+auto", "f32", "auto"),
        ] {
            let error = text.parse::<Candidate>().unwrap_err().to_string();
            assert!(error.contains(&format!("{first:?} and {second:?}")), "{text}: {error}");
        }
    }
}
