//! A BERT encoder with its tokenizer: text in, embeddings out.

use super::{BertModel, ModelFiles, pooling, tokenizer_file};
use crate::attention::AttentionConfig;
use crate::files::corrupt;
use crate::nn::Precision;
use crate::{Error, Result, parallel};
use candle_core::{Device, Tensor};
use std::collections::VecDeque;
use tokenizers::{Encoding, Tokenizer};

/// Tokens of a batch, but for the text that fills it: enough for every weight that is read to be used by
/// many of them, and few enough for what lies between two layers to stay in a cache.
const BATCH_TOKENS: usize = 2048;

/// Texts that are tokenized at a time.
const BATCH_TEXTS: usize = 64;

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

    /// Computes in these numbers from now on: the linear layers in `precision`
    /// ([`BertModel::set_linear`]), and attention in fp32 for `F32` and `Int16`, in int8 as
    /// [`AttentionConfig::int8`] for `Int8`.
    ///
    /// # Errors
    /// Those of [`BertModel::set_linear`].
    pub fn set_precision(&mut self, precision: Precision) -> Result<()> {
        self.model.set_linear(precision)?;
        self.model.set_attention(&match precision {
            Precision::F32 | Precision::Int16 => AttentionConfig::fp32(),
            Precision::Int8 => AttentionConfig::int8(),
        });
        Ok(())
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
            let encoding = self.encode(text.as_ref())?;
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

    fn encode(&self, text: &str) -> Result<Encoding> {
        tokenizer_file::run(|| self.tokenizer.encode(text, true))
    }

    /// Embeddings of any number of texts, in their order, as they are asked for: the mean of a text's last
    /// hidden states, not normalized to length 1. A text longer than the model's input is cut, as
    /// [`TextEncoder::tokenize`] does.
    ///
    /// Texts are taken as long as a batch of some 2,000 tokens has room, and packed without padding: no
    /// order of lengths costs more than another, and an embedding has the bits that its text alone gives.
    /// Beside the batch, and what the iterator of the texts holds, no memory is needed, however many they
    /// are.
    ///
    /// Each item is an error for itself of [`TextEncoder::tokenize`] or [`BertModel::forward_sequences`];
    /// after one, nothing follows.
    ///
    /// ```no_run
    /// use candle_core::Device;
    /// use candle_int8_attention::models::{ModelFiles, TextEncoder};
    /// use std::io::BufRead;
    ///
    /// let files = ModelFiles::from_dir("all-MiniLM-L6-v2")?;
    /// let encoder = TextEncoder::load(&files, &Device::Cpu)?;
    /// for embedding in encoder.embed(std::io::stdin().lock().lines().map_while(|line| line.ok())) {
    ///     println!("{:?}", embedding?.vector);
    /// }
    /// # Ok::<(), candle_int8_attention::Error>(())
    /// ```
    pub fn embed<I>(&self, texts: I) -> Embeddings<'_, I::IntoIter>
    where
        I: IntoIterator<Item: AsRef<str> + Send>,
    {
        let (waiting, ready) = (VecDeque::new(), VecDeque::new());
        Embeddings { encoder: self, texts: texts.into_iter(), waiting, ready, failed: false }
    }

    /// The embeddings of [`TextEncoder::embed`] as a tensor, `[B, hidden_size]`.
    ///
    /// # Errors
    /// Those of [`TextEncoder::embed`], and [`Error::InvalidArgument`] for no text at all.
    pub fn embed_sentences(&self, texts: &[impl AsRef<str>]) -> Result<Tensor> {
        if texts.is_empty() {
            return Err(Error::InvalidArgument("no text to embed, expected at least one".into()));
        }
        let mut all = Vec::new();
        for embedding in self.embed(texts.iter().map(|text| text.as_ref())) {
            all.extend(embedding?.vector);
        }
        let shape = (texts.len(), self.model.config().hidden_size);
        Ok(Tensor::from_vec(all, shape, &self.device)?)
    }
}

/// The embedding of a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TextEmbedding {
    /// `[hidden_size]`.
    pub vector: Vec<f32>,
    /// Tokens that it was made of, special ones included.
    pub tokens: usize,
    /// Tokens that were cut off because the model's input is shorter.
    pub truncated: usize,
}

/// Texts on their way to embeddings; see [`TextEncoder::embed`].
pub struct Embeddings<'a, I> {
    encoder: &'a TextEncoder,
    texts: I,
    waiting: VecDeque<Tokens>,
    ready: VecDeque<TextEmbedding>,
    failed: bool,
}

/// A text as ids.
struct Tokens {
    ids: Vec<u32>,
    truncated: usize,
}

impl AsRef<[u32]> for Tokens {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

impl<I: Iterator<Item: AsRef<str> + Send>> Embeddings<'_, I> {
    /// Tokenizes texts until there are enough for a batch, or no more.
    fn tokenize(&mut self) -> Result<()> {
        let longest = self.encoder.model.config().max_position_embeddings;
        while self.waiting.iter().map(|text| text.ids.len()).sum::<usize>() < BATCH_TOKENS {
            let texts: Vec<_> = self.texts.by_ref().take(BATCH_TEXTS).collect();
            if texts.is_empty() {
                break;
            }
            let encodings = parallel::map(texts, |text| self.encoder.encode(text.as_ref()));
            for encoding in encodings {
                let encoding = encoding?;
                let truncated = encoding.len().saturating_sub(longest);
                self.waiting.push_back(Tokens { ids: cut(encoding.get_ids(), longest), truncated });
            }
        }
        Ok(())
    }

    /// Embeds one batch of those that wait.
    fn run(&mut self) -> Result<()> {
        self.tokenize()?;
        let (mut batch, mut tokens) = (Vec::new(), 0);
        while let Some(text) = self.waiting.pop_front_if(|_| tokens < BATCH_TOKENS) {
            tokens += text.ids.len();
            batch.push(text);
        }
        let hidden = self.encoder.model.forward_sequences(&batch)?;
        for (text, hidden) in batch.into_iter().zip(hidden) {
            let vector = mean_of_rows(&hidden)?;
            let (tokens, truncated) = (text.ids.len(), text.truncated);
            self.ready.push_back(TextEmbedding { vector, tokens, truncated });
        }
        Ok(())
    }
}

impl<I: Iterator<Item: AsRef<str> + Send>> Iterator for Embeddings<'_, I> {
    type Item = Result<TextEmbedding>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty()
            && !self.failed
            && let Err(error) = self.run()
        {
            self.failed = true;
            return Some(Err(error));
        }
        self.ready.pop_front().map(Ok)
    }
}

/// The mean of `[N, hidden]` over tokens; zeros of no token.
fn mean_of_rows(hidden: &Tensor) -> Result<Vec<f32>> {
    let tokens = hidden.dim(0)?.max(1) as f64;
    Ok((hidden.sum(0)? / tokens)?.to_vec1()?)
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
