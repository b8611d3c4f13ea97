//! What int8 attention changes in a model, on your own text: per layer and head, with its causes.
//!
//! ```text
//! cargo run --release --example drift
//! cargo run --release --example drift -- --file book.txt --html report.html
//! cargo run --release --example drift -- --file book.txt --compare
//! cargo run --release --example drift -- --file book.txt --gate gate.toml
//! cargo run --release --example drift -- --file book.txt --linear int8
//! cargo run --release --example drift -- --file book.txt --model MODEL.gguf
//! ```
//!
//! The exit status is 2 if a threshold of the gate does not hold, and 1 for every other error. As
//! a step of a CI job that is all there is to do: `drift --file corpus.txt --gate gate.toml`, with
//! a file of thresholds such as
//!
//! ```toml
//! min_layer_sqnr_db = 44.0      # every layer, mean over its heads
//! min_head_sqnr_db = 39.0       # every head
//! max_head_kl = 1e-3
//! min_embedding_cosine = 0.9999 # every passage, int8 in all layers
//! ```
//!
//! A large corpus can be spread over machines, each of which reads every n-th passage. With GNU
//! parallel, or as a Slurm array whose tasks run one line each:
//!
//! ```text
//! parallel drift --file corpus.txt --shard {}/8 --json '>' part-{}.json ::: $(seq 8)
//! srun drift --file corpus.txt --shard $((SLURM_ARRAY_TASK_ID + 1))/8 --json > part-$SLURM_ARRAY_TASK_ID.json
//!
//! drift merge part-*.json --html report.html --gate gate.toml
//! ```
//!
//! The figures of merged parts are those of one run. Sums are kept with 32 digits and percentiles
//! as counts, so the order of merging does not show; only times differ, as from run to run.

mod args;
#[path = "../common/mod.rs"]
mod common;
mod output;
mod pairs;
mod results;
mod run;

use anyhow::ensure;
use args::{Args, Command};
use candle_int8_attention::drift::{Gate, Report};
use common::output::NewFile;
use common::print::{finish, parse, tell};
use output::render;
use std::io::Write;
use std::process::ExitCode;

/// What a gate's violation exits with.
const VIOLATED: u8 = 2;

fn main() -> ExitCode {
    match run(&parse::<Args>()) {
        Err(error) => finish(Err(error)),
        Ok((text, violations)) => {
            let printed = finish(Ok(text));
            if violations.is_empty() {
                return printed;
            }
            for violation in violations {
                tell(&format!("gate: {violation}"));
            }
            ExitCode::from(VIOLATED)
        }
    }
}

/// The report as text or JSON, and the thresholds that do not hold.
fn run(args: &Args) -> anyhow::Result<(String, Vec<String>)> {
    let shared = args.shared();
    let gate = args.gate()?;
    // Before the long run, so that it is not lost to a wrong path.
    let html = shared.html.as_deref().map(|path| NewFile::create(path, args.inputs()));
    let html = html.transpose()?;
    let results = match &args.command {
        Some(Command::Merge(merge)) => results::merge(&merge.files)?,
        None => run::record(&args.run)?,
    };
    let report = results.report();
    // A part of a corpus may be empty; a gate that saw nothing must not pass.
    ensure!(
        gate.is_none() || report.passages > 0,
        "no passage was measured, so no threshold holds"
    );
    if let Some(html) = html {
        let page = report.to_html()?;
        html.write(|file| Ok(file.write_all(page.as_bytes())?))?;
    }
    let text = if shared.json { results.to_json(&report)? } else { render(&report, gate.as_ref()) };
    Ok((text, violations(gate.as_ref(), &report)))
}

fn violations(gate: Option<&Gate>, report: &Report) -> Vec<String> {
    let found = gate.map_or_else(Vec::new, |gate| gate.violations(report));
    found.iter().map(ToString::to_string).collect()
}
