//! A text as windows of tokens, each no longer than the model reads at once.

use super::cutter::encoder::{Piece, ends};
use super::words::{is_unknown, parts, spaced};
use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::TextEncoder;

/// A run of tokens between the model's two special ones.
pub struct Window {
    /// `[1, N]`
    pub ids: Tensor,
    pub tokens: Vec<String>,
}

/// All of a text.
pub struct Windows {
    /// At least one; the last may be shorter.
    pub windows: Vec<Window>,
    /// Tokens of words that alone are longer than a window.
    pub tokens_lost: usize,
}

impl Windows {
    /// As few windows as the model needs.
    pub fn of(encoder: &TextEncoder, text: &str) -> Result<Self> {
        let pieces = Pieces::of(encoder, text)?;
        ensure!(!pieces.tokens.is_empty(), "the text has no word or sign in it");
        ensure!(
            !pieces.tokens.iter().all(|(_, token)| is_unknown(token)),
            "the model knows no word of the text: every token is {}",
            pieces.tokens[0].1
        );
        let room = encoder.max_tokens().saturating_sub(2);
        ensure!(room > 0, "the model reads no more than the two special tokens");
        let windows = pieces.tokens.chunks(room).map(|part| pieces.window(part));
        Ok(Self { windows: windows.collect::<Result<_>>()?, tokens_lost: pieces.lost })
    }
}

/// The tokens of a text, without limit.
struct Pieces {
    tokens: Vec<Piece>,
    ends: (Piece, Piece),
    lost: usize,
}

impl Pieces {
    /// [`TextEncoder::tokenize`] cuts what the model cannot read at once, so it gets the words one
    /// by one. The tokenizers of encoders split at white space first: the tokens are the same, if the
    /// space before a word comes with it, which is a part of its first token in some.
    fn of(encoder: &TextEncoder, text: &str) -> Result<Self> {
        let ends = ends(encoder)?;
        let (mut tokens, mut lost) = (Vec::new(), 0);
        let words: Vec<String> =
            parts(text).into_iter().map(|(part, starts)| spaced(part, starts)).collect();
        for words in words.chunks(WORDS_AT_ONCE) {
            let batch = encoder.tokenize(words)?;
            for (ids, names) in batch.input_ids.to_vec2::<u32>()?.into_iter().zip(batch.tokens) {
                let inner = names.len() - 1;
                tokens.extend(ids.into_iter().zip(names).take(inner).skip(1));
            }
            lost += batch.truncated.iter().sum::<usize>();
        }
        Ok(Self { tokens, ends, lost })
    }

    fn window(&self, part: &[Piece]) -> Result<Window> {
        let (first, last) = &self.ends;
        let all = std::iter::once(first).chain(part).chain([last]);
        let (ids, tokens): (Vec<u32>, Vec<String>) = all.cloned().unzip();
        Ok(Window { ids: Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, tokens })
    }
}

/// A batch is padded to its longest word, so a whole novel in one would be mostly padding.
const WORDS_AT_ONCE: usize = 1024;

impl Window {
    /// The first token of the first occurrence of `word`.
    pub fn find(&self, encoder: &TextEncoder, word: &str) -> Result<usize> {
        let pieces: Vec<String> =
            Pieces::of(encoder, word)?.tokens.into_iter().map(|(_, token)| token).collect();
        ensure!(!pieces.is_empty(), "the word to show is empty");
        let found = self.tokens.windows(pieces.len()).position(|tokens| tokens == pieces);
        found.ok_or_else(|| {
            anyhow::anyhow!(
                "the word {word:?} is not in the {} tokens of the text",
                self.tokens.len()
            )
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
