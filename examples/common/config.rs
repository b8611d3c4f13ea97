//! Flags that choose how scores are computed in int8.

use candle_int8_attention::drift::Candidate;
use candle_int8_attention::quant::{Granularity, QuantConfig, Scheme, Smoothing};
use candle_int8_attention::{Int8Config, PvPrecision, RequantConfig, ScoreConfig};
use std::str::FromStr;

/// How queries and keys become int8, and what becomes of their int32 product.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Int8")]
pub struct Int8Args {
    #[command(flatten)]
    pub quant: QuantArgs,

    /// What becomes of the int32 scores: dequantized, or requantized[:tensor|head|token] (to int8
    /// and back, with one scale for each of these)
    #[arg(long, value_name = "HOW", default_value = "dequantized")]
    pub output: Output,
}

impl Int8Args {
    /// The configuration that these flags describe, with this precision of P·V.
    pub fn candidate(&self, pv: PvPrecision) -> Candidate {
        let config = Int8Config { scores: self.quant.scores(), pv };
        let candidate = Candidate { requant: self.output.0.clone(), ..Candidate::default() };
        let is_default = config == Int8Config::default() && candidate.requant.is_none();
        let name = if is_default { "default" } else { "chosen" };
        Candidate { name: name.into(), config, ..candidate }
    }
}

/// How queries and keys become int8.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Int8")]
pub struct QuantArgs {
    /// affine (the range need not be centred on zero) or symmetric (it is)
    #[arg(long, value_name = "SCHEME", default_value = "affine")]
    pub scheme: Scheme,

    /// What shares one scale: tensor, head, token or block:N (N tokens); or, as reports write it,
    /// per-tensor, per-head, per-token or per-block:N
    #[arg(long, value_name = "WHAT", default_value = "token")]
    pub granularity: Granularity,

    /// What is subtracted from the keys before they are quantized: none, head (the mean of all that are
    /// seen) or block (the mean of 64)
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_value = "block",
        default_missing_value = "block", overrides_with = "no_smooth_k")]
    pub smooth_k: Smoothing,

    /// Subtract nothing from the keys
    #[arg(long)]
    pub no_smooth_k: bool,

    /// What is subtracted from the queries: none, head or block (the mean of 48)
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_value = "block",
        default_missing_value = "block", overrides_with = "no_smooth_q")]
    pub smooth_q: Smoothing,

    /// Subtract nothing from the queries
    #[arg(long)]
    pub no_smooth_q: bool,

    /// Quantize queries and keys without rotating them before
    #[arg(long)]
    pub no_rotate: bool,

    /// Quantize keys that stand out like all others
    #[arg(long)]
    pub no_outliers: bool,
}

impl QuantArgs {
    /// The options that ask for something else than the default.
    pub fn chosen(&self) -> Vec<&'static str> {
        let default = ScoreConfig::default().q;
        let options = [
            ("--scheme", self.scheme != default.scheme),
            ("--granularity", self.granularity != default.granularity),
            ("--smooth-k", !self.no_smooth_k && self.smooth_k != Smoothing::Block),
            ("--no-smooth-k", self.no_smooth_k),
            ("--smooth-q", !self.no_smooth_q && self.smooth_q != Smoothing::Block),
            ("--no-smooth-q", self.no_smooth_q),
            ("--no-rotate", self.no_rotate),
            ("--no-outliers", self.no_outliers),
        ];
        options.into_iter().filter_map(|(name, chosen)| chosen.then_some(name)).collect()
    }

    /// Scores that are quantized so.
    pub fn scores(&self) -> ScoreConfig {
        let side = QuantConfig {
            scheme: self.scheme,
            granularity: self.granularity,
            ..QuantConfig::default()
        };
        ScoreConfig {
            q: side.clone(),
            k: side,
            smooth_k: if self.no_smooth_k { Smoothing::None } else { self.smooth_k },
            smooth_q: if self.no_smooth_q { Smoothing::None } else { self.smooth_q },
            rotate: !self.no_rotate,
            outliers: !self.no_outliers,
        }
    }
}

/// The value of `--output`.
#[derive(Debug, Clone)]
pub struct Output(Option<RequantConfig>);

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let granularity = match text {
            "dequantized" => return Ok(Self(None)),
            "requantized" | "requantized:token" => Granularity::PerToken,
            "requantized:tensor" => Granularity::PerTensor,
            "requantized:head" => Granularity::PerHead,
            _ => return Err("expected dequantized or requantized[:tensor|head|token]".into()),
        };
        Ok(Self(Some(RequantConfig { granularity, ..RequantConfig::default() })))
    }
}

/// A configuration in words: `symmetric, per-token, smoothed by block, rotated, dequantized`.
pub fn describe(config: &ScoreConfig, requant: Option<&RequantConfig>) -> String {
    let mut words = vec![config.q.scheme.to_string(), config.q.granularity.to_string()];
    if config.k.granularity != config.q.granularity {
        words.push(format!("keys {}", config.k.granularity));
    }
    match (config.smooth_k, config.smooth_q) {
        (Smoothing::None, Smoothing::None) => {}
        (k, q) if k == q => words.push(format!("smoothed by {k}")),
        (k, q) => words.push(format!("K smoothed by {k}, Q by {q}")),
    }
    words.extend(config.rotate.then(|| "rotated".to_string()));
    words.extend(config.outliers.then(|| "outliers apart".to_string()));
    words.push(match requant {
        Some(to) => format!("requantized {}", to.granularity),
        None => "dequantized".to_string(),
    });
    words.join(", ")
}
