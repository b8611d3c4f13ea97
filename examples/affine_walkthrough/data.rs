//! What A holds: random numbers or word embeddings.

use crate::Args;
use crate::model::{project_file, shown};
use crate::text;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device};
use candle_int8_attention::models::llama::LlamaTokenizer;
use std::path::Path;

/// The word embeddings that come with this project.
const BUNDLED: &str = "models/glove-6b-50d-top20k";

/// Elements of a random row, unless the options say otherwise.
pub const RANDOM_DEPTH: usize = 256;

/// Where the numbers come from.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Source {
    /// Independent normal numbers with mean 0 and deviation 1.
    Random,
    /// Word vectors in a folder with model-f16.safetensors and vocab.txt, most frequent words first.
    Glove,
    /// The word embeddings of a BERT model, in the order of its vocabulary.
    Bert,
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
        Source::Bert => bert(args),
    }
}

fn random(args: &Args) -> Result<Input> {
    ensure!(!args.model.is_given(), "a model goes with --data glove or bert, not with random data");
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
    ensure!(args.model.hub.model_id.is_none(), "--model-id goes with --data bert, not with glove");
    let folder = args.model.model.clone().unwrap_or_else(|| project_file(BUNDLED));
    ensure!(
        folder.is_dir(),
        "no folder {}; the word embeddings are in the repository, not in the published crate",
        folder.display()
    );
    let table = embeddings(&folder.join("model-f16.safetensors"), &["embedding.weight"])?;
    let text = text::read(&folder.join("vocab.txt"))?;
    let words = text.lines().map(str::to_string).enumerate().take(table.rows).collect();
    chosen(args, &table, words, &shown(&folder))
}

fn bert(args: &Args) -> Result<Input> {
    let (files, name) = args.model.files()?;
    let names = ["embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"];
    let table = embeddings(&files.weights, &names)?;
    // Any model's: a tokenizer is read in one way, which is safe with damaged files.
    let tokenizer =
        LlamaTokenizer::from_folder(files.tokenizer.parent().unwrap_or(Path::new(".")))?;
    let tokenizer = tokenizer.tokenizer();
    // Whole words: no special tokens, no pieces, no punctuation.
    let is_word = |word: &str| word.len() > 1 && word.chars().all(char::is_alphabetic);
    let word = |row: usize| Some((row, tokenizer.id_to_token(row as u32)?));
    let words = (0..table.rows).filter_map(word).filter(|(_, word)| is_word(word)).collect();
    chosen(args, &table, words, &name)
}

/// A matrix of word embeddings.
struct Table {
    rows: usize,
    columns: usize,
    /// Row-major.
    values: Vec<f32>,
}

/// The first words, as many as the options ask for; each has a row in the table.
fn chosen(args: &Args, table: &Table, words: Vec<(usize, String)>, name: &str) -> Result<Input> {
    let depth = table.columns;
    if let Some(asked) = args.depth.filter(|&asked| asked != depth) {
        bail!("--depth {asked}, but these embeddings have {depth} elements; leave --depth out");
    }
    let wanted = args.heads * args.tokens;
    ensure!(
        wanted <= words.len(),
        "--heads {} and --tokens {} ask for {wanted} words, but the vocabulary has {}",
        args.heads,
        args.tokens,
        words.len()
    );
    let rows = words[..wanted].iter();
    let values = rows.flat_map(|(row, _)| &table.values[row * depth..(row + 1) * depth]).copied();
    Ok(Input {
        name: format!("the first {wanted} words of {name}"),
        shape: [1, args.heads, args.tokens, depth],
        values: values.collect(),
        words: words.into_iter().take(args.tokens).map(|(_, word)| word).collect(),
    })
}

/// The first of the tensors `names` that is in the file.
fn embeddings(path: &Path, names: &[&str]) -> Result<Table> {
    let shown = path.display();
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)
        .with_context(|| format!("cannot read {shown}"))?;
    let weight = (names.iter().find_map(|name| tensors.get(*name)))
        .with_context(|| format!("{shown} has no tensor {}", names.join(" or ")))?;
    let (rows, columns) = weight
        .dims2()
        .with_context(|| format!("{} in {shown} is not a matrix", names.join(" or ")))?;
    ensure!(columns > 0, "{} in {shown} has rows without elements", names.join(" or "));
    Ok(Table { rows, columns, values: weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1()? })
}
