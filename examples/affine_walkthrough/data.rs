//! What A holds: random numbers or word embeddings.

use crate::Args;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use std::path::{Path, PathBuf};

/// The word embeddings that come with this project.
const BUNDLED: &str = "models/glove-6b-50d-top20k";

/// Elements of a random row, unless the options say otherwise.
pub const RANDOM_DEPTH: usize = 256;

/// Where the numbers come from.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Source {
    /// Independent normal numbers with mean 0 and deviation 1.
    Random,
    /// Word embeddings, most frequent words first.
    Glove,
}

/// A, row-major.
pub struct Input {
    /// For people.
    pub name: String,
    /// `[1, heads, tokens, depth]`.
    pub shape: [usize; 4],
    /// The numbers.
    pub values: Vec<f32>,
    /// The word of each row of the first head; empty for random data.
    pub words: Vec<String>,
}

/// The data that the options ask for.
pub fn load(args: &Args) -> Result<Input> {
    match args.data {
        Source::Random => random(args),
        Source::Glove => glove(args),
    }
}

fn random(args: &Args) -> Result<Input> {
    ensure!(args.model.is_none(), "--model goes with --data glove, not with random data");
    let depth = args.depth.unwrap_or(RANDOM_DEPTH);
    Ok(Input {
        name: format!("random, normal, mean 0, deviation 1, seed {}", args.seed),
        shape: [1, args.heads, args.tokens, depth],
        values: normal(args.heads * args.tokens * depth, args.seed),
        words: Vec::new(),
    })
}

/// Normal numbers that depend on the seed alone (Candle's own cannot be seeded on a CPU):
/// SplitMix64, then Box and Muller's transform.
fn normal(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        // In (0, 1]: the logarithm below needs more than 0.
        ((bits >> 11) + 1) as f64 / (1u64 << 53) as f64
    };
    let mut one = || {
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
        (radius * angle.cos()) as f32
    };
    (0..len).map(|_| one()).collect()
}

fn glove(args: &Args) -> Result<Input> {
    let folder =
        args.model.clone().unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(BUNDLED));
    ensure!(
        folder.is_dir(),
        "no folder {}; the word embeddings are in the repository, not in the published crate",
        folder.display()
    );
    let (vocabulary, depth, values) = embeddings(&folder.join("model-f16.safetensors"))?;
    if let Some(asked) = args.depth.filter(|&asked| asked != depth) {
        bail!("--depth {asked}, but these embeddings have {depth} elements; leave --depth out");
    }
    let wanted = args.heads * args.tokens;
    ensure!(
        wanted <= vocabulary,
        "--heads {} and --tokens {} ask for {wanted} words, but the vocabulary has {vocabulary}",
        args.heads,
        args.tokens
    );
    Ok(Input {
        name: format!("the first {wanted} words of {}", shown(&folder)),
        shape: [1, args.heads, args.tokens, depth],
        values: values[..wanted * depth].to_vec(),
        words: words(&folder.join("vocab.txt"), args.tokens)?,
    })
}

/// `(rows, columns, row-major values)` of the tensor `embedding.weight`.
fn embeddings(path: &PathBuf) -> Result<(usize, usize, Vec<f32>)> {
    let shown = path.display();
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)
        .with_context(|| format!("cannot read {shown}"))?;
    let weight = tensors
        .get("embedding.weight")
        .with_context(|| format!("{shown} has no tensor embedding.weight"))?;
    let (rows, columns) =
        weight.dims2().with_context(|| format!("embedding.weight in {shown} is not a matrix"))?;
    ensure!(columns > 0, "embedding.weight in {shown} has rows without elements");
    Ok((rows, columns, weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?))
}

/// The first `count` lines.
fn words(path: &Path, count: usize) -> Result<Vec<String>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().take(count).map(str::to_string).collect())
}

/// A path for people: relative to this project where it lies in it.
fn shown(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(path).display().to_string()
}
