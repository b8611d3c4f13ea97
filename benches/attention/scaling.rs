//! How the time of attention grows with the number of tokens, and shrinks with threads.

use crate::args::Args;
use crate::contenders::{Contender, Inputs};
use crate::print::{self, milliseconds, percent, times};
use crate::shape::{README, Shape};
use anyhow::{Result, bail};
use benches::turns::{Timing, in_turns};
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;
use std::sync::Arc;

/// From here up, threads are expected to help, and time to grow with `M * N` alone.
const THREADS_HELP: usize = 512;
const STEADY: usize = 1024;

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
    smallest_speedup: Option<f64>,
    /// The largest `time / (M * N)` to the smallest, minus 1, among rows of the same `[B, H, D]` and
    /// at least 1024 tokens.
    variation: Option<f64>,
    variation_one_thread: Option<f64>,
}

#[derive(Serialize)]
struct Row {
    shape: Shape,
    one_thread: Timing,
    all_threads: Timing,
    /// One thread's time to that of all threads.
    speedup: f64,
}

/// Measures and prints; what is returned goes into the JSON.
pub fn run(args: &Args) -> Result<impl Serialize + use<>> {
    let threads = rayon::current_num_threads();
    if threads == 1 {
        bail!("--scaling compares one thread with several, but there is one: give --threads");
    }
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build().map(Arc::new);
    let pools = [pool(1)?, pool(threads)?];
    let rows: Vec<Row> = shapes(args)
        .into_iter()
        .map(|shape| measure(shape, &pools, args))
        .collect::<Result<_>>()?;
    print(&rows, threads, args);
    let long = rows.iter().filter(|row| row.shape.tokens() >= THREADS_HELP);
    let report = Report {
        smallest_speedup: long.map(|row| row.speedup).min_by(f64::total_cmp),
        variation: variation(&rows, |row| &row.all_threads),
        variation_one_thread: variation(&rows, |row| &row.one_thread),
        rows,
    };
    report.print_summary(threads);
    Ok(report)
}

/// The README's long shapes, and a series of `N` up to 16384.
fn shapes(args: &Args) -> Vec<Shape> {
    if !args.shape.is_empty() {
        return args.shape.clone();
    }
    if args.options.short {
        return [1024, 2048].map(|n| Shape([1, 1, n, 16])).to_vec();
    }
    let series = [1024, 2048, 4096, 8192, 16384].map(|n| Shape([1, 12, n, 64]));
    let long = |shape: &Shape| shape.tokens() >= THREADS_HELP && !series.contains(shape);
    README.into_iter().filter(long).chain(series).collect()
}

/// One thread and all of them, in turns.
fn measure(shape: Shape, pools: &[Arc<ThreadPool>; 2], args: &Args) -> Result<Row> {
    eprintln!("attention of {shape} ..");
    let inputs = Inputs::random(shape, args.dtype.candle())?;
    let mut contenders = pools.clone().map(|pool| {
        let (inputs, config) = (inputs.clone(), args.attention());
        Contender::new("ours", "this crate", move || pool.install(|| inputs.attend(&config)))
    });
    let mut calls = contenders.each_mut().map(|contender| || contender.call());
    let timings = in_turns(&mut calls, args.options.pace()).into_iter();
    let timings: Vec<Timing> = timings.collect::<candle_core::Result<_>>()?;
    let (one_thread, all_threads) = (timings[0], timings[1]);
    Ok(Row { shape, speedup: one_thread.median / all_threads.median, one_thread, all_threads })
}

impl Row {
    /// Seconds for each score of each head.
    fn per_score(&self, timing: &Timing) -> f64 {
        timing.median / self.shape.scores()
    }

    /// What has to be equal for times to be comparable score by score.
    fn series(&self) -> [usize; 3] {
        let [b, h, _, d] = self.shape.0;
        [b, h, d]
    }
}

/// How much `time / (M * N)` varies over the series that the last row belongs to.
fn variation(rows: &[Row], timing: impl Fn(&Row) -> &Timing) -> Option<f64> {
    let series = rows.last()?.series();
    let steady = |row: &&Row| row.series() == series && row.shape.tokens() >= STEADY;
    let times = || rows.iter().filter(steady).map(|row| row.per_score(timing(row)));
    let largest = times().max_by(f64::total_cmp)?;
    let smallest = times().min_by(f64::total_cmp)?;
    (times().count() > 1).then(|| largest / smallest - 1.0)
}

fn print(rows: &[Row], threads: usize, args: &Args) {
    println!(
        "\nAttention by this crate, {} in and out. Median ms ± half of the",
        args.dtype.name()
    );
    println!("interquartile range; ns for each of the B·H·N·N scores.\n");
    let all = format!("{threads} threads");
    let ns = ["1 thread, ns a score".to_string(), format!("{all}, ns a score")];
    let mut table = print::table(&[print::SHAPE, "1 thread", &all, "speedup", &ns[0], &ns[1]]);
    for row in rows {
        let time = |timing: &Timing| {
            format!("{} ±{}", milliseconds(timing.median), percent(timing.spread()))
        };
        let per_score = |timing: &Timing| format!("{:.3}", row.per_score(timing) * 1e9);
        table.add_row([
            row.shape.to_string(),
            time(&row.one_thread),
            time(&row.all_threads),
            times(row.speedup),
            per_score(&row.one_thread),
            per_score(&row.all_threads),
        ]);
    }
    println!("{table}\n");
}

impl Report {
    fn print_summary(&self, threads: usize) {
        if let Some(speedup) = self.smallest_speedup {
            println!(
                "smallest speedup with {threads} threads at N >= {THREADS_HELP}: {}",
                times(speedup)
            );
        }
        if let (Some(all), Some(one)) = (self.variation, self.variation_one_thread) {
            println!(
                "time for each score from N = {STEADY} up: the slowest N takes {} more than the \
                 fastest with {threads} threads, {} with one",
                percent(all),
                percent(one)
            );
        }
    }
}
