//! Attention and raw scores against their peers, in turns within one run.
//!
//! * `cargo bench --bench attention` prints tables: for every shape the median time of each
//!   contender, how many times as long as this crate it takes, and which fraction of the machine's
//!   limit this crate reaches.
//! * `-- --scaling` shows how time grows with the number of keys and shrinks with threads.
//! * `-- --memory` shows the peak memory of one call.
//! * `-- --serve` runs contenders one at a time for a driver: see `benches/peers`.
//!
//! The limit is the sum of what the parts of attention take at their instruction peaks, which are
//! measured in the same run: see `limit` and `peak`.

mod args;
mod contenders;
mod limit;
mod machine;
mod memory;
mod peak;
mod print;
mod scaling;
mod serve;
mod shape;
mod tables;
mod turns;

use anyhow::{Context, Result};
use args::Args;
use clap::Parser;
use serde::Serialize;
use std::path::Path;

fn main() -> Result<()> {
    let args = Args::parse();
    machine::set_threads(args.threads)?;
    let machine = machine::Machine::find()?;
    if args.mode.serve {
        return serve::run(&args, &machine);
    }
    println!("{machine}");
    if args.mode.scaling {
        write(&args, &machine, "scaling", &scaling::run(&args)?)
    } else if args.mode.memory {
        write(&args, &machine, "memory", &memory::run(&args)?)
    } else {
        write(&args, &machine, "tables", &tables::run(&args)?)
    }
}

/// Writes the JSON that `--json` asks for.
fn write(
    args: &Args,
    machine: &machine::Machine,
    mode: &str,
    results: &impl Serialize,
) -> Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    let report = serde_json::json!({
        "machine": machine,
        "dtype": args.dtype,
        "pv": args.pv,
        mode: results,
    });
    write_file(path, &serde_json::to_vec_pretty(&report)?)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
