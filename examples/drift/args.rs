//! The command line.

use crate::common::config::Int8Args;
use crate::common::shard::Shard;
use crate::common::text_model::TextModelArgs;
use anyhow::{Result, ensure};
use candle_int8_attention::PvPrecision;
use candle_int8_attention::drift::{Candidate, Gate};
use candle_int8_attention::nn::Precision;
use clap::Parser;
use std::path::PathBuf;
use std::str::FromStr;

/// What int8 attention changes in a model, on your own text.
///
/// Runs the model on every passage with fp32 and with int8 attention, and shows what differs per
/// layer and head, and why.
#[derive(Debug, Parser)]
#[command(name = "drift", args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,

    #[command(flatten)]
    pub run: RunArgs,

    #[command(flatten)]
    shared: SharedArgs,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Merge the JSON results of several runs: the parts of one text, or different texts
    Merge(MergeArgs),
}

#[derive(Debug, clap::Args)]
pub struct MergeArgs {
    /// Results that --json has written
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,

    #[command(flatten)]
    shared: SharedArgs,
}

/// What is measured.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Read the text from this file (UTF-8), passage by passage [default: the opening of Pride and
    /// Prejudice]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Read sentence pairs with scores instead: score<TAB>sentence<TAB>sentence; for encoders
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub pairs: Option<PathBuf>,

    /// Tokens of a passage, special ones included [default: as many as an encoder reads, 512 of a
    /// decoder]
    #[arg(long, value_name = "N", conflicts_with = "pairs")]
    pub passage_tokens: Option<usize>,

    /// Read only part I of N: every N-th passage
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    pub shard: Shard,

    /// Compare more configurations than bf16: these, as words joined by + that each choose something else, for
    /// example token+smooth-k+f32 or block:128/64+bf16; or sage (SageAttention's recipe), default;
    /// without any, a list of all that are worth it. One that is named twice runs once
    #[arg(long, value_name = "CONFIG", num_args = 0.., value_delimiter = ',')]
    pub compare: Option<Vec<Spec>>,

    /// Measure the linear layers of an encoder in this precision as well, int16 or int8, each product alone and
    /// with all before it
    #[arg(long, value_name = "PRECISION", value_parser = other_than_f32)]
    pub linear: Option<Precision>,

    #[command(flatten)]
    pub model: TextModelArgs,

    #[command(flatten)]
    pub int8: Int8Args,

    /// Precision of probabilities times values: auto, f32, bf16, int16 or int8
    #[arg(long, value_name = "PRECISION", default_value = "auto", help_heading = "Int8")]
    pub pv: PvPrecision,
}

/// The precision that linear layers are compared with is f32.
fn other_than_f32(text: &str) -> Result<Precision, String> {
    match text.parse() {
        Ok(Precision::F32) => {
            Err("linear layers are compared with f32, expected int16 or int8".into())
        }
        Ok(precision) => Ok(precision),
        Err(error) => Err(error.to_string()),
    }
}

impl RunArgs {
    /// The configurations to measure; the first is the one that the flags describe, bf16 is always beside it.
    pub fn candidates(&self) -> Vec<Candidate> {
        let mut all = vec![self.int8.candidate(self.pv), Candidate::bf16()];
        let others = match self.compare.as_deref() {
            None => Vec::new(),
            Some([]) => Candidate::all(),
            Some(specs) => specs.iter().map(|Spec(candidate)| candidate.clone()).collect(),
        };
        for other in others {
            if !all.iter().any(|known| known.is_same(&other)) {
                all.push(other);
            }
        }
        all
    }
}

/// A configuration of --compare.
#[derive(Debug, Clone)]
pub struct Spec(Candidate);

impl FromStr for Spec {
    type Err = candle_int8_attention::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.parse()?))
    }
}

/// What becomes of the results.
#[derive(Debug, clap::Args)]
pub struct SharedArgs {
    /// Print JSON, which `merge` reads; a number that is infinite or undefined is null
    #[arg(long)]
    pub json: bool,

    /// Write the report as one HTML page as well
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,

    /// TOML file of thresholds; the exit status is 2 if one does not hold. Its keys are the names
    /// of the flags below with _ for -, for example min_head_sqnr_db = 39
    #[arg(long, value_name = "FILE", help_heading = "Gate")]
    gate: Option<PathBuf>,

