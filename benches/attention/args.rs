//! The command line.

use crate::shape::{README, SHORT, Shape};
use benches::options::Options;
use candle_core::DType;
use candle_int8_attention::{AttentionConfig, Int8Config, PvPrecision};
use clap::{Parser, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// Time this crate's attention and raw scores beside Candle and rten-gemm, in turns within one run
#[derive(Debug, Parser)]
#[command(bin_name = "cargo bench -p benches --bench attention --")]
pub struct Args {
    /// Shape of queries, keys and values; can be given several times [default: the README's seven]
    #[arg(long, value_name = "B,H,N,D")]
    pub shape: Vec<Shape>,

    /// Measure one of the two
    #[arg(long, value_name = "WHAT")]
    pub only: Option<What>,

    /// Precision of probabilities times values in this crate
    #[arg(long, value_name = "PRECISION", default_value = "auto")]
    pub pv: Pv,

    /// Type of queries, keys, values and the output
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub dtype: Dtype,

    /// Leave the peers out
    #[arg(long)]
    pub alone: bool,

    /// Also write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    #[command(flatten)]
    pub mode: Mode,

    #[command(flatten)]
    pub options: Options,
}

/// What to do instead of the tables.
#[derive(Debug, clap::Args)]
#[group(multiple = false)]
pub struct Mode {
    /// Time for each score from N = 1024 to 16384, and one thread against all of them
    #[arg(long)]
    pub scaling: bool,

    /// Peak memory of attention beyond its inputs and its output, at [1, 12, 16384, 64] (Linux)
    #[arg(long)]
    pub memory: bool,

    /// Answer commands from stdin with lines of JSON, for a driver that takes turns with other
    /// programs; `help` lists the commands
    #[arg(long, conflicts_with_all = ["shape", "only", "seconds", "after_silence", "short", "alone", "json"])]
    pub serve: bool,
}

impl Args {
    /// The shapes to measure.
    pub fn shapes(&self) -> Vec<Shape> {
        match (self.shape.is_empty(), self.options.short) {
            (false, _) => self.shape.clone(),
            (true, true) => SHORT.to_vec(),
            (true, false) => README.to_vec(),
        }
    }

    /// The tables to print.
    pub fn tables(&self) -> Vec<What> {
        self.only.map_or(vec![What::Scores, What::Attention], |what| vec![what])
    }

    /// This crate's attention as asked for.
    pub fn attention(&self) -> AttentionConfig {
        let pv = match self.pv {
            Pv::Auto => PvPrecision::Auto,
            Pv::F32 => PvPrecision::F32,
            Pv::Bf16 => PvPrecision::Bf16,
            Pv::Int16 => PvPrecision::Int16,
        };
        let int8 = Int8Config { pv, ..Int8Config::default() };
        int8.into()
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Raw scores: q·k^T
    Scores,
    /// softmax(q·k^T / sqrt(D))·v
    Attention,
}

impl What {
    pub fn name(self) -> &'static str {
        match self {
            What::Scores => "scores",
            What::Attention => "attention",
        }
    }
}

/// The value of `--pv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pv {
    /// int16; bf16 on Arm where the hardware multiplies it
    Auto,
    F32,
    Bf16,
    Int16,
}

/// The value of `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    pub fn candle(self) -> DType {
        match self {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::Bf16 => DType::BF16,
        }
    }

    pub fn name(self) -> &'static str {
        self.candle().as_str()
    }
}
