//! Attention and raw scores against their peers, in turns within one run.
//!
//! `cargo bench` prints a table for scores and one for attention: the median time of each
//! contender, how many times as long as this crate it takes, and which fraction of the machine's
//! instruction peaks (measured in the same run) this crate reaches.

mod contenders;
mod peak;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use clap::Parser;
use contenders::{Contender, Shape};
use peak::Peaks;
use serde::Serialize;
use std::time::{Duration, Instant};

/// The shapes of the README's table, `[B, H, N, D]`.
const SHAPES: [Shape; 7] = [
    [1, 4, 1024, 256],
    [1, 12, 128, 32],
    [1, 12, 512, 32],
    [8, 12, 128, 64],
    [1, 12, 512, 64],
    [1, 12, 2048, 64],
    [1, 8, 4096, 128],
];

/// Time attention and raw scores beside Candle and rten, in turns.
#[derive(Parser)]
struct Args {
    /// Shape B,H,N,D; can be given several times. Default: the README's seven shapes.
    #[arg(long, value_parser = parse_shape)]
    shape: Vec<Shape>,
    /// Threads; default: as rayon chooses (RAYON_NUM_THREADS or all cores).
    #[arg(long)]
    threads: Option<usize>,
    /// Small shapes and few rounds: shows that everything runs, not how fast.
    #[arg(long)]
    short: bool,
    /// Leave the peers out.
    #[arg(long)]
    alone: bool,
    /// Also write the results to this file as JSON.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// Seconds of measuring for each shape.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// What cargo adds when it runs a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let numbers: Option<Vec<usize>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| format!("{text:?}, expected four positive numbers B,H,N,D"))
}

/// One contender on one shape.
#[derive(Serialize)]
struct Timing {
    name: &'static str,
    /// Median seconds.
    seconds: f64,
    /// The fastest round: what a busy machine hides.
    best: f64,
    /// How many times as long as this crate.
    ratio: f64,
    rounds: usize,
}

#[derive(Serialize)]
struct Outcome {
    what: &'static str,
    shape: Shape,
    timings: Vec<Timing>,
    /// Of the instruction peaks, by this crate.
    fraction_of_peak: Option<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let threads = rayon::current_num_threads();
    let peaks = peak::measure();
    let shapes = match (args.shape.is_empty(), args.short) {
        (false, _) => args.shape.clone(),
        (true, true) => vec![[1, 2, 48, 32], [2, 3, 65, 50]],
        (true, false) => SHAPES.to_vec(),
    };
    let kernel = candle_int8_attention::gemm::active_kernel()?;
    println!("{threads} threads, int8 kernel {kernel}, peaks per core in GMAC/s: {peaks:?}");
    let mut outcomes = Vec::new();
    for what in ["scores", "attention"] {
        println!("\n{what}, f32 in and f32 out: median ms (times this crate)");
        for &shape in &shapes {
            let outcome = measure(what, shape, threads, &peaks, &args)?;
            print(&outcome);
            outcomes.push(outcome);
        }
        print_means(what, &outcomes);
    }
    if let Some(path) = &args.json {
        let report = serde_json::json!({ "threads": threads, "kernel": kernel, "peaks": peaks, "outcomes": outcomes });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn measure(
    what: &'static str,
    shape: Shape,
    threads: usize,
    peaks: &Peaks,
    args: &Args,
) -> Result<Outcome> {
    let tensor = || Tensor::randn(0f32, 1., &shape, &Device::Cpu);
    let (q, k, v) = (tensor()?, tensor()?, tensor()?);
    let mut contenders = match what {
        "scores" => contenders::scores(&q, &k)?,
        _ => contenders::attentions(&q, &k, &v)?,
    };
    if args.alone {
        contenders.truncate(1);
    }
    let budget = if args.short { 0.0 } else { args.seconds };
    let times = in_turns(&mut contenders, Duration::from_secs_f64(budget))?;
    let [b, h, n, d] = shape.map(|x| x as f64);
    let macs = b * h * n * n * d / threads as f64 / 1e9;
    let ideal = match what {
        "scores" => peaks.int8.map(|peak| macs / peak),
        _ => peaks.int8.zip(peaks.bf16.or(peaks.f32)).map(|(qk, pv)| macs / qk + macs / pv),
    };
    let fraction_of_peak = ideal.map(|ideal| ideal / times[0].seconds);
    let ours = times[0].seconds;
    let timings = contenders.iter().zip(&times).map(|(contender, times)| Timing {
        name: contender.name,
        ratio: times.seconds / ours,
        ..*times
    });
    Ok(Outcome { what, shape, timings: timings.collect(), fraction_of_peak })
}

/// Lets everyone run once to warm up, then in turns until the time is over, at least three times;
/// the timing of each, without name and ratio.
fn in_turns(contenders: &mut [Contender], budget: Duration) -> Result<Vec<Timing>> {
    let mut times = vec![Vec::new(); contenders.len()];
    for contender in contenders.iter_mut() {
        (contender.run)()?;
    }
    let start = Instant::now();
    while times[0].len() < 3 || start.elapsed() < budget {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (contender.run)()?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        Timing {
            name: "",
            seconds: times[times.len() / 2],
            best: times[0],
            ratio: 1.0,
            rounds: times.len(),
        }
    };
    Ok(times.iter_mut().map(median).collect())
}

fn print(outcome: &Outcome) {
    let [b, h, n, d] = outcome.shape;
    print!("{:>20}", format!("[{b},{h},{n},{d}]"));
    for timing in &outcome.timings {
        print!("  {} {:.3} ({:.2}x)", timing.name, timing.seconds * 1e3, timing.ratio);
    }
    match outcome.fraction_of_peak {
        Some(fraction) => println!("  {:.0} % of peak", fraction * 100.0),
        None => println!(),
    }
}

/// The geometric mean of each peer's ratio.
fn print_means(what: &str, outcomes: &[Outcome]) {
    let of_kind: Vec<&Outcome> = outcomes.iter().filter(|o| o.what == what).collect();
    print!("{:>20}", "geometric mean");
    for (i, timing) in of_kind[0].timings.iter().enumerate() {
        let logs: f64 = of_kind.iter().map(|o| o.timings[i].ratio.ln()).sum();
        print!("  {} {:.2}x", timing.name, (logs / of_kind.len() as f64).exp());
    }
    println!();
}
