//! A text as windows of tokens, each no longer than the model reads at once.

use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::TextEncoder;

/// A run of tokens between the model's two special ones.
pub struct Window {
    /// `[1, N]`
    pub ids: Tensor,
    pub tokens: Vec<String>,
}

/// The windows of a text, the last one shorter.
pub fn of_text(encoder: &TextEncoder, text: &str) -> Result<Vec<Window>> {
    let (ids, tokens) = encode(encoder, text, true)?;
    let limit = encoder.model().config().max_position_embeddings;
    ensure!(tokens.len() > 2, "the text has no word or sign in it");
    let inner = 1..tokens.len() - 1;
    ensure!(
        tokens[inner.clone()].iter().any(|token| token != UNKNOWN),
        "the model knows no word of the text: every token is {UNKNOWN}"
    );
    let starts = inner.clone().step_by(limit - 2);
    starts.map(|start| window(&ids, &tokens, start..inner.end.min(start + limit - 2))).collect()
}

/// What the tokenizer writes for a word it cannot spell.
const UNKNOWN: &str = "[UNK]";

fn window(ids: &[u32], tokens: &[String], part: std::ops::Range<usize>) -> Result<Window> {
    let last = tokens.len() - 1;
    let positions: Vec<usize> = std::iter::once(0).chain(part).chain([last]).collect();
    let ids: Vec<u32> = positions.iter().map(|&i| ids[i]).collect();
    let tokens = positions.iter().map(|&i| tokens[i].clone()).collect();
    Ok(Window { ids: Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, tokens })
}

fn encode(encoder: &TextEncoder, text: &str, special: bool) -> Result<(Vec<u32>, Vec<String>)> {
    match encoder.tokenizer().encode(text, special) {
        Ok(encoding) => Ok((encoding.get_ids().to_vec(), encoding.get_tokens().to_vec())),
        Err(error) => bail!("the text cannot be tokenized: {error}"),
    }
}

impl Window {
    /// The first token of the first occurrence of `word`.
    pub fn find(&self, encoder: &TextEncoder, word: &str) -> Result<usize> {
        let (_, pieces) = encode(encoder, word, false)?;
        ensure!(!pieces.is_empty(), "the word to show is empty");
        let found = self.tokens.windows(pieces.len()).position(|tokens| tokens == pieces);
        found.ok_or_else(|| {
            anyhow::anyhow!("the word {word:?} is not in the {} tokens of the text", self.tokens.len())
        })
    }

    /// The first of the longest words that are one token.
    pub fn longest_word(&self) -> usize {
        let inner = 1..self.tokens.len() - 1;
        let is_piece = |i: usize| self.tokens[i].starts_with("##");
        let length = |i: &usize| self.tokens[*i].chars().count();
        let whole = inner.clone().filter(|&i| !is_piece(i) && !is_piece(i + 1));
        // `max_by_key` gives the last of equals, so it looks from the end.
        whole.rev().max_by_key(length).unwrap_or(inner.start)
    }
}
