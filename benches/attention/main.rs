//! Attention and raw scores against their peers, in turns within one run.
//!
//! * `cargo bench -p benches --bench attention` prints tables: for every shape the median time of each
//!   contender, how many times as long as this crate it takes, and which fraction of the machine's
//!   limit this crate reaches. `--after-silence` has the first call after 100 ms of silence, as a server
//!   sees it, and `--level NAME` forces a level of the processor.
//! * `-- --scaling` shows how time grows with the number of keys and shrinks with threads.
//! * `-- --memory` shows the peak memory of one call.
//! * `-- --serve` runs contenders one at a time for a driver: see `benches/peers`.
//!
//! The limit is the sum of what the parts of attention take at their instruction peaks, which are
//! measured in the same run: see `limit` and `peak`.

mod args;
mod contenders;
mod fresh;
mod limit;
mod memory;
mod peak;
mod print;
mod scaling;
mod serve;
mod shape;
mod tables;

use anyhow::{Context, Result};
use args::Args;
use clap::Parser;
use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    benches::end(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let machine = args.options.start()?;
    if args.mode.serve {
        return serve::run(args, &machine);
    }
    // Before anything is measured: a file that cannot be written should not cost minutes.
    let json = args.json.as_deref().map(create).transpose()?;
    println!("{machine}");
    let (mode, results) = if args.mode.scaling {
        ("scaling", serde_json::to_value(scaling::run(args)?)?)
    } else if args.mode.memory {
        ("memory", serde_json::to_value(memory::run(args)?)?)
    } else {
        ("comparison", serde_json::to_value(tables::run(args, machine.level)?)?)
    };
    if let Some(file) = json {
        let report = serde_json::json!({
            "machine": machine,
            "dtype": args.dtype,
            "pv": args.pv,
            mode: results,
        });
        serde_json::to_writer_pretty(file, &report).context("cannot write the JSON")?;
    }
    Ok(())
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))
}
