//! A BERT encoder with its tokenizer: text in, embeddings out.

use super::{BertModel, ModelFiles, mean_pool, pooling, tokenizer_file};
use crate::files::corrupt;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use tokenizers::Tokenizer;

/// A tokenizer and the model behind it.
pub struct TextEncoder {
    /// The model; switch its attention here.
    pub model: BertModel,
    tokenizer: Tokenizer,
    device: Device,
    warnings: Vec<String>,
}

/// Some texts as ids, padded to the longest.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TokenBatch {
    /// `[B, N]` U32.
    pub input_ids: Tensor,
    /// `[B, N]` U32: 1 = token, 0 = padding.
    pub attention_mask: Tensor,
    /// The tokens of each text, special ones included, padding not.
    pub tokens: Vec<Vec<String>>,
    /// How many tokens of each text were cut off because the model's input is shorter.
    pub truncated: Vec<usize>,
}

impl TextEncoder {
    /// Loads model and tokenizer. Padding and truncation that the tokenizer's file asks for are
    /// turned off: [`TextEncoder::tokenize`] does both, as the model needs it.
    ///
    /// # Errors
    /// Those of [`BertModel::load`]; [`Error::Corrupt`] for a file that is not a tokenizer or has
    /// more words than the model.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let model = BertModel::load(files, device)?;
        let tokenizer = tokenizer_file::load(&files.tokenizer)?;
        let (words, rows) = (tokenizer.get_vocab_size(true), model.config().vocab_size);
        if words > rows {
            let problem = format!("{words} words, but the model embeds {rows}");
            return Err(corrupt(&files.tokenizer, problem));
        }
        let mut warnings = model.warnings().to_vec();
        warnings.extend(pooling::warnings(&files.config)?);
        Ok(Self { model, tokenizer, device: device.clone(), warnings })
    }

    /// What the files ask for and is not done, those of [`BertModel::warnings`] included: a head,
    /// another pooling than [`TextEncoder::embed_sentences`] does (`1_Pooling/config.json` beside
    /// the configuration), layers behind it (`modules.json`). In sentences, for people.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Texts to ids, with the model's special tokens. A text longer than the model's input is cut;
    /// its last token, `[SEP]`, is kept.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no text at all or if the tokenizer fails.
    pub fn tokenize(&self, texts: &[impl AsRef<str>]) -> Result<TokenBatch> {
        if texts.is_empty() {
            return Err(Error::InvalidArgument(
                "no text to tokenize, expected at least one".into(),
            ));
        }
        let longest = self.model.config().max_position_embeddings;
        let mut ids: Vec<Vec<u32>> = Vec::with_capacity(texts.len());
        let (mut tokens, mut truncated) = (Vec::new(), Vec::new());
        for text in texts {
            let encoding = tokenizer_file::run(|| self.tokenizer.encode(text.as_ref(), true))?;
            ids.push(cut(encoding.get_ids(), longest));
            tokens.push(cut(encoding.get_tokens(), longest));
            truncated.push(encoding.len().saturating_sub(longest));
        }
        let width = ids.iter().map(Vec::len).max().unwrap_or(0);
        let padded = |f: &dyn Fn(&[u32], usize) -> u32| -> Result<Tensor> {
            let all = ids.iter().flat_map(|ids| (0..width).map(move |i| f(ids, i)));
            Ok(Tensor::from_vec(all.collect::<Vec<u32>>(), (ids.len(), width), &self.device)?)
        };
        Ok(TokenBatch {
            input_ids: padded(&|ids, i| ids.get(i).copied().unwrap_or(0))?,
            attention_mask: padded(&|ids, i| u32::from(i < ids.len()))?,
            tokens,
            truncated,
        })
    }

    /// One embedding a text: the mean of its last hidden states, `[B, hidden_size]`, not
    /// normalized to length 1.
    ///
    /// # Errors
    /// Those of [`TextEncoder::tokenize`] and [`BertModel::forward`].
    pub fn embed_sentences(&self, texts: &[impl AsRef<str>]) -> Result<Tensor> {
        let batch = self.tokenize(texts)?;
        let hidden = self.model.forward(&batch.input_ids, Some(&batch.attention_mask))?;
        mean_pool(&hidden, &batch.attention_mask)
    }
}

/// At most `longest` items, the last of which stays the last.
fn cut<T: Clone>(items: &[T], longest: usize) -> Vec<T> {
    match items {
        [.., last] if items.len() > longest && longest > 0 => {
            let mut cut = items[..longest - 1].to_vec();
            cut.push(last.clone());
            cut
        }
        _ => items.to_vec(),
    }
}
