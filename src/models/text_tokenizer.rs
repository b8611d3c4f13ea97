//! Texts and pairs of texts as padded batches of ids.

use super::{EncoderConfig, ModelFiles, tokenizer_file};
use crate::files::corrupt;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};
use tokenizers::{Encoding, PostProcessor, Tokenizer};

/// Some texts as ids, padded to the longest.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TokenBatch {
    /// `[B, N]` U32.
    pub input_ids: Tensor,
    /// `[B, N]` U32: to which text of a pair a token belongs, 0 or 1.
    pub token_type_ids: Tensor,
    /// `[B, N]` U32: 1 = token, 0 = padding.
    pub attention_mask: Tensor,
    /// The tokens of each text, special ones included, padding not.
    pub tokens: Vec<Vec<String>>,
    /// How many tokens of each text were cut off because the model's input is shorter.
    pub truncated: Vec<usize>,
}

/// A tokenizer, and what the model needs of its batches.
pub(super) struct TextTokenizer {
    tokenizer: Tokenizer,
    /// The most tokens of an input, special ones included.
    max_tokens: usize,
    lower_case: bool,
    pad: u32,
    device: Device,
}

impl TextTokenizer {
    /// The tokenizer of a model with this configuration; padding and truncation that its file asks
    /// for are turned off. `max_tokens` is a limit below the model's own.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a file that is not a tokenizer or has more words than the model,
    /// [`Error::Mismatch`] for a limit above the model's, or below what every text has.
    pub(super) fn load(
        files: &ModelFiles,
        config: &EncoderConfig,
        max_tokens: Option<usize>,
        lower_case: bool,
        device: &Device,
    ) -> Result<Self> {
        let tokenizer = tokenizer_file::load(&files.tokenizer)?;
        let (words, rows) = (tokenizer.get_vocab_size(true), config.vocab_size);
        if words > rows {
            let problem = format!("{words} words, but the model embeds {rows}");
            return Err(corrupt(&files.tokenizer, problem));
        }
        let limit = max_tokens.unwrap_or(config.max_tokens);
        if limit > config.max_tokens {
            return Err(Error::Mismatch(format!(
                "max_seq_length {limit}, but the model has positions for {} tokens",
                config.max_tokens
            )));
        }
        let (pad, device) = (config.pad_token_id, device.clone());
        let this = Self { tokenizer, max_tokens: limit, lower_case, pad, device };
        match this.special_tokens(false) {
            special if special > limit => Err(Error::Mismatch(format!(
                "inputs of at most {limit} tokens, but the tokenizer adds {special} to every text"
            ))),
            _ => Ok(this),
        }
    }

    pub(super) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Each text behind `prompt`, with the model's special tokens. The end of a text that is too long
    /// is cut off.
    pub(super) fn tokenize(&self, texts: &[impl AsRef<str>], prompt: &str) -> Result<TokenBatch> {
        let whole = |text: &str| self.encode(&format!("{prompt}{text}"));
        self.batch(texts.iter().map(|text| self.finish(whole(text.as_ref())?, None)))
    }

    /// The ids of one text behind `prompt`, and how many tokens were cut off.
    pub(super) fn ids(&self, text: &str, prompt: &str) -> Result<(Vec<u32>, usize)> {
        let (encoding, truncated) = self.finish(self.encode(&format!("{prompt}{text}"))?, None)?;
        Ok((encoding.get_ids().to_vec(), truncated))
    }

    /// Pairs of texts, each as one sequence. If that is too long, the end of the longer text is cut
    /// off, or those of both.
    pub(super) fn tokenize_pairs(
        &self,
        pairs: &[(impl AsRef<str>, impl AsRef<str>)],
    ) -> Result<TokenBatch> {
        self.batch(pairs.iter().map(|(first, second)| {
            let second = self.encode(second.as_ref())?;
            self.finish(self.encode(first.as_ref())?, Some(second))
        }))
    }

    /// How many tokens stand before the end of every text that begins with `prompt`.
    pub(super) fn prompt_tokens(&self, prompt: &str) -> Result<usize> {
        if prompt.is_empty() {
            return Ok(0);
        }
        let (encoding, _) = self.finish(self.encode(prompt)?, None)?;
        let ends_special = encoding.get_special_tokens_mask().last() == Some(&1);
        Ok(encoding.len() - usize::from(ends_special))
    }

    fn encode(&self, text: &str) -> Result<Encoding> {
        let lower = if self.lower_case { Some(text.to_lowercase()) } else { None };
        let text = lower.as_deref().unwrap_or(text);
        tokenizer_file::run(|| self.tokenizer.encode(text, false))
    }

    /// Cuts what is too long, adds special tokens, and says how many tokens were cut off.
    fn finish(&self, first: Encoding, second: Option<Encoding>) -> Result<(Encoding, usize)> {
        let special = self.special_tokens(second.is_some());
        let len = |first: &Encoding, second: &Option<Encoding>| {
            first.len() + second.as_ref().map_or(0, Encoding::len)
        };
        let before = len(&first, &second);
        // Of two texts the longest first, which is the default.
        let max_length = self.max_tokens.saturating_sub(special);
        let params = TruncationParams { max_length, ..TruncationParams::default() };
        let mut truncated = 0;
        let encoding = tokenizer_file::run(|| {
            let (first, second) = truncate_encodings(first, second, &params)?;
            truncated = before - len(&first, &second);
            self.tokenizer.post_process(first, second, true)
        })?;
        Ok((encoding, truncated))
    }

    fn special_tokens(&self, pair: bool) -> usize {
        self.tokenizer.get_post_processor().map_or(0, |processor| processor.added_tokens(pair))
    }

    fn batch(
        &self,
        encodings: impl Iterator<Item = Result<(Encoding, usize)>>,
    ) -> Result<TokenBatch> {
        let (encodings, truncated): (Vec<Encoding>, Vec<usize>) =
            encodings.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        if encodings.is_empty() {
            return Err(Error::InvalidArgument(
                "no text to tokenize, expected at least one".into(),
            ));
        }
        let width = encodings.iter().map(Encoding::len).max().unwrap_or(0);
        let padded = |of: &dyn Fn(&Encoding, usize) -> u32, filler: u32| -> Result<Tensor> {
            let row =
                |encoding: &Encoding, i| if i < encoding.len() { of(encoding, i) } else { filler };
            let all = encodings.iter().flat_map(|e| (0..width).map(move |i| row(e, i)));
            let all = all.collect::<Vec<u32>>();
            Ok(Tensor::from_vec(all, (encodings.len(), width), &self.device)?)
        };
        Ok(TokenBatch {
            input_ids: padded(&|e, i| e.get_ids()[i], self.pad)?,
            token_type_ids: padded(&|e, i| e.get_type_ids()[i], 0)?,
            attention_mask: padded(&|_, _| 1, 0)?,
            tokens: encodings.iter().map(|encoding| encoding.get_tokens().to_vec()).collect(),
            truncated,
        })
    }
}
