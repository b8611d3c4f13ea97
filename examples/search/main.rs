//! The cheapest attention of each layer that keeps a drift budget, as a file that models load; with
//! `--linear`, and the cheapest precision of each linear layer of an encoder.
//!
//! ```text
//! cargo run --release --example search -- --embedding 45
//! cargo run --release --example search -- --embedding 40 --linear --file book.txt --output layers.json
//! cargo run --release --example search -- --attention 44 --file book.txt --output layers.json
//! ```
//!
//! The settings are searched on one part of the text and verified on the other. If the budget is
//! not kept there, nothing is written and the exit status is 2. `--model` takes an encoder or a
//! decoder. A file that was written is loaded like this; a decoder then needs a cache by
//! `LlamaCache::full`, because an int8 cache has scales of its own:
//!
//! ```no_run
//! use candle_core::Device;
//! use candle_int8_attention::models::{LayerSettings, ModelFiles, TextEncoder};
//! use candle_int8_attention::nn::Precision;
//!
//! let files = ModelFiles::from_dir("models/paraphrase-MiniLM-L3-v2")?;
//! let mut encoder = TextEncoder::load_in(&files, &Device::Cpu, Precision::F32)?;
//! LayerSettings::load("layers.json")?.apply(&mut encoder)?;
//! # Ok::<(), candle_int8_attention::Error>(())
//! ```

#[path = "../common/mod.rs"]
mod common;
mod report;

use anyhow::{Context, Result, ensure};
use candle_int8_attention::drift::search::{Budget, SearchConfig, search};
use candle_int8_attention::nn::Precision;
use clap::{ArgGroup, Parser};
use common::output::check_writable;
use common::passages::PassageArgs;
use common::print::{finish, parse, tell};
use common::text_model::{Loaded, TextModelArgs};
use report::Report;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

/// The cheapest attention of each layer that keeps a drift budget, and with --linear the cheapest
/// precision of each linear layer.
///
/// Exit status 2: the settings that were found do not keep it on text that was not searched.
#[derive(Debug, Parser)]
#[command(name = "search")]
#[command(group = ArgGroup::new("budget").required(true))]
struct Args {
    /// Lowest signal-to-noise ratio of the embedding of a passage, in dB, all layers switched
    #[arg(long, value_name = "DB", group = "budget", allow_negative_numbers = true)]
    embedding: Option<f64>,

    /// Lowest signal-to-noise ratio of any layer's attention output, in dB, mean over heads, with
    /// fp32 input to the layer
    #[arg(long, value_name = "DB", group = "budget", allow_negative_numbers = true)]
    attention: Option<f64>,

    /// Choose the precision of each linear layer too, f32, int16 or int8, with --embedding; of an encoder
    #[arg(long, conflicts_with = "attention")]
    linear: bool,

    /// Aim this many dB above the budget: other text drifts a little more
    #[arg(long, value_name = "DB", default_value = "1", allow_negative_numbers = true)]
    margin: f64,

    /// Time every setting this often; the fastest counts
    #[arg(long, value_name = "N", default_value = "5")]
    rounds: usize,

    /// Write the settings to this file (JSON)
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Print JSON; an infinite ratio (no difference at all) is null
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    text: PassageArgs,

    #[command(flatten)]
    model: TextModelArgs,
}

/// The exit status of a budget that is not kept.
const NOT_KEPT: u8 = 2;

fn main() -> ExitCode {
    let mut kept = true;
    let report = run(&parse::<Args>()).map(|(report, text)| {
        kept = report.holds();
        text
    });
    match finish(report) {
        ExitCode::SUCCESS if !kept => ExitCode::from(NOT_KEPT),
        status => status,
    }
}

/// The report, and its text.
fn run(args: &Args) -> Result<(Report, String)> {
    let budget = match (args.embedding, args.attention) {
        (Some(db), _) => Budget::Embedding(db),
        (None, db) => Budget::AttentionOutput(db.unwrap_or_default()),
    };
    let inputs = args.text.file.iter().chain(&args.text.unseen);
    let target = args.output.as_deref().map(|path| check_writable(path, inputs)).transpose()?;
    let of_model = args.model.linear.precision;
    ensure!(
        !args.linear || of_model == Precision::F32,
        "--linear chooses the precision of linear layers, and --precision {of_model} says what it is; \
         expected one of the two"
    );
    let Loaded { mut model, name, .. } = args.model.load()?;
    let passages = args.text.read(&model)?;
    let linear = match args.linear {
        true => vec![Precision::Int8, Precision::Int16],
        false => Vec::new(),
    };
    let (margin_db, rounds) = (args.margin, args.rounds);
    let config = SearchConfig { margin_db, linear, rounds, ..SearchConfig::new(budget) };
    // For people who wait; a log file needs none of it.
    let waiting = std::io::stderr().is_terminal();
    let mut progress = |what: &str| {
        if waiting {
            tell(what);
        }
    };
    let texts = (passages.seen.as_slice(), passages.unseen.as_slice());
    let found = search(&mut model, texts, &config, &mut progress)
        .with_context(|| format!("cannot search {name}"))?;
    let mut report = Report::new(name, passages.summary, found);
    if let (Some(path), true) = (&target, report.holds()) {
        report.save(path)?;
        report.written = args.output.as_ref().map(|path| path.display().to_string());
    }
    let text = if args.json { serde_json::to_string_pretty(&report)? } else { report.render() };
    Ok((report, text))
}
