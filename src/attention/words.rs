//! A configuration of the precision in words, and in JSON.

use super::config::{Backend, Int8Config, PvPrecision, ScoreConfig};
use crate::quant::{Granularity, QuantConfig, RangeSource, Scheme, Smoothing};
use crate::{Error, Result};
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;

/// The words that there are, for messages.
const WORDS: &str = "symmetric, affine, tensor, head, token, block:N, block:M/N, smooth-k, smooth-q, \
                     local-k, local-q, rotate, outliers, f32, bf16, int16, int8, \
                     auto; or default, or sage";

impl Int8Config {
    /// The plainest configuration, from which words start: symmetric, per token, nothing smoothed,
    /// P·V in f32.
    pub fn plain() -> Self {
        let scores = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
        Self { scores, pv: PvPrecision::F32 }
    }

    /// SageAttention's recipe: one scale for 128 queries and for 64 keys, smooth-K, P·V in f32
    /// (arXiv:2410.02367).
    pub fn sage() -> Self {
        let mut sage = Self::plain();
        sage.scores.q.granularity = Granularity::PerBlock(128);
        sage.scores.k.granularity = Granularity::PerBlock(64);
        sage.scores.smooth_k = Smoothing::Head;
        sage
    }
}

/// Words joined by `+`: the form of an int8 configuration on command lines and in reports.
///
/// They come in any order, with spaces or without, at most one for each choice; what is left out is
/// as in [`Int8Config::plain`]:
///
/// | word | choice | in JSON |
/// |---|---|---|
/// | `symmetric`, `affine` | where the integer zero lies | `"scheme": "symmetric"` |
/// | `tensor`, `head`, `token`, `block:N` | what shares a scale | `"granularity": "token"` |
/// | `smooth-k`, `smooth-q` | subtract the mean of keys, of queries | `"smooth_k": "head"` |
/// | `local-k`, `local-q` | the mean of a block of keys, of queries | `"smooth_k": "block"` |
/// | `rotate` | multiply both by a Hadamard matrix | `"rotate": true` |
/// | `outliers` | keys that stand out in f32 | `"outliers": true` |
/// | `f32`, `bf16`, `int16`, `int8`, `auto` | precision of P·V | `"pv": "auto"` |
/// | `default` | alone: this crate's default | |
/// | `sage` | alone: SageAttention's recipe | |
///
/// A choice that is another for queries and for keys is written with a slash: `head/token`, or
/// `block:128/64`.
///
/// In JSON, the form of files, the same choices are the keys of an object, all of which must be
/// there; a [`Backend`] has `"backend": "int8"` beside them, or is `{ "backend": "fp32" }`. Static
/// ranges have no form in either: they are in the files of a
/// [`Calibration`](crate::models::Calibration).
///
/// ```
/// use candle_int8_attention::{Backend, Int8Config};
///
/// let config: Int8Config = "token + local-k + rotate + bf16".parse()?;
/// assert!(config.scores.rotate && !config.scores.outliers);
/// assert_eq!(config.to_string(), "symmetric+token+local-k+rotate+bf16");
/// assert!("token+smoth-k".parse::<Int8Config>().unwrap_err().to_string().contains("smoth-k"));
///
/// let json = r#"{ "backend": "int8", "scheme": "symmetric", "granularity": "token",
///                 "smooth_k": "block", "smooth_q": "none", "rotate": true, "outliers": false,
///                 "pv": "bf16" }"#;
/// assert_eq!(serde_json::from_str::<Backend>(json).unwrap(), Backend::Int8(config));
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
impl FromStr for Int8Config {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.trim() {
            "default" => return Ok(Self::default()),
            "sage" => return Ok(Self::sage()),
            _ => {}
        }
        let mut config = Self::plain();
        let mut chosen: Vec<(Choice, &str)> = Vec::new();
        for word in text.split('+').map(str::trim) {
            let choice = config.choose(word).ok_or_else(|| {
                Error::InvalidArgument(format!(
                    "{word:?} in the configuration {text:?}; expected words joined by +, of {WORDS}"
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
        Ok(config)
    }
}

/// What a word decides; no two words may decide the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Scheme,
    Granularity,
    SmoothK,
    SmoothQ,
    Rotate,
    Outliers,
    Pv,
}

/// What a word for smoothing, of whichever side, means.
fn smoothing(word: &str) -> Smoothing {
    if word.starts_with("local") { Smoothing::Block } else { Smoothing::Head }
}

/// The word for smoothing of a side; `None` where there is none.
fn smoothing_word(smoothing: Smoothing, side: &str) -> Option<String> {
    match smoothing {
        Smoothing::None => None,
        Smoothing::Head => Some(format!("smooth-{side}")),
        Smoothing::Block => Some(format!("local-{side}")),
    }
}

impl Int8Config {
    /// `None` for a word that is not one.
    fn choose(&mut self, word: &str) -> Option<Choice> {
        let Self { scores, pv } = self;
        match word {
            "smooth-k" | "local-k" => {
                scores.smooth_k = smoothing(word);
                return Some(Choice::SmoothK);
            }
            "smooth-q" | "local-q" => {
                scores.smooth_q = smoothing(word);
                return Some(Choice::SmoothQ);
            }
            "rotate" => {
                scores.rotate = true;
                return Some(Choice::Rotate);
            }
            "outliers" => {
                scores.outliers = true;
                return Some(Choice::Outliers);
            }
            _ => {}
        }
        if let Ok(precision) = word.parse() {
            *pv = precision;
            return Some(Choice::Pv);
        }
        if let Some(Sides(q, k)) = Sides::read(word) {
            (scores.q.scheme, scores.k.scheme) = (q, k);
            return Some(Choice::Scheme);
        }
        let Sides(q, k) = Sides::read(word)?;
        (scores.q.granularity, scores.k.granularity) = (q, k);
        Some(Choice::Granularity)
    }
}

impl fmt::Display for Int8Config {
    /// All choices, the smoothing that is off left out. Static ranges show as `static`, which cannot
    /// be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ScoreConfig { q, k, smooth_k, smooth_q, rotate, outliers } = &self.scores;
        write!(f, "{}+{}", Sides(q.scheme, k.scheme), Sides(q.granularity, k.granularity))?;
        let on = |on: bool, word: &str| on.then(|| word.to_string());
        let words = [
            on(self.is_static(), "static"),
            smoothing_word(*smooth_k, "k"),
            smoothing_word(*smooth_q, "q"),
            on(*rotate, "rotate"),
            on(*outliers, "outliers"),
        ];
        words.into_iter().flatten().try_for_each(|word| write!(f, "+{word}"))?;
        write!(f, "+{}", self.pv)
    }
}

impl Int8Config {
    fn is_static(&self) -> bool {
        [&self.scores.q, &self.scores.k].iter().any(|side| side.range != RangeSource::Dynamic)
    }
}

impl FromStr for Backend {
    type Err = Error;

    /// `fp32`, or the words of an [`Int8Config`].
    fn from_str(text: &str) -> Result<Self> {
        if text.trim() == "fp32" { Ok(Backend::Fp32) } else { Ok(Backend::Int8(text.parse()?)) }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Fp32 => f.write_str("fp32"),
            Backend::Int8(int8) => write!(f, "{int8}"),
        }
    }
}

/// A choice for queries and for keys.
#[derive(Clone, Copy, PartialEq)]
struct Sides<T>(T, T);

/// A choice that has a word.
trait Worded: Copy + PartialEq + FromStr + fmt::Display {
    fn word(self) -> String {
        self.to_string()
    }

