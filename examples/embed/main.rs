//! Embeddings of a file of texts, as many as there are.
//!
//! ```text
//! cargo run --release --example embed -- lines.txt --output lines.safetensors
//! cargo run --release --example embed -- corpus.jsonl --field text --precision int8 --normalize \
//!     --output corpus-embeddings.jsonl --json
//! ```
//!
//! For a corpus that is too large for one machine, each embeds its part, which is a file of its own:
//!
//! ```text
//! embed corpus.txt --shard $((SLURM_ARRAY_TASK_ID + 1))/64 --output part-$SLURM_ARRAY_TASK_ID.safetensors
//! ```
//!
//! Texts are read as they are needed, and embeddings are written as they come, so that memory does not depend
//! on the size of the file. The output takes its name when it is complete.

mod args;
#[path = "../common/mod.rs"]
mod common;
mod input;
mod output;
mod report;

use anyhow::{Result, bail};
use args::Args;
use candle_int8_attention::models::LayerSettings;
use common::model::shown;
use common::output::NewFile;
use common::print::{finish, parse};
use common::progress::progress_bar;
use input::Texts;
use output::Embeddings;
use report::Report;
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    // What cannot be read or written is known before the model is loaded.
    let texts = Texts::open(&args.file, args.field.as_deref(), args.shard)?;
    let target = NewFile::create(&args.output, [&args.file])?;
    let format = output::Format::of(&args.output)?;
    let (mut encoder, model) = args.model.encoder()?;
    match &args.layers {
        Some(file) => LayerSettings::load(file)?.apply(&mut encoder)?,
        None => encoder.set_precision(args.precision)?,
    }

    let (start, progress) = (Instant::now(), progress_bar(texts.bytes()));
    let mut report = Report::new(args, model);
    target.write(|file| {
        let mut out = Embeddings::new(file, format, encoder.embedding_size())?;
        for embedding in encoder.embed(texts.iter()) {
            let mut embedding = embedding?;
            if args.normalize {
                normalize(&mut embedding.vector);
            }
            report.add(&embedding);
            out.write(texts.next_place(), &embedding.vector)?;
            if report.texts.is_multiple_of(256) {
                progress.set_position(texts.read());
                progress.set_message(report.rate(start.elapsed()));
            }
        }
        texts.finish()?;
        // A part of a short file may hold no line; a field that nobody has is a mistake.
        if report.texts == 0 && (args.shard.count == 1 || texts.counts().no_field > 0) {
            bail!("no text in {}: {}", shown(&args.file), texts.counts());
        }
        out.finish()
    })?;
    progress.finish_and_clear();
    report.finish(start.elapsed(), texts.counts());
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render() })
}

/// To length 1; zeros stay zeros.
fn normalize(vector: &mut [f32]) {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x /= length);
    }
}
