//! The same comparison where nothing but the word embeddings is at work: GloVe vectors as queries,
//! keys and values of one head.

use crate::args::Args;
use crate::attended::Attended;
use crate::common::model::{project_file, shown};
use crate::heads::{Path, Qkv, drift_per_head};
use crate::report::{Block, StaticWords};
use crate::stages;
use anyhow::{Context, Result};
use candle_core::Device;
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::models::WordEmbeddings;

/// As many as the encoder reads; every one attends to every other.
const MAX_WORDS: usize = 512;

/// Measures the words of `text` that have an embedding, the first ones if there are too many.
pub fn measure(args: &Args, text: &str, word: &str) -> Result<StaticWords> {
    let folder = args.glove.clone().unwrap_or_else(|| project_file("models/glove-6b-50d-top20k"));
    let embeddings = WordEmbeddings::load(&folder, &Device::Cpu)
        .with_context(|| format!("cannot load the word embeddings {}", shown(&folder)))?;
    let all = embeddings.tokenize(text);
    let (mut ids, mut words): (Vec<u32>, Vec<String>) =
        all.iter().filter_map(|word| Some((word.id?, word.text.clone()))).unzip();
    let unknown = all.len() - ids.len();
    let cut = ids.len().saturating_sub(MAX_WORDS);
    ids.truncate(MAX_WORDS);
    words.truncate(MAX_WORDS);
    let block = if ids.is_empty() {
        None
    } else {
        let embedded = embeddings.lookup(&ids)?.unsqueeze(0)?.unsqueeze(0)?;
        let config = AttentionConfig::fp32();
        let block = Qkv { q: embedded.clone(), k: embedded.clone(), v: embedded, config };
        Some(compare(args, &block, &words, word)?)
    };
    Ok(StaticWords { source: shown(&folder), words: words.len(), unknown, cut, block })
}

fn compare(args: &Args, block: &Qkv, words: &[String], word: &str) -> Result<Block> {
    let candidate = args.candidate();
    let (fp32, int8) = (Path::fp32(block)?, Path::int8(block, &candidate)?);
    let position = words.iter().position(|known| known.eq_ignore_ascii_case(word));
    Ok(Block {
        stages: stages::of_attention(block, &candidate, (&fp32, &int8))?,
        heads: drift_per_head(&fp32, &int8)?,
        attended: position
            .map(|position| Attended::of((&fp32, &int8), words, position, 0, args.top.into()))
            .transpose()?,
    })
}
