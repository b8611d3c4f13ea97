//! One query against a long cache, beside Candle's fp32 decode, in turns within one run.
//!
//! `cargo bench -p benches --bench decode` prints for each shape the median time of each contender, how many
//! times as long as the first it takes, the memory of its keys and values, and how fast it reads
//! them.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, CacheValues, Int8KvCache, KvCacheConfig,
};
use candle_nn::attention::cpu_flash::causal::run_causal_attn_cpu;
use clap::Parser;
use serde::Serialize;
use std::time::{Duration, Instant};

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

    /// Threads; default: as rayon chooses (RAYON_NUM_THREADS or all cores)
    #[arg(long)]
    threads: Option<usize>,

    /// Small shapes and few rounds: shows that everything runs, not how fast
    #[arg(long)]
    short: bool,

    /// Only contenders whose name contains this, for example int8 or Candle
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,

    /// Also write the results to this file as JSON
    #[arg(long)]
    json: Option<std::path::PathBuf>,

    /// Seconds of measuring for each shape
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,

    /// What cargo adds when it runs a bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let wrong = || format!("{text:?}, expected four positive numbers H,H_kv,N,D");
    let numbers: Option<Vec<usize>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
    let shape: Shape = numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(wrong)?;
    if shape[0].is_multiple_of(shape[1]) { Ok(shape) } else { Err("H_kv must divide H".into()) }
}

/// One way to compute.
struct Contender {
    name: &'static str,
    /// Bytes of keys and values.
    memory: usize,
    run: Box<dyn FnMut() -> candle_core::Result<Tensor>>,
}

/// One contender on one shape.
#[derive(Serialize)]
struct Timing {
    name: &'static str,
    /// Median seconds.
    seconds: f64,
    /// The fastest round: what a busy machine hides.
    best: f64,
    /// How many times as long as the first contender.
    ratio: f64,
    /// Bytes of keys and values.
    memory: usize,
    rounds: usize,
}

#[derive(Serialize)]
struct Outcome {
    /// `[H, H_kv, N, D]`.
    shape: Shape,
    queries: usize,
    timings: Vec<Timing>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    benches::start_in_project()?;
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let threads = rayon::current_num_threads();
    let level = candle_int8_attention::cpu::active_level()?;
    let shapes = match (args.shape.is_empty(), args.short) {
        (false, _) => args.shape.clone(),
        (true, true) => vec![[4, 2, 300, 32]],
        (true, false) => SHAPES.to_vec(),
    };
    println!("{threads} threads, level {level}; {} query: median ms", args.queries);
    let mut outcomes = Vec::new();
    for &shape in &shapes {
        let outcome = measure(shape, &args)?;
        print(&outcome);
        outcomes.push(outcome);
    }
    if let Some(path) = &args.json {
        let report =
            serde_json::json!({ "threads": threads, "level": level, "outcomes": outcomes });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The contenders on one shape; the first is the default cache.
fn contenders([h, h_kv, n, d]: Shape, queries: usize) -> Result<Vec<Contender>> {
    let randn = |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu);
    let q = randn((1, h, queries, d))?;
    let (k, v) = (randn((1, h_kv, n, d))?, randn((1, h_kv, n, d))?);
    let mut contenders = Vec::new();
    for (name, values) in [
        ("f16 values", CacheValues::F16),
        ("bf16 values", CacheValues::Bf16),
        ("int8 values", CacheValues::Int8),
    ] {
        let mut cache = Int8KvCache::new(KvCacheConfig { values, ..KvCacheConfig::default() });
        cache.append(&k, &v)?;
        let (memory, q, config) = (cache.memory_bytes(), q.clone(), AttentionConfig::int8());
        let run = move || Ok(cache.attention(&q, AttentionCall::causal(), &config)?);
        contenders.push(Contender { name, memory, run: Box::new(run) });
    }
    // Candle's layout is (B, S, H, D); its f32 path is its fastest one.
    let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (q, k, v) = (bshd(&q)?, bshd(&k)?, bshd(&v)?);
    let (scale, offset) = (1.0 / (d as f32).sqrt(), n - queries);
    let run = move || run_causal_attn_cpu::<f32>(&q, &k, &v, scale, offset, None, None);
    let memory = 2 * h_kv * n * d * size_of::<f32>();
    contenders.push(Contender { name: "Candle fp32", memory, run: Box::new(run) });
    Ok(contenders)
}

fn measure(shape: Shape, args: &Args) -> Result<Outcome> {
    let mut contenders = contenders(shape, args.queries)?;
    contenders.retain(|contender| contender.name.contains(&args.only));
    anyhow::ensure!(!contenders.is_empty(), "no contender's name contains {:?}", args.only);
    let budget = Duration::from_secs_f64(if args.short { 0.0 } else { args.seconds });
    let mut times = vec![Vec::new(); contenders.len()];
    for contender in &mut contenders {
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
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let median = |times: &[f64]| times[times.len() / 2];
    let first = median(&times[0]);
    let timings = contenders.iter().zip(&times).map(|(contender, times)| Timing {
        name: contender.name,
        seconds: median(times),
        best: times[0],
        ratio: median(times) / first,
        memory: contender.memory,
        rounds: times.len(),
    });
    Ok(Outcome { shape, queries: args.queries, timings: timings.collect() })
}

fn print(outcome: &Outcome) {
    let [h, h_kv, n, d] = outcome.shape;
    println!("\n{h} heads, {h_kv} of keys and values, {n} keys of {d}");
    for timing in &outcome.timings {
        println!(
            "{:>24}  {:8.3} ({:.2}x)  best {:8.3}  {:6.1} MB  {:5.1} GB/s",
            timing.name,
            timing.seconds * 1e3,
            timing.ratio,
            timing.best * 1e3,
            timing.memory as f64 / 1e6,
            timing.memory as f64 / timing.seconds / 1e9,
        );
    }
}
