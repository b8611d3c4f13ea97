//! Passages for a decoder.

use super::{Cutter, Passage};
use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::llama::LlamaTokenizer;

/// Tokens of a passage where nothing else is said: drift takes memory for several `[H, N, N]`
/// matrices, and decoders read thousands of tokens.
pub const USUAL: usize = 512;

/// A sign can take four tokens, one a byte, and is not to be cut.
const FEWEST: usize = 8;

/// More text than a passage has is tokenized, so that where the part ends does not show in the
/// passage: this number of tokens more, taken from so many bytes a token at first.
const BEYOND: usize = 64;
const BYTES_A_TOKEN: usize = 8;

/// Cuts off as much of the text as makes a passage, and tokenizes what follows anew, as if the text
/// began there. White space is part of the text.
pub struct DecoderCutter<'a> {
    tokenizer: &'a LlamaTokenizer,
    /// What the model expects before every text, if it expects anything.
    start: Vec<u32>,
    /// Tokens of a passage without those.
    room: usize,
    text: String,
    /// Where in the text the next passage begins.
    from: usize,
    is_blank: bool,
}

impl<'a> DecoderCutter<'a> {
    /// Passages of `tokens` tokens, of a model that reads `longest` at once.
    pub fn new(
        tokenizer: &'a LlamaTokenizer,
        longest: usize,
        tokens: Option<usize>,
    ) -> Result<Self> {
        let start = tokenizer.encode("", true)?;
        let tokens = tokens.unwrap_or(USUAL.min(longest));
        let fewest = FEWEST + start.len();
        ensure!(
            (fewest..=longest).contains(&tokens),
            "passages of {tokens} tokens; expected {fewest} to {longest}, which is as many as the \
             model reads"
        );
        let room = tokens - start.len();
        Ok(Self { tokenizer, start, room, text: String::new(), from: 0, is_blank: true })
    }

    /// The tokens at the beginning of the text that waits, with where each ends: enough to cut a
    /// passage from, or all with `rest`; None if more text has to come.
    fn encode(&self, rest: bool) -> Result<Option<Vec<(u32, usize)>>> {
        let waiting = &self.text[self.from..];
        let enough = self.room + BEYOND;
        let mut bytes = BYTES_A_TOKEN * enough;
        loop {
            let all = bytes >= waiting.len();
            if all && !rest {
                return Ok(None);
            }
            let part = &waiting[..waiting.floor_char_boundary(bytes)];
            let encoding = self.tokenizer.tokenizer().encode(part, false);
            let encoding = encoding.map_err(|e| anyhow!("the tokenizer failed: {e}"))?;
            if all || encoding.len() >= enough {
                return Ok(Some(ends(encoding.get_ids(), encoding.get_offsets(), part.len(), all)));
            }
            bytes *= 2;
        }
    }
}

/// Each token with where its text ends; what lies between tokens belongs to the later one, and what
/// lies behind the last one to that, if that is `all` of the text.
fn ends(ids: &[u32], spans: &[(usize, usize)], len: usize, all: bool) -> Vec<(u32, usize)> {
    let mut end = 0;
    let mut tokens: Vec<(u32, usize)> = Vec::with_capacity(ids.len());
    for (i, (&id, span)) in ids.iter().zip(spans).enumerate() {
        end = span.1.max(end);
        // The tokens of one sign all have its span; it is not to be cut, so it ends with the last.
        let goes_on = spans.get(i + 1).is_some_and(|next| next.0 < end);
        let before = tokens.last().map_or(0, |token| token.1);
        tokens.push((id, if goes_on { before } else { end }));
    }
    if let Some(last) = tokens.last_mut().filter(|_| all) {
        last.1 = len;
    }
    tokens
}

impl Cutter for DecoderCutter<'_> {
    fn push(&mut self, text: &str) -> Result<()> {
        self.text.drain(..self.from);
        self.from = 0;
        self.text.push_str(text);
        self.is_blank &= text.trim().is_empty();
        Ok(())
    }

    fn next(&mut self, rest: bool) -> Result<Option<Passage>> {
        if self.from == self.text.len() {
            return Ok(None);
        }
        let Some(mut tokens) = self.encode(rest)? else { return Ok(None) };
        if tokens.is_empty() {
            // All that is left is nothing to the tokenizer.
            self.from = self.text.len();
            return Ok(None);
        }
        if tokens.len() > self.room {
            tokens.truncate(self.room);
            // A sign whose last token has no room is for the next passage.
            let whole = |i: usize| i == 0 || tokens[i].1 > tokens[i - 1].1;
            let last = (0..tokens.len()).rev().find(|&i| whole(i)).map_or(0, |i| i + 1);
            tokens.truncate(last);
        }
        let text = &self.text[self.from..];
        let end = tokens.last().map_or(0, |token| token.1);
        ensure!(
            end > 0,
            "{:?} makes more than the {} tokens of a passage",
            text.chars().take(1).collect::<String>(),
            self.room
        );
        let mut ids = self.start.clone();
        let mut words: Vec<String> = self.start.iter().map(|&id| self.name(id)).collect();
        let mut before = 0;
        for (id, end) in tokens {
            ids.push(id);
            words.push(label(&text[before..end]));
            before = end;
        }
        self.from += end;
        Ok(Some(Passage { ids: Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?, words }))
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.is_blank, "the text has no word or sign in it");
        Ok(())
    }

    fn passage_tokens(&self) -> usize {
        self.room + self.start.len()
    }

    fn fewest_tokens(&self) -> usize {
        FEWEST + self.start.len()
    }

    fn special_tokens(&self) -> usize {
        self.start.len()
    }

    fn waiting_bytes(&self) -> u64 {
        (self.text.len() - self.from) as u64
    }

    fn lost(&self) -> u64 {
        0
    }
}

impl DecoderCutter<'_> {
    fn name(&self, id: u32) -> String {
        self.tokenizer.tokenizer().id_to_token(id).unwrap_or_default()
    }
}

/// The text of a token, on one line: a table or a sentence in a report shows it.
fn label(text: &str) -> String {
    text.replace('\r', "").replace('\n', "\u{23ce}").replace('\t', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_end_where_the_next_begins() {
        // "a", " b" without its space, and what is left at the end.
        assert_eq!(ends(&[1, 2], &[(0, 1), (2, 3)], 5, false), [(1, 1), (2, 3)]);
        assert_eq!(ends(&[1, 2], &[(0, 1), (2, 3)], 5, true), [(1, 1), (2, 5)]);
        // Three tokens of one sign.
        let spans = [(0, 1), (1, 4), (1, 4), (1, 4), (4, 5)];
        let found = ends(&[1, 2, 3, 4, 5], &spans, 5, true);
        assert_eq!(found, [(1, 1), (2, 1), (3, 1), (4, 4), (5, 5)]);
        assert!(ends(&[], &[], 3, true).is_empty());
    }

    #[test]
    fn labels_are_on_one_line() {
        assert_eq!(label("a\r\nb\nc\td"), "a\u{23ce}b\u{23ce}c d");
    }
}
