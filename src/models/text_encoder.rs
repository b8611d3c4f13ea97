//! An encoder with its tokenizer: text in, embeddings out.

use super::sentence::SentenceConfig;
use super::text_tokenizer::TextTokenizer;
use super::{Attend, EncoderModel, LayeredModel, ModelFiles, TokenBatch};
use crate::Result;
use crate::attention::QuantizedAttention;
use candle_core::{D, DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// A tokenizer, the model behind it, and what sentence-transformers stores beside them: a limit of
/// length, prompts, and how an embedding is made of hidden states.
pub struct TextEncoder {
    /// The model; switch its attention here.
    pub model: EncoderModel,
    tokenizer: TextTokenizer,
    sentence: SentenceConfig,
}

impl TextEncoder {
    /// Loads model and tokenizer, and obeys what is beside the configuration:
    ///
    /// | file | what of it |
    /// |---|---|
    /// | `modules.json` | Transformer, Pooling, Dense, Normalize, in this order |
    /// | `1_Pooling/config.json` | mean, cls, max, lasttoken, or several; whether a prompt takes part |
    /// | `2_Dense/config.json`, `model.safetensors` | weights, bias, activation |
    /// | `sentence_bert_config.json` | `max_seq_length`, `do_lower_case` |
    /// | `config_sentence_transformers.json` | `prompts`, `default_prompt_name` |
    ///
    /// Without any of them an embedding is the mean over tokens. Padding and truncation that the
    /// tokenizer's file asks for are turned off: [`TextEncoder::tokenize`] does both, as the model
    /// needs it.
    ///
    /// # Errors
    /// Those of [`EncoderModel::load`]; [`Error::Corrupt`](crate::Error::Corrupt) for a file that is
    /// not what its name promises, or a tokenizer with more words than the model;
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a module or a pooling that is not
    /// implemented; [`Error::Mismatch`](crate::Error::Mismatch) and
    /// [`Error::MissingFile`](crate::Error::MissingFile) for files that contradict each other.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let model = EncoderModel::load(files, device)?;
        let config = model.config();
        let folder = files.config.parent().unwrap_or(Path::new(""));
        let sentence = SentenceConfig::load(folder, config.hidden_size, device)?;
        let (limit, lower_case) = (sentence.max_tokens, sentence.lower_case);
        let tokenizer = TextTokenizer::load(files, &config, limit, lower_case, device)?;
        Ok(Self { model, tokenizer, sentence })
    }

    /// What the files ask for and is not done, see [`EncoderModel::warnings`]. In sentences, for
    /// people.
    pub fn warnings(&self) -> &[String] {
        self.model.warnings()
    }

    /// What the model's authors put in front of texts, by the name of the purpose, such as `query`.
    pub fn prompts(&self) -> &BTreeMap<String, String> {
        &self.sentence.prompts
    }

    /// The most tokens of a text, special ones included.
    pub fn max_tokens(&self) -> usize {
        self.tokenizer.max_tokens()
    }

    /// Texts to ids, with the model's special tokens and no prompt. A text longer than the model's
    /// input is cut; its last special token is kept.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for no text at all or if the
    /// tokenizer fails.
    pub fn tokenize(&self, texts: &[impl AsRef<str>]) -> Result<TokenBatch> {
        self.tokenizer.tokenize(texts, "")
    }

    /// One embedding a text, `[B, width]`, as the model's authors make it: behind the default prompt
    /// if there is one, pooled, and normalized to length 1 if a module says so.
    ///
    /// # Errors
    /// Those of [`TextEncoder::tokenize`] and [`EncoderModel::forward`].
    pub fn embed_sentences(&self, texts: &[impl AsRef<str>]) -> Result<Tensor> {
        self.embed_behind(texts, self.sentence.prompt(None)?)
    }

    /// [`TextEncoder::embed_sentences`] behind the prompt of this name.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a name that no prompt has, and
    /// those of [`TextEncoder::embed_sentences`].
    pub fn embed_with_prompt(&self, texts: &[impl AsRef<str>], name: &str) -> Result<Tensor> {
        self.embed_behind(texts, self.sentence.prompt(Some(name))?)
    }

    fn embed_behind(&self, texts: &[impl AsRef<str>], prompt: &str) -> Result<Tensor> {
        let batch = self.tokenizer.tokenize(texts, prompt)?;
        let mask = &batch.attention_mask;
        let hidden = self.model.forward(&batch.input_ids, None, Some(mask))?;
        if self.sentence.pooling.include_prompt || prompt.is_empty() {
            return self.pool(&hidden, mask);
        }
        let (b, n) = mask.dims2()?;
        let prompt = self.tokenizer.prompt_tokens(prompt)?.min(n);
        let outside = mask.narrow(D::Minus1, prompt, n - prompt)?;
        let prompt = Tensor::zeros((b, prompt), mask.dtype(), mask.device())?;
        self.pool(&hidden, &Tensor::cat(&[prompt, outside], 1)?)
    }

    /// Embeddings `[B, width]` of the last hidden states `[B, N, hidden_size]`; `mask` `[B, N]` is 1
    /// for the tokens that take part.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) unless the shapes fit.
    pub fn pool(&self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        self.sentence.forward(hidden, mask)
    }
}

/// The model with its pooling: the input is token ids, U32 `[B, N]` without padding, and the embedding
/// is that of [`TextEncoder::embed_sentences`].
impl LayeredModel for TextEncoder {
    type Input = Tensor;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.model.attention()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.model.attention_mut()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.model.embed(input_ids)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        self.model.layer(index, hidden, attend)
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, n, _) = hidden.dims3()?;
        let all = Tensor::ones((b, n), DType::U32, hidden.device())?;
        self.pool(&self.model.finish(hidden)?, &all)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        self.model.head_counts()
    }
}