    /// Every layer's attention output: mean signal-to-noise ratio in dB at least
    #[arg(long, value_name = "DB", help_heading = "Gate", allow_negative_numbers = true)]
    min_layer_sqnr_db: Option<f64>,

    /// Every head's attention output: signal-to-noise ratio in dB at least
    #[arg(long, value_name = "DB", help_heading = "Gate", allow_negative_numbers = true)]
    min_head_sqnr_db: Option<f64>,

    /// Every head in every passage: cosine of the attention output at least
    #[arg(long, value_name = "X", help_heading = "Gate", allow_negative_numbers = true)]
    min_head_cosine: Option<f64>,

    /// Every head: mean KL divergence of the probabilities in nats at most
    #[arg(long, value_name = "NATS", help_heading = "Gate", allow_negative_numbers = true)]
    max_head_kl: Option<f64>,

    /// Every head: share of queries with the same most attended key at least
    #[arg(long, value_name = "SHARE", help_heading = "Gate", allow_negative_numbers = true)]
    min_head_top1: Option<f64>,

    /// Every head: the same of the five most attended keys
    #[arg(long, value_name = "SHARE", help_heading = "Gate", allow_negative_numbers = true)]
    min_head_top5: Option<f64>,

    /// What leaves every layer, each path on its own input: signal-to-noise ratio in dB at least
    #[arg(long, value_name = "DB", help_heading = "Gate", allow_negative_numbers = true)]
    min_accumulated_sqnr_db: Option<f64>,

    /// The model's embedding of every passage: cosine at least
    #[arg(long, value_name = "X", help_heading = "Gate", allow_negative_numbers = true)]
    min_embedding_cosine: Option<f64>,

    /// Every linear layer alone in the precision of --linear: signal-to-noise ratio of the embedding in dB
    /// at least
    #[arg(long, value_name = "DB", help_heading = "Gate", allow_negative_numbers = true)]
    min_linear_sqnr_db: Option<f64>,

    /// The embedding of every passage with all linear layers in that precision: cosine at least
    #[arg(long, value_name = "X", help_heading = "Gate", allow_negative_numbers = true)]
    min_linear_embedding_cosine: Option<f64>,
}

impl SharedArgs {
    /// The thresholds of the flags and of the file; a flag wins. None if there is none.
    pub fn gate(&self) -> Result<Option<Gate>> {
        let flags = Gate {
            min_layer_sqnr_db: self.min_layer_sqnr_db,
            min_head_sqnr_db: self.min_head_sqnr_db,
            min_head_cosine: self.min_head_cosine,
            max_head_kl: self.max_head_kl,
            min_head_top1: self.min_head_top1,
            min_head_top5: self.min_head_top5,
            min_accumulated_sqnr_db: self.min_accumulated_sqnr_db,
            min_embedding_cosine: self.min_embedding_cosine,
            min_linear_sqnr_db: self.min_linear_sqnr_db,
            min_linear_embedding_cosine: self.min_linear_embedding_cosine,
        };
        let gate = match &self.gate {
            Some(path) => flags.or(Gate::load(path)?),
            None if flags == Gate::default() => return Ok(None),
            None => flags,
        };
        gate.check()?;
        Ok(Some(gate))
    }
}

impl Args {
    /// The thresholds; an error for those of linear layers where none are measured.
    pub fn gate(&self) -> Result<Option<Gate>> {
        let gate = self.shared().gate()?;
        let of_linear =
            |gate: &Gate| gate.min_linear_sqnr_db.or(gate.min_linear_embedding_cosine).is_some();
        ensure!(
            self.command.is_some()
                || self.run.linear.is_some()
                || !gate.as_ref().is_some_and(of_linear),
            "the gate has thresholds of linear layers, which are measured with --linear int8 (or int16)"
        );
        Ok(gate)
    }

    /// What becomes of the results, with or without a subcommand.
    pub fn shared(&self) -> &SharedArgs {
        match &self.command {
            Some(Command::Merge(merge)) => &merge.shared,
            None => &self.shared,
        }
    }

    /// The files that are read, those of the model apart.
    pub fn inputs(&self) -> impl Iterator<Item = &PathBuf> {
        let read: &[PathBuf] = match &self.command {
            Some(Command::Merge(merge)) => &merge.files,
            None => &[],
        };
        let RunArgs { file, pairs, .. } = &self.run;
        read.iter().chain(file).chain(pairs).chain(&self.shared().gate)
    }
}
