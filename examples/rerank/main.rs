//! Passages in the order of how well they answer a query, by a cross-encoder, with fp32 and with int8
//! attention side by side.
//!
//! Query and passage are read by the model as one sequence, so a passage is scored anew for every
//! query: this is for the best few hundred that a faster search has found.
//!
//! ```text
//! cargo run --release --example rerank -- --model ms-marco-MiniLM-L6-v2 \
//!     --query "How many people live in Berlin?" --passages passages.txt
//! cargo run --release --features hub --example rerank -- \
//!     --model-id cross-encoder/ms-marco-MiniLM-L6-v2 --query "..." --passages passages.txt --json
//! ```
//!
//! A line of the file is a passage; empty lines are skipped.

#[path = "../common/mod.rs"]
mod common;
mod report;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candle_int8_attention::Int8Config;
use candle_int8_attention::models::SequenceClassifier;
use common::config::{QuantArgs, describe};
use common::model::ModelArgs;
use common::precision::PrecisionArgs;
use common::print::{finish, parse};
use common::text;
use report::{Passage, Report};
use std::path::PathBuf;
use std::process::ExitCode;

/// Pairs of a batch.
const BATCH: usize = 32;

/// Ranks passages by how well they answer a query.
#[derive(Debug, clap::Parser)]
#[command(name = "rerank")]
struct Args {
    /// What is asked
    #[arg(long, value_name = "TEXT")]
    query: String,

    /// File of passages (UTF-8), one a line
    #[arg(long, value_name = "FILE")]
    passages: PathBuf,

    /// Show the best N passages; JSON holds all
    #[arg(long, value_name = "N", default_value = "10")]
    top: usize,

    /// Print JSON
    #[arg(long)]
    json: bool,

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
    ensure!(!args.query.trim().is_empty(), "the query is empty");
    let passages = read(args)?;
    ensure!(
        args.model.is_given(),
        "name a cross-encoder with --model or --model-id, for example \
         cross-encoder/ms-marco-MiniLM-L6-v2: the model of this project embeds texts"
    );
    let (files, name) = args.model.files()?;
    let mut model = SequenceClassifier::load(&files, &Device::Cpu)
        .with_context(|| format!("cannot load the cross-encoder {name}"))?;
    let labels = model.labels();
    ensure!(
        labels.len() == 1,
        "{name} tells {} labels apart ({}), expected a cross-encoder, which has one",
        labels.len(),
        labels.join(", ")
    );
    let (fp32, truncated) = scores(&model, &args.query, &passages)?;
    let int8_scores = args.int8.scores();
    let config = describe(&int8_scores, None) + &args.linear.suffix();
    model.model.set_linear(args.linear.precision)?;
    model.model.set_attention(&Int8Config { scores: int8_scores, ..Int8Config::default() }.into());
    let (int8, _) = scores(&model, &args.query, &passages)?;

    let passages = passages.into_iter().zip(fp32.into_iter().zip(int8));
    let passages =
        passages.map(|((line, text), (fp32, int8))| Passage::new(line, text, fp32, int8));
    let report = Report::new(name, config, args.query.clone(), truncated, passages.collect());
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render(args.top) })
}

/// The passages with the numbers of their lines.
fn read(args: &Args) -> Result<Vec<(usize, String)>> {
    let text = text::read(&args.passages)?;
    let lines = (1..).zip(text.lines()).map(|(number, line)| (number, line.trim().to_string()));
    let passages: Vec<_> = lines.filter(|(_, line)| !line.is_empty()).collect();
    ensure!(!passages.is_empty(), "{}: no passage in it", args.passages.display());
    Ok(passages)
}

/// The score of each passage, and how many were too long. Passages of similar length share a batch,
/// so that little is computed for padding.
fn scores(
    model: &SequenceClassifier,
    query: &str,
    passages: &[(usize, String)],
) -> Result<(Vec<f32>, usize)> {
    let mut order: Vec<usize> = (0..passages.len()).collect();
    order.sort_by_key(|&i| passages[i].1.len());
    let (mut scores, mut truncated) = (vec![0.0; passages.len()], 0);
    for rows in order.chunks(BATCH) {
        let pairs: Vec<(&str, &str)> =
            rows.iter().map(|&i| (query, passages[i].1.as_str())).collect();
        let batch = model.tokenize_pairs(&pairs)?;
        truncated += batch.truncated.iter().filter(|&&tokens| tokens > 0).count();
        let found = model.scores(&batch)?.flatten_all()?.to_vec1::<f32>()?;
        for (&i, score) in rows.iter().zip(found) {
            scores[i] = score;
        }
    }
    Ok((scores, truncated))
}
