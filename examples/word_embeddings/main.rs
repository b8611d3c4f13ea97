//! Int8 attention on real word embeddings, stage by stage.
//!
//! Tokenizes a text, looks its word embeddings up, runs the attention block of one layer and then
//! the whole encoder with fp32 and with int8 scores, and prints ranges, scales and errors of every
//! stage, the drift of every head, and where one word looks. With `--compare`: one line for each
//! int8 configuration, over all layers.
//!
//! ```text
//! cargo run --release --example word_embeddings
//! cargo run --release --example word_embeddings -- The bank of the river --word bank
//! cargo run --release --example word_embeddings -- --file book.txt --compare
//! ```

mod args;
mod attended;
#[path = "../common/mod.rs"]
mod common;
mod compare;
mod heads;
mod measure;
mod report;
mod stages;
mod static_words;

use anyhow::Result;
use args::Args;
use candle_int8_attention::AttentionConfig;
use common::print::{finish, parse};
use common::windows::{Window, Windows};
use report::{Report, Subject};
use std::process::ExitCode;

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    let source = args.source()?;
    let (mut encoder, name) = args.model.encoder()?;
    encoder.model.set_linear(args.linear.precision)?;
    let model_name = name + &args.linear.suffix();
    let Windows { windows, tokens_lost } = Windows::of(&encoder, &source.text)?;
    let config = encoder.model.config();
    let subject = |used: &[Window]| Subject {
        text: source.name.clone(),
        tokens: used.iter().map(|window| window.tokens.len()).sum(),
        tokens_cut: tokens_lost
            + windows[used.len()..].iter().map(|window| window.tokens.len() - 2).sum::<usize>(),
        windows: used.len(),
        model: model_name.clone(),
        layers: config.num_hidden_layers,
        heads: config.num_attention_heads,
        head_dim: config.head_dim(),
    };
    if args.compare {
        let subject = subject(&windows);
        encoder.model.set_attention(&AttentionConfig::fp32());
        let comparison = compare::Comparison::of(&encoder.model, &windows, subject)?;
        return show(args, &comparison, compare::Comparison::render);
    }
    let subject = subject(&windows[..1]);
    let report = measure::report(args, &mut encoder, &windows[0], &source.text, subject)?;
    show(args, &report, Report::render)
}

fn show<T: serde::Serialize>(args: &Args, report: &T, render: fn(&T) -> String) -> Result<String> {
    Ok(if args.json { serde_json::to_string_pretty(report)? } else { render(report) })
}
