//! Every different sentence embedded once.

use crate::pairs::Pair;
use anyhow::Result;
use candle_int8_attention::models::TextEncoder;
use std::collections::HashMap;

/// The different sentences of all pairs.
pub struct Corpus {
    sentences: Vec<String>,
    positions: HashMap<String, usize>,
}

impl Corpus {
    pub fn of(pairs: &[Pair]) -> Self {
        let mut corpus = Self { sentences: Vec::new(), positions: HashMap::new() };
        for sentence in pairs.iter().flat_map(|pair| [&pair.a, &pair.b]) {
            corpus.positions.entry(sentence.clone()).or_insert_with(|| {
                corpus.sentences.push(sentence.clone());
                corpus.sentences.len() - 1
            });
        }
        corpus
    }

    pub fn len(&self) -> usize {
        self.sentences.len()
    }

    /// Where the embedding of a sentence of these pairs is.
    pub fn index(&self, sentence: &str) -> usize {
        self.positions[sentence]
    }

    /// One embedding a sentence.
    pub fn embed(&self, encoder: &TextEncoder) -> Result<Vec<Vec<f32>>> {
        encoder.embed(&self.sentences).map(|embedding| Ok(embedding?.vector)).collect()
    }

    /// How many sentences are longer than the model reads.
    pub fn cut(&self, encoder: &TextEncoder) -> Result<usize> {
        let truncated = encoder.tokenize(&self.sentences)?.truncated;
        Ok(truncated.iter().filter(|&&tokens| tokens > 0).count())
    }
}
