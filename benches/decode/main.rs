//! One query against a long cache, beside Candle's fp32 decode, in turns within one run.
//!
//! `cargo bench -p benches --bench decode` prints for each shape the median time of each contender, how many
//! times as long as the first it takes, the memory of its keys and values, and how fast it reads
//! them.

mod contenders;
mod serve;

use anyhow::{Context, Result};
use benches::options::Options;
use benches::turns::{Timing, in_turns};
use clap::Parser;
use contenders::Inputs;
use serde::Serialize;
use std::process::ExitCode;

/// Query heads, heads of keys and values, keys, head dim.
type Shape = [usize; 4];

/// The shapes of the README's table.
const SHAPES: [Shape; 2] = [[12, 12, 8192, 64], [32, 8, 8192, 128]];

/// Time one query against a cache of keys and values, in turns.
#[derive(Parser)]
struct Args {
    /// Shape H,H_kv,N,D; can be given several times. Default: the README's two shapes
    #[arg(long, value_parser = parse_shape)]
    shape: Vec<Shape>,

    /// Queries at a time; Candle's path for one query is another than that for several
    #[arg(long, default_value_t = 1)]
    queries: usize,

    /// Only contenders whose name contains this, for example int8 or Candle
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,

    /// Also write the results to this file as JSON
    #[arg(long)]
    json: Option<std::path::PathBuf>,

    /// Answer commands from stdin with lines of JSON, for a driver that takes turns with other
    /// programs; `help` lists the commands
    #[arg(long, conflicts_with_all = ["shape", "only", "json", "seconds", "after_silence", "short"])]
    serve: bool,

    #[command(flatten)]
    options: Options,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let wrong = || format!("{text:?}, expected four positive numbers H,H_kv,N,D");
    let numbers: Option<Vec<usize>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
    let shape: Shape = numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(wrong)?;
    if shape[0].is_multiple_of(shape[1]) { Ok(shape) } else { Err("H_kv must divide H".into()) }
}

/// One contender on one shape.
#[derive(Serialize)]
struct Entry {
    name: &'static str,
    seconds: Timing,
    /// How many times as long as the first contender.
    ratio: f64,
    /// Bytes of keys and values.
    memory: usize,
}

#[derive(Serialize)]
struct Outcome {
    /// `[H, H_kv, N, D]`.
    shape: Shape,
    queries: usize,
    entries: Vec<Entry>,
}

fn main() -> ExitCode {
    benches::end(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let machine = args.options.start()?;
    if args.serve {
        return serve::run(args.queries, &machine);
    }
    let shapes = match (args.shape.is_empty(), args.options.short) {
        (false, _) => args.shape.clone(),
        (true, true) => vec![[4, 2, 300, 32]],
        (true, false) => SHAPES.to_vec(),
    };
    println!("{machine}\n{} query, {}: median ms", args.queries, args.options.pace());
    let mut outcomes = Vec::new();
    for &shape in &shapes {
        let outcome = measure(shape, args)?;
        print(&outcome);
        outcomes.push(outcome);
    }
    if let Some(path) = &args.json {
        let report = serde_json::json!({ "machine": machine, "outcomes": outcomes });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn measure(shape: Shape, args: &Args) -> Result<Outcome> {
    let mut contenders = contenders::all(&Inputs::random(shape, args.queries)?)?;
    contenders.retain(|contender| contender.name.contains(&args.only));
    anyhow::ensure!(!contenders.is_empty(), "no contender's name contains {:?}", args.only);
    let mut calls: Vec<_> =
        contenders.iter_mut().map(|contender| || (contender.run)().map(drop)).collect();
    let timings: Vec<Timing> = in_turns(&mut calls, args.options.pace())
        .into_iter()
        .collect::<candle_core::Result<_>>()?;
    drop(calls);
    let first = timings[0].median;
    let entries = contenders.iter().zip(timings).map(|(contender, seconds)| Entry {
        name: contender.name,
        seconds,
        ratio: seconds.median / first,
        memory: contender.memory,
    });
    Ok(Outcome { shape, queries: args.queries, entries: entries.collect() })
}

fn print(outcome: &Outcome) {
    let [h, h_kv, n, d] = outcome.shape;
    println!("\n{h} heads, {h_kv} of keys and values, {n} keys of {d}");
    for entry in &outcome.entries {
        println!(
            "{:>24}  {:8.3} ({:.2}x)  best {:8.3}  {:6.1} MB  {:5.1} GB/s",
            entry.name,
            entry.seconds.median * 1e3,
            entry.ratio,
            entry.seconds.fastest * 1e3,
            entry.memory as f64 / 1e6,
            entry.memory as f64 / entry.seconds.median / 1e9,
        );
    }
}
