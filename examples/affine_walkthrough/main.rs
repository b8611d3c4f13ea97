//! The question's pipeline, step by step: `A` `[1, 4, 1024, 256]` in fp32 becomes int8, is
//! multiplied by its own transpose, and has to come back to fp32.
//!
//! It shows the way this is often tried first, what each step does to the numbers, the right way
//! with the error in dB after every stage, and a short answer to each of the three questions:
//! which offset, which scale, how to dequantize.
//!
//! ```text
//! cargo run --release --example affine_walkthrough
//! cargo run --release --example affine_walkthrough -- --data glove
//! cargo run --release --features hub --example affine_walkthrough -- \
//!     --data bert --model-id sentence-transformers/all-MiniLM-L6-v2
//! ```

mod data;
mod first_tried;
#[path = "../common/model.rs"]
#[allow(dead_code, reason = "the other examples use the rest of it")]
mod model;
#[path = "../common/print.rs"]
#[allow(dead_code, reason = "the other examples use the rest of it")]
mod print;
mod report;
mod right_way;
mod scores;
#[path = "../common/text.rs"]
#[allow(dead_code)]
mod text;

use anyhow::{Result, ensure};
use data::Input;
use first_tried::FirstTried;
use right_way::RightWay;
use scores::Scores;
use std::process::ExitCode;

/// The question's int8 pipeline: first tried, then right, with the error after every stage.
#[derive(Debug, clap::Parser)]
struct Args {
    /// What A holds: random (normal, mean 0, deviation 1), glove (word vectors; --model is a folder
    /// with model-f16.safetensors and vocab.txt), or bert (the word embeddings of a BERT model)
    #[arg(long, value_name = "DATA", default_value = "random")]
    data: data::Source,

    /// Matrices in A
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,

    /// Rows of each matrix
    #[arg(long, value_name = "N", default_value_t = 1024)]
    tokens: usize,

    /// Elements of each row [default: 256 for random, else the embeddings' width]
    #[arg(long, value_name = "N")]
    depth: Option<usize>,

    /// Seed of the random data
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,

    /// Print JSON; an infinite ratio (nothing differs) is null
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: model::ModelArgs,
}

/// Everything that is printed.
#[derive(serde::Serialize)]
struct Walkthrough {
    data: String,
    shape: [usize; 4],
    level: &'static str,
    samples: Vec<scores::Sample>,
    first_tried: FirstTried,
    right_way: RightWay,
}

/// All scores of a run, and more than 8 vectors of them, have to fit the memory of a laptop.
const MAX_ELEMENTS: usize = 1 << 26;

fn main() -> ExitCode {
    print::finish(run(&print::parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    let walkthrough = walk(args)?;
    Ok(if args.json {
        serde_json::to_string_pretty(&walkthrough)?
    } else {
        report::text(&walkthrough)
    })
}

fn walk(args: &Args) -> Result<Walkthrough> {
    check_sizes(args)?;
    let level = candle_int8_attention::cpu::active_level()?;
    let Input { name, shape, values, words } = data::load(args)?;
    let scores = Scores::compute(&values, shape)?;
    let samples = scores.samples(&words);
    Ok(Walkthrough {
        data: name,
        shape,
        level,
        first_tried: first_tried::run(&scores, &samples)?,
        right_way: right_way::run(&scores, &samples)?,
        samples,
    })
}

fn check_sizes(args: &Args) -> Result<()> {
    for (option, value) in
        [("--heads", args.heads), ("--tokens", args.tokens), ("--depth", args.depth.unwrap_or(1))]
    {
        ensure!(value > 0, "{option} is 0, expected at least 1");
    }
    // One stage quantizes A with a zero point, so the smaller of the two limits counts.
    let limit = candle_int8_attention::product::max_depth(true);
    // Embeddings have their own width, and the vocabulary bounds how many there are.
    let depth = args.depth.unwrap_or(match args.data {
        data::Source::Random => data::RANDOM_DEPTH,
        data::Source::Glove | data::Source::Bert => 1,
    });
    ensure!(
        depth <= limit,
        "--depth {depth} is more than {limit}: the sum of so many int8 products may not fit int32"
    );
    let product = |sizes: [usize; 3]| {
        sizes.into_iter().try_fold(1usize, usize::checked_mul).filter(|&n| n <= MAX_ELEMENTS)
    };
    ensure!(
        product([args.heads, args.tokens, args.tokens]).is_some(),
        "--heads {} and --tokens {} make more than {MAX_ELEMENTS} scores (heads * tokens * tokens)",
        args.heads,
        args.tokens
    );
    ensure!(
        product([args.heads, args.tokens, depth]).is_some(),
        "--heads {}, --tokens {} and --depth {depth} make A larger than {MAX_ELEMENTS} elements",
        args.heads,
        args.tokens
    );
    Ok(())
}