    /// That of the keys behind a slash, where it does not repeat all of what is before it.
    fn read_keys(_queries: &str, word: &str) -> Option<Self> {
        word.parse().ok()
    }

    fn keys_word(self, _queries: Self) -> String {
        self.word()
    }
}

impl Worded for Scheme {}

impl Worded for Granularity {
    fn word(self) -> String {
        self.to_string().trim_start_matches("per-").to_string()
    }

    /// `block:128/64`.
    fn read_keys(queries: &str, word: &str) -> Option<Self> {
        let number = word.starts_with(|c: char| c.is_ascii_digit());
        match queries.contains(':') && number {
            true => format!("block:{word}").parse().ok(),
            false => word.parse().ok(),
        }
    }

    fn keys_word(self, queries: Self) -> String {
        match (queries, self) {
            (Granularity::PerBlock(_), Granularity::PerBlock(tokens)) => tokens.to_string(),
            _ => self.word(),
        }
    }
}

impl<T: Worded> Sides<T> {
    fn read(text: &str) -> Option<Self> {
        match text.split_once('/') {
            None => text.parse().ok().map(|both| Self(both, both)),
            Some((q, k)) => Some(Self(q.parse().ok()?, T::read_keys(q, k)?)),
        }
    }
}

impl<T: Worded> fmt::Display for Sides<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(q, k) = *self;
        f.write_str(&q.word())?;
        if k == q { Ok(()) } else { write!(f, "/{}", k.keys_word(q)) }
    }
}

impl<T: Worded> Serialize for Sides<T> {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de, T: Worded> Deserialize<'de> for Sides<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::read(&text)
            .ok_or_else(|| D::Error::custom(format!("{text:?}, expected one of {WORDS}")))
    }
}

/// The JSON form of an [`Int8Config`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Int8Form {
    scheme: Sides<Scheme>,
    granularity: Sides<Granularity>,
    smooth_k: Smoothing,
    smooth_q: Smoothing,
    rotate: bool,
    outliers: bool,
    pv: PvPrecision,
}

