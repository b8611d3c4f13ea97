//! Flags.

use crate::common::config::QuantArgs;
use crate::input::Inputs;
use anyhow::ensure;
use candle_int8_attention::{AttentionConfig, AttentionSpec, Int8Config, PvPrecision, ScoreConfig};
use std::path::PathBuf;
use std::str::FromStr;

/// Int8 attention on dumped tensors, and its drift against fp32.
///
/// The input holds q [B, H, M, D], k [B, H_kv, N, D], v [B, H_kv, N, Dv], and optionally mask (BOOL
/// or U8: non-zero = attend; or floats that are added; broadcast to [B, H, M, N]), kv_lens [B], and
/// past_k and past_v, which go before k and v.
#[derive(Debug, clap::Parser)]
#[command(name = "attend")]
pub struct Args {
    /// Safetensors file with q, k, v, and optionally mask, kv_lens, past_k and past_v
    #[arg(long, value_name = "FILE")]
    pub input: PathBuf,

    /// Write a safetensors file with out [B, H, M, Dv], f32
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Write scores [B, H, M, N] too: scale * q·k^T, before softcap, masks and softmax
    #[arg(long, requires = "output")]
    pub save_scores: bool,

    /// Print JSON; a number that is infinite (no difference at all) or undefined is null
    #[arg(long)]
    pub json: bool,

    /// Who computes the output; the options under Int8 are for int8 alone
    #[arg(long, value_name = "WHO", value_enum, default_value = "int8")]
    pub backend: BackendName,

    #[command(flatten)]
    pub attention: AttentionArgs,

    #[command(flatten)]
    pub quant: QuantArgs,

    /// How probabilities are multiplied with values in int8 attention: auto (int16, or bf16
    /// where an Arm CPU multiplies it), f32, bf16, int16 or int8
    #[arg(long, value_name = "HOW", default_value = "auto", help_heading = "Int8")]
    pub pv: PvPrecision,
}

/// What is computed, whoever computes it.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Attention")]
pub struct AttentionArgs {
    /// Factor on q·k^T [default: 1 / sqrt(D)]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub scale: Option<f32>,

    /// Query i sees keys j <= i
    #[arg(long)]
    pub causal: bool,

    /// Query i sees keys j <= i + N; `end`: the last query of a sequence sees all of its keys
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub causal_offset: Option<CausalOffset>,

    /// Bend scaled scores: X * tanh(score / X); 0 is off
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub softcap: Option<f32>,

    /// A query sees at most N keys before its position
    #[arg(long, value_name = "N")]
    pub window_left: Option<usize>,

    /// A query sees at most N keys after its position
    #[arg(long, value_name = "N")]
    pub window_right: Option<usize>,
}

impl AttentionArgs {
    /// The offset of the causal rule, if there is one.
    pub fn causal_offset(&self) -> Option<CausalOffset> {
        self.causal_offset.or(self.causal.then_some(CausalOffset::Keys(0)))
    }

    pub fn softcap(&self) -> Option<f32> {
        self.softcap.filter(|&cap| cap != 0.0)
    }
}

impl Args {
    /// Refuses choices of int8 where nothing is computed in int8.
    pub fn check(&self) -> anyhow::Result<()> {
        let mut chosen = self.quant.chosen();
        chosen.extend((self.pv != PvPrecision::default()).then_some("--pv"));
        ensure!(
            self.backend == BackendName::Int8 || chosen.is_empty(),
            "{}: for int8 attention only, but --backend is fp32",
            chosen.join(", ")
        );
        Ok(())
    }

    pub fn scores(&self) -> ScoreConfig {
        self.quant.scores()
    }

    /// The factor on `q·k^T`.
    pub fn scale(&self, inputs: &Inputs) -> candle_core::Result<f32> {
        let depth = inputs.q.dim(3)?.max(1);
        Ok(self.attention.scale.unwrap_or(1.0 / (depth as f32).sqrt()))
    }

    /// `config` with scale and softcap.
    fn with_numbers(&self, config: AttentionConfig) -> AttentionConfig {
        let (softmax_scale, softcap) = (self.attention.scale, self.attention.softcap());
        let spec = AttentionSpec { softmax_scale, softcap, ..config.spec };
        AttentionConfig { spec, ..config }
    }

    /// Int8 attention without any mask.
    pub fn int8(&self) -> AttentionConfig {
        self.with_numbers(Int8Config { scores: self.scores(), pv: self.pv }.into())
    }

    /// Fp32 attention without any mask.
    pub fn fp32(&self) -> AttentionConfig {
        self.with_numbers(AttentionConfig::fp32())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendName {
    Int8,
    Fp32,
}

/// Where the causal rule is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CausalOffset {
    /// Query 0 stands at this key.
    Keys(isize),
    /// The last query stands at the last key of its sequence.
    End,
}

impl FromStr for CausalOffset {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("end", _) => Ok(Self::End),
            (_, Ok(keys)) => Ok(Self::Keys(keys)),
            (_, Err(_)) => Err("expected a whole number or end".to_string()),
        }
    }
}
