//! The command line.

use crate::common::config::Int8Args;
use crate::common::model::ModelArgs;
use crate::common::precision::PrecisionArgs;
use crate::common::text::read;
use anyhow::{Result, ensure};
use candle_int8_attention::PvPrecision;
use candle_int8_attention::drift::Candidate;
use clap::Parser;
use std::path::PathBuf;

/// Int8 attention on real word embeddings: every stage, its scales, and what it costs in accuracy.
///
/// Looks the word embeddings of a text up, runs the attention block of one layer and then the
/// whole encoder with fp32 and with int8 scores, and prints what differs.
#[derive(Debug, Parser)]
#[command(name = "word_embeddings")]
pub struct Args {
    /// The text; several words are joined [default: a passage of Pride and Prejudice]
    pub text: Vec<String>,

    /// Read the text from this file (UTF-8)
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    pub file: Option<PathBuf>,

    /// Layer whose attention block is shown, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "compare")]
    pub layer: usize,

    /// Head whose attended words are shown, counted from 0 [default: the head int8 hurts most]
    #[arg(long, value_name = "N", conflicts_with = "compare")]
    pub head: Option<usize>,

    /// Word whose attended words are shown [default: the longest word of the text]
    #[arg(long, conflicts_with = "compare")]
    pub word: Option<String>,

    /// How many attended words are shown
    #[arg(long, value_name = "N", default_value_t = 5, conflicts_with = "compare",
        value_parser = clap::value_parser!(u16).range(1..))]
    pub top: u16,

    /// Compare int8 configurations over all layers, and print nothing else
    #[arg(
        long,
        conflicts_with_all = [
            "scheme", "granularity", "smooth_k", "no_smooth_k", "smooth_q", "no_smooth_q",
            "no_rotate", "no_outliers", "output",
        ]
    )]
    pub compare: bool,

    /// Print JSON; an infinite ratio (nothing differs) is null
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    /// With fp32 and with int8 attention alike.
    #[command(flatten)]
    pub linear: PrecisionArgs,

    /// Folder with the static GloVe word embeddings
    #[arg(long, value_name = "DIR", help_heading = "Model", conflicts_with = "compare")]
    pub glove: Option<PathBuf>,

    #[command(flatten)]
    pub int8: Int8Args,
}

const PASSAGE: &str = include_str!("../data/pride-and-prejudice.txt");

/// A text and where it comes from.
pub struct Source {
    pub name: String,
    pub text: String,
}

impl Args {
    /// The configuration that is shown.
    pub fn candidate(&self) -> Candidate {
        self.int8.candidate(PvPrecision::default())
    }

    /// The text to work on.
    pub fn source(&self) -> Result<Source> {
        let (name, text) = match (&self.file, self.text.is_empty()) {
            (Some(file), _) => (file.display().to_string(), read(file)?),
            (None, true) => ("Pride and Prejudice, chapter 1 (built in)".into(), PASSAGE.into()),
            (None, false) => ("from the command line".into(), self.text.join(" ")),
        };
        ensure!(!text.trim().is_empty(), "the text is empty ({name})");
        Ok(Source { name, text })
    }
}