impl Int8Form {
    /// `None` for static ranges.
    fn of(config: &Int8Config) -> Option<Self> {
        let Int8Config { scores, pv } = config;
        let ScoreConfig { q, k, smooth_k, smooth_q, rotate, outliers } = scores;
        (!config.is_static()).then_some(Self {
            scheme: Sides(q.scheme, k.scheme),
            granularity: Sides(q.granularity, k.granularity),
            smooth_k: *smooth_k,
            smooth_q: *smooth_q,
            rotate: *rotate,
            outliers: *outliers,
            pv: *pv,
        })
    }

    fn config(self) -> Int8Config {
        let side =
            |scheme, granularity| QuantConfig { scheme, granularity, range: RangeSource::Dynamic };
        let Self { scheme, granularity, smooth_k, smooth_q, rotate, outliers, pv } = self;
        let (q, k) = (side(scheme.0, granularity.0), side(scheme.1, granularity.1));
        Int8Config { scores: ScoreConfig { q, k, smooth_k, smooth_q, rotate, outliers }, pv }
    }
}

const NO_STATIC: &str = "static ranges are not written with a configuration, but as a calibration";

impl Serialize for Int8Config {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        Int8Form::of(self).ok_or_else(|| S::Error::custom(NO_STATIC))?.serialize(to)
    }
}

impl<'de> Deserialize<'de> for Int8Config {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        Ok(Int8Form::deserialize(from)?.config())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::QuantParams;

    #[test]
    fn what_is_written_is_read_in_both_forms() {
        for words in [
            "symmetric+token+f32",
            "affine+tensor+smooth-k+auto",
            "symmetric/affine+head/token+smooth-k+smooth-q+int8",
            "symmetric+block:128/64+bf16",
            "symmetric+block:64+auto",
            "symmetric+block:64/tensor+auto",
        ] {
            let config: Int8Config = words.parse().unwrap();
            assert_eq!(config.to_string(), words);
            let backend: Backend = words.parse().unwrap();
            let json = serde_json::to_string(&backend).unwrap();
            assert_eq!(serde_json::from_str::<Backend>(&json).unwrap(), Backend::Int8(config));
        }
        assert_eq!("fp32".parse::<Backend>().unwrap(), Backend::Fp32);
        assert_eq!("default".parse::<Int8Config>().unwrap(), Int8Config::default());
        assert_eq!("sage".parse::<Int8Config>().unwrap(), Int8Config::sage());
        let sage = "block:128/64+smooth-k+f32".parse::<Int8Config>().unwrap();
        assert_eq!(sage, Int8Config::sage());
    }

    #[test]
    fn keys_that_mean_nothing_are_refused() {
        let read = |json: &str| serde_json::from_str::<Backend>(json);
        for backend in [Backend::Fp32, Backend::default()] {
            let mut json = serde_json::to_value(&backend).unwrap();
            assert_eq!(read(&json.to_string()).unwrap(), backend);
            json["smooth_v"] = true.into();
            let error = read(&json.to_string()).unwrap_err().to_string();
            assert!(error.contains("smooth_v"), "{error}");
        }
        let error = read(r#"{ "smooth_k": true, "backend": "fp32" }"#).unwrap_err().to_string();
        assert!(error.contains("key \"smooth_k\", but backend fp32"), "{error}");
        let mut json = serde_json::to_value(Backend::default()).unwrap();
        json["granularity"] = "block:0".into();
        let error = read(&json.to_string()).unwrap_err().to_string();
        assert!(error.contains("block:0"), "{error}");
    }

    #[test]
    fn static_ranges_are_not_lost_in_silence() {
        let mut config = Int8Config::plain();
        config.scores.q.range = RangeSource::Static(vec![QuantParams::symmetric(1.0).unwrap()]);
        assert!(serde_json::to_string(&config).unwrap_err().to_string().contains("calibration"));
        assert_eq!(config.to_string(), "symmetric+token+static+f32");
        assert!(config.to_string().parse::<Int8Config>().is_err());
    }

    #[test]
    fn unknown_words_are_named() {
        for (text, word) in [
            ("", "\"\""),
            ("token+", "\"\""),
            ("head/tokens", "head/tokens"),
            ("block:0", "block:0"),
            ("head/64", "head/64"),
        ] {
            let error = text.parse::<Int8Config>().unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("expected words"), "{text}: {error}");
        }
    }

    #[test]
    fn words_that_choose_the_same_are_named() {
        for (text, first, second) in [
            ("token+head", "token", "head"),
            ("block:64+smooth-k+block:64", "block:64", "block:64"),
            ("affine+token+symmetric", "affine", "symmetric"),
            ("smooth-k+smooth-k", "smooth-k", "smooth-k"),
            ("f32+token+auto", "f32", "auto"),
        ] {
            let error = text.parse::<Int8Config>().unwrap_err().to_string();
            assert!(error.contains(&format!("{first:?} and {second:?}")), "{text}: {error}");
        }
    }
}
