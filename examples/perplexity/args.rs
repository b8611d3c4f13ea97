//! The command line.

use crate::common::cache::{CacheArgs, Keys};
use crate::common::config::{QuantArgs, describe};
use crate::common::llama::LlamaArgs;
use crate::common::model::{project_file, shown};
use crate::common::text;
use anyhow::{Result, bail};
use candle_int8_attention::models::llama::LlamaModel;
use candle_int8_attention::{Int8Config, ScoreConfig};
use std::path::PathBuf;

/// What is read without `--file`.
const BUILT_IN: &str = "examples/data/pride-and-prejudice.txt";

/// Perplexity of a text with fp32 and with int8 attention, and how far predictions move.
#[derive(Debug, clap::Parser)]
#[command(name = "perplexity")]
pub struct Args {
    /// Text (UTF-8) to predict [default: the opening of Pride and Prejudice]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Tokens of a window; those of its second half are predicted [default: 512, or the whole text
    /// if that is shorter]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,

    /// At most this number of windows [default: as many as the text has]
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: LlamaArgs,

    #[command(flatten)]
    pub cache: CacheArgs,

    #[command(flatten)]
    pub int8: QuantArgs,
}

impl Args {
    /// The text, and a name for people.
    pub fn text(&self) -> Result<(String, String)> {
        let path = self.file.clone().unwrap_or_else(|| project_file(BUILT_IN));
        let name = shown(&path);
        Ok((text::read(&path)?, name))
    }

    /// Switches all layers to int8.
    pub fn to_int8(&self, model: &mut LlamaModel) -> Result<()> {
        let scores = self.int8.scores();
        if self.cache.cache == Keys::Int8 && scores != ScoreConfig::default() {
            bail!(
                "--scheme, --granularity, --smooth-k, --smooth-q, --no-rotate and --no-outliers are for \
                 keys that are quantized with every call, expected --cache f32"
            );
        }
        model.set_attention(&Int8Config { scores, ..Int8Config::default() }.into());
        self.cache.apply(model, None)
    }

    /// What int8 means, in words.
    pub fn describe_int8(&self) -> String {
        match self.cache.cache {
            Keys::Int8 => format!("cache with {}", self.cache.describe()),
            Keys::F32 => {
                format!(
                    "{}; cache with {}",
                    describe(&self.int8.scores(), None),
                    self.cache.describe()
                )
            }
        }
    }
}
