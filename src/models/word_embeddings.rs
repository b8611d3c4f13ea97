//! Static word vectors, such as GloVe, with one self-attention block over them.

use super::Weights;
use super::layered::{Attend, LayeredModel};
use crate::attention::{AttentionCall, QuantizedAttention};
use crate::files::{corrupt, read_text};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::Path;

/// A word of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Word {
    /// As it is looked up: lower case.
    pub text: String,
    /// Its row, or `None` if the vocabulary does not have it.
    pub id: Option<u32>,
}

/// A table of word vectors, `[words, dim]`, row `i` for line `i` of its vocabulary. As a
/// [`LayeredModel`](super::LayeredModel) it is one self-attention over them without weights: queries,
/// keys and values are the vectors themselves, in one head.
pub struct WordEmbeddings {
    /// The attention of their one layer, int8 at first.
    pub attention: QuantizedAttention,
    table: Tensor,
    rows: HashMap<String, u32>,
}

impl WordEmbeddings {
    /// Loads `vocab.txt` and `model.safetensors` (or `model-f16.safetensors`, tensor
    /// `embedding.weight`) from a folder.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Corrupt`] if a file is damaged or the vocabulary does not
    /// have a line for each row, [`Error::MissingTensor`].
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let vocab = folder.join("vocab.txt");
        let text = read_text("vocabulary", &vocab)?;
        let whole = folder.join("model.safetensors");
        let path = if whole.is_file() { whole } else { folder.join("model-f16.safetensors") };
        let weights = Weights::open(&path)?;
        let (words, dim) = match *weights.shape("embedding.weight")?.as_slice() {
            [words, dim] => (words, dim),
            ref shape => {
                return Err(corrupt(
                    &path,
                    format!("word vectors of shape {shape:?}, expected 2-d"),
                ));
            }
        };
        if text.lines().count() != words {
            let lines = text.lines().count();
            return Err(corrupt(&vocab, format!("{lines} lines for {words} word vectors")));
        }
        let table = weights.get("embedding.weight", &[words, dim], device)?;
        let rows = text.lines().zip(0..).map(|(word, row)| (word.to_string(), row)).collect();
        Ok(Self { attention: QuantizedAttention::default(), table, rows })
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.table.dims()[0]
    }

    /// Whether there is no word at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of a vector.
    pub fn dim(&self) -> usize {
        self.table.dims()[1]
    }

    /// Splits a text the way GloVe 6B was: lower case, words and punctuation apart, English
    /// contractions as two words (`don't` is `do` `n't`, `it's` is `it` `'s`); what the vocabulary
    /// has as a whole (`u.s.`, `mr.`, `1,000`) stays whole. Unknown words are kept, with no row.
    pub fn tokenize(&self, text: &str) -> Vec<Word> {
        let mut words = Vec::new();
        for chunk in text.to_lowercase().replace('\u{2019}', "'").split_whitespace() {
            match self.rows.contains_key(chunk) {
                true => words.push(chunk.to_string()),
                false => split_chunk(chunk, &mut words),
            }
        }
        let find = |text: String| Word { id: self.rows.get(&text).copied(), text };
        words.into_iter().map(find).collect()
    }

    /// The vectors of some rows, f32 `[ids.len(), dim]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a row that does not exist.
    pub fn lookup(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.len()) {
            return Err(Error::InvalidArgument(format!(
                "word {id}, expected less than {}",
                self.len()
            )));
        }
        if ids.is_empty() {
            return Ok(self.table.narrow(0, 0, 0)?);
        }
        let ids = Tensor::new(ids, self.table.device())?;
        Ok(self.table.index_select(&ids, 0)?)
    }
}

/// Splits what stands between two spaces into words and punctuation.
fn split_chunk(chunk: &str, words: &mut Vec<String>) {
    let mut word = String::new();
    let in_word = |c: char| c.is_alphanumeric() || c == '\'' || c == '-';
    for c in chunk.chars() {
        if in_word(c) {
            word.push(c);
        } else {
            split_contraction(&std::mem::take(&mut word), words);
            words.push(c.to_string());
        }
    }
    split_contraction(&word, words);
}

/// `don't` to `do` and `n't`, `it's` to `it` and `'s`; quotes and dashes around are dropped.
fn split_contraction(word: &str, words: &mut Vec<String>) {
    let word = word.trim_matches(['\'', '-']);
    let at = match word.strip_suffix("n't") {
        Some(stem) if !stem.is_empty() => stem.len(),
        _ => word.rfind('\'').filter(|&at| at > 0).unwrap_or(word.len()),
    };
    let (stem, ending) = word.split_at(at);
    words.extend([stem, ending].into_iter().filter(|w| !w.is_empty()).map(str::to_string));
}

/// The input is rows of the table: words by number. Its one layer is self-attention over them.
impl LayeredModel for WordEmbeddings {
    type Input = [u32];

    fn attention(&self) -> Vec<&QuantizedAttention> {
        vec![&self.attention]
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        vec![&mut self.attention]
    }

    fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        Ok(self.lookup(ids)?.unsqueeze(0)?)
    }

    fn layer(&self, _index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let x = hidden.unsqueeze(1)?;
        let out = attend(&x, &x, &x, &AttentionCall::default())?;
        Ok(out.squeeze(1)?)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        Some([1, 1])
    }
}
