//! The command line.

use crate::common::model::ModelArgs;
use crate::common::shard::Shard;
use candle_int8_attention::nn::Precision;
use std::path::PathBuf;

/// Embeddings of a file of texts, as many as there are.
#[derive(Debug, clap::Parser)]
#[command(name = "embed")]
pub struct Args {
    /// File with a text in each line (UTF-8), or with --field a JSON object in each line
    pub file: PathBuf,

    /// Take the text from this field of each line's JSON object
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,

    /// Write the embeddings to this file: tensors `embeddings` [texts, size] F32 and `bytes` [texts] I64
    /// (where in the file each line begins) if it ends in .safetensors; an object with `byte` and
    /// `embedding` a line if it ends in .jsonl
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,

    /// Scale each embedding to length 1
    #[arg(long)]
    pub normalize: bool,

    /// Embed only part I of N: the lines that begin in the I-th of N equal parts of the file's bytes.
    /// The parts follow each other in the order of the file
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    pub shard: Shard,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// Take the attention of each layer, and the precision of each linear layer if it is there, from this file,
    /// which `search` writes
    #[arg(long, value_name = "FILE", conflicts_with = "precision")]
    pub layers: Option<PathBuf>,

    #[command(flatten)]
    pub model: ModelArgs,

    /// In which numbers the linear layers compute: f32; int16, near exact; or int8, with attention in int8 as
    /// well
    #[arg(long, value_name = "PRECISION", default_value = "int16", help_heading = "Model")]
    pub precision: Precision,
}
