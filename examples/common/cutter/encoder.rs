//! Passages for an encoder.

use super::super::words::{bare, is_unknown, parts, spaced};
use super::{Cutter, Passage};
use anyhow::{Result, bail, ensure};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::TextEncoder;
use std::collections::VecDeque;

/// A token: its number and its text, with the space before it where a word starts.
pub type Piece = (u32, String);

/// What the tokenizer puts before and after every text: `[CLS]` and `[SEP]`.
pub fn ends(encoder: &TextEncoder) -> Result<(Piece, Piece)> {
    let ends = encoder.tokenize(&[""])?;
    let ids: Vec<u32> = ends.input_ids.get(0)?.to_vec1()?;
    let [first, last] = ends.tokens[0].as_slice() else {
        bail!("the tokenizer puts no [CLS] and [SEP], or <s> and </s>, around a text");
    };
    Ok(((ids[0], first.clone()), (ids[1], last.clone())))
}

/// Cuts word by word; each passage stands between the model's two special tokens.
pub struct EncoderCutter<'a> {
    encoder: &'a TextEncoder,
    ends: (Piece, Piece),
    /// Tokens of a passage without those two.
    room: usize,
    waiting: VecDeque<Piece>,
    /// Words that the model has no token for.
    unknown: u64,
    tokens: u64,
    /// Tokens of words that alone are longer than the model reads.
    lost: u64,
}

impl<'a> EncoderCutter<'a> {
    /// Passages of `tokens` tokens, or as many as the model reads.
    pub fn new(encoder: &'a TextEncoder, tokens: Option<usize>) -> Result<Self> {
        let longest = encoder.max_tokens();
        let tokens = tokens.unwrap_or(longest);
        ensure!(
            (3..=longest).contains(&tokens),
            "passages of {tokens} tokens; expected 3 (two are special) to {longest}, which is as \
             many as the model reads"
        );
        let (first, (last, name)) = ends(encoder)?;
        let ends = (first, (last, format!(" {name}")));
        let room = tokens - 2;
        Ok(Self { encoder, ends, room, waiting: VecDeque::new(), unknown: 0, tokens: 0, lost: 0 })
    }
}

impl Cutter for EncoderCutter<'_> {
    /// The tokenizers of encoders split at white space first, so word by word the tokens are the
    /// same.
    fn push(&mut self, text: &str) -> Result<()> {
        for parts in parts(text).chunks(WORDS_AT_ONCE) {
            let texts: Vec<String> =
                parts.iter().map(|&(part, starts)| spaced(part, starts)).collect();
            let batch = self.encoder.tokenize(&texts)?;
            self.lost += batch.truncated.iter().map(|&tokens| tokens as u64).sum::<u64>();
            let rows = batch.input_ids.to_vec2::<u32>()?.into_iter().zip(batch.tokens);
            for ((ids, names), &(word, starts)) in rows.zip(parts) {
                let inner = 1..names.len() - 1;
                self.unknown += u64::from(names[inner.clone()].iter().any(|n| is_unknown(n)));
                self.tokens += inner.len() as u64;
                let labels = labels(&names[inner.clone()], word, starts);
                self.waiting.extend(ids[inner].iter().copied().zip(labels));
            }
        }
        Ok(())
    }

    fn next(&mut self, rest: bool) -> Result<Option<Passage>> {
        let len = self.waiting.len().min(self.room);
        if len == 0 || (len < self.room && !rest) {
            return Ok(None);
        }
        let inner = self.waiting.drain(..len);
        let (first, last) = self.ends.clone();
        let all = std::iter::once(first).chain(inner).chain([last]);
        let (ids, words): (Vec<u32>, Vec<String>) = all.unzip();
        Ok(Some(Passage { ids: Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, words }))
    }

    fn check(&self) -> Result<()> {
        ensure!(self.tokens > 0, "the text has no word or sign in it");
        ensure!(
            self.unknown < self.tokens,
            "the model knows no word of the text: every token is unknown to it"
        );
        Ok(())
    }

    fn passage_tokens(&self) -> usize {
        self.room + self.special_tokens()
    }

    fn fewest_tokens(&self) -> usize {
        3
    }

    fn special_tokens(&self) -> usize {
        2
    }

    fn waiting_bytes(&self) -> u64 {
        self.waiting.iter().map(|(_, text)| text.len() as u64).sum()
    }

    fn lost(&self) -> u64 {
        self.lost
    }
}

/// A batch is padded to its longest word, so more at once would be mostly padding.
const WORDS_AT_ONCE: usize = 1024;

/// The texts of a word's tokens: the letters of the word, or the tokens' own names where the
/// tokenizer has changed more than their case.
fn labels(names: &[String], word: &str, starts: bool) -> Vec<String> {
    let mut texts: Vec<String> = names.iter().map(|name| bare(name).to_string()).collect();
    let lengths: Vec<usize> = texts.iter().map(|text| text.chars().count()).collect();
    if lengths.iter().sum::<usize>() == word.chars().count() {
        let mut letters = word.chars();
        texts = lengths.into_iter().map(|n| letters.by_ref().take(n).collect()).collect();
    } else if let [only] = texts.as_mut_slice() {
        *only = word.to_string();
    }
    if let Some(first) = texts.first_mut().filter(|_| starts) {
        first.insert(0, ' ');
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::labels;

    #[test]
    fn tokens_have_the_letters_of_their_word() {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(labels(&names(&["mr", "."]), "Mr.", true), [" Mr", "."]);
        assert_eq!(labels(&names(&["mer", "##yt", "##on"]), "Meryton", true), [" Mer", "yt", "on"]);
        assert_eq!(labels(&names(&["[UNK]"]), "\u{1f980}", true), [" \u{1f980}"]);
        assert_eq!(labels(&names(&["cafe", "s"]), "cafe\u{301}s", true), [" cafe", "s"]);
        assert!(labels(&[], "\u{ad}", true).is_empty());
        assert_eq!(labels(&names(&[",", "a"]), ",a", false), [",", "a"]);
    }
}
