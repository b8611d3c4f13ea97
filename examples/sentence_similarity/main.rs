//! How much int8 attention changes what a sentence encoder says about pairs of sentences.
//!
//! Embeds every sentence twice with the same weights, with attention in f32 and in int8, takes the
//! cosine of the two embeddings of each pair, and correlates it with scores that people gave.
//!
//! ```text
//! cargo run --release --example sentence_similarity
//! cargo run --release --example sentence_similarity -- --pairs my-pairs.tsv --json
//! cargo run --release --example sentence_similarity -- --layers found-by-search.json
//! cargo run --release --example sentence_similarity -- --precision int8
//! ```
//!
//! A line of the file is `score<TAB>sentence<TAB>sentence`, or `sentence<TAB>sentence` for a pair
//! without a score. The score is any finite number; larger means more similar.

#[path = "../common/mod.rs"]
mod common;
mod embed;
mod pairs;
mod report;

use anyhow::Result;
use candle_int8_attention::drift::metrics::{cosine, lowest};
use candle_int8_attention::models::LayerSettings;
use candle_int8_attention::{AttentionConfig, Int8Config};
use common::config::{QuantArgs, describe};
use common::model::ModelArgs;
use common::precision::PrecisionArgs;
use common::print::{finish, parse};
use report::{Report, Similarity, Subject};
use std::path::PathBuf;
use std::process::ExitCode;

/// Similarity of sentence pairs with fp32 and with int8 attention.
///
/// Without --pairs, ten built-in pairs are used; their scores are the author's own.
#[derive(Debug, clap::Parser)]
#[command(name = "sentence_similarity")]
struct Args {
    /// File of pairs (UTF-8), one a line: score<TAB>sentence<TAB>sentence, or
    /// sentence<TAB>sentence for a pair without a score
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,

    /// Print JSON; a correlation that is undefined is null
    #[arg(long)]
    json: bool,

    /// Take the attention of each layer, and the precision of each linear layer if it is there, from this file,
    /// which `search` writes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["QuantArgs", "precision"])]
    layers: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    /// Beside the int8 attention; beside that in f32 they are in f32.
    #[command(flatten)]
    linear: PrecisionArgs,

    #[command(flatten)]
    int8: QuantArgs,
}

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    let pairs = args.pairs.as_deref().map_or_else(|| Ok(pairs::built_in()), pairs::read)?;
    let report = compare(args, &pairs)?;
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render() })
}

fn compare(args: &Args, pairs: &[pairs::Pair]) -> Result<Report> {
    let corpus = embed::Corpus::of(pairs);
    let (mut encoder, model) = args.model.encoder()?;
    encoder.model.set_attention(&AttentionConfig::fp32());
    let fp32 = corpus.embed(&encoder)?;
    let mut config = match &args.layers {
        Some(file) => {
            LayerSettings::load(file)?.apply(&mut encoder)?;
            format!("layers as in {}", file.display())
        }
        None => {
            let scores = args.int8.scores();
            let name = describe(&scores, None);
            encoder.model.set_attention(&Int8Config { scores, ..Int8Config::default() }.into());
            encoder.model.set_linear(args.linear.precision)?;
            name
        }
    };
    config += &args.linear.suffix();
    let int8 = corpus.embed(&encoder)?;

    let cosines = fp32.iter().zip(&int8).map(|(a, b)| Ok(cosine(a, b)?));
    let min_cosine = lowest(cosines.collect::<Result<Vec<_>>>()?);
    let similarities = pairs
        .iter()
        .map(|pair| {
            let (a, b) = (corpus.index(&pair.a), corpus.index(&pair.b));
            Ok(Similarity::new(pair, cosine(&fp32[a], &fp32[b])?, cosine(&int8[a], &int8[b])?))
        })
        .collect::<Result<_>>()?;
    let subject = Subject {
        model,
        config,
        sentences: corpus.len(),
        sentences_cut: corpus.cut(&encoder)?,
        min_cosine,
    };
    Ok(Report::new(subject, similarities))
}
