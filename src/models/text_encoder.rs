//! An encoder with its tokenizer: text in, embeddings out.

use super::sentence::SentenceConfig;
use super::text_tokenizer::TextTokenizer;
use super::{Attend, EncoderModel, LayeredModel, ModelFiles, NamedLinear, TokenBatch};
use crate::attention::{AttentionConfig, QuantizedAttention};
use crate::nn::Precision;
use crate::{Error, Result, parallel};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

/// Tokens of a batch, but for the text that fills it: enough for every weight that is read to be used by
/// many of them, and few enough for what lies between two layers to stay in a cache.
const BATCH_TOKENS: usize = 2048;

/// Texts of fewer tokens have attention in fp32 in all precisions: rounding takes longer than it saves. At 96 tokens fp32
/// took at most 0.96 of the time of int8, on every level of x86, with heads of 32 and of 64 channels (Zen 5).
const SHORT: usize = 96;

/// Texts that are tokenized at a time.
const BATCH_TEXTS: usize = 64;

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
    /// The linear layers are in [`Precision::Int16`] and attention is in fp32. With MiniLM-L3 and L6 that embeds 1.3 to
    /// 1.6 times as many texts as [`Precision::F32`] (AMD EPYC, AVX-512 VNNI, 2 threads), is not slower with AVX2, and
    /// every cosine to the embedding in `F32` is above 0.99999; `docs/encoders.md` has the tables. `Int8` is faster
    /// still, with cosines above 0.9993. [`TextEncoder::load_in`] takes either, and is what an embedding in `F32` needs.
    ///
    /// # Errors
    /// Those of [`EncoderModel::load`]; [`Error::Corrupt`](crate::Error::Corrupt) for a file that is
    /// not what its name promises, or a tokenizer with more words than the model;
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a module or a pooling that is not
    /// implemented; [`Error::Mismatch`](crate::Error::Mismatch) and
    /// [`Error::MissingFile`](crate::Error::MissingFile) for files that contradict each other.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        Self::load_in(files, device, Precision::Int16)
    }

    /// [`TextEncoder::load`] in another precision, as [`TextEncoder::set_precision`] has it, from the weights as
    /// the file has them.
    ///
    /// # Errors
    /// Those of [`TextEncoder::load`].
    pub fn load_in(files: &ModelFiles, device: &Device, precision: Precision) -> Result<Self> {
        let model = EncoderModel::load(files, device)?;
        let config = model.config();
        let folder = files.config.parent().unwrap_or(Path::new(""));
        let sentence = SentenceConfig::load(folder, config.hidden_size, device)?;
        let (limit, lower_case) = (sentence.max_tokens, sentence.lower_case);
        let tokenizer = TextTokenizer::load(files, &config, limit, lower_case, device)?;
        let mut encoder = Self { model, tokenizer, sentence };
        if precision != Precision::F32 {
            encoder.set_precision(precision)?;
        }
        Ok(encoder)
    }

    /// Computes in these numbers from now on: the linear layers in `precision`
    /// ([`EncoderModel::set_linear`]), and attention as [`TextEncoder::set_attention`] has it. Layers are packed
    /// from what they hold: `F32` is that of the file if the encoder was loaded in it.
    ///
    /// # Errors
    /// Those of [`EncoderModel::set_linear`].
    pub fn set_precision(&mut self, precision: Precision) -> Result<()> {
        self.model.set_linear(precision)?;
        self.set_attention(precision);
        Ok(())
    }

    /// Computes attention in fp32 for `F32` and `Int16`. For `Int8` it is in int8 as [`AttentionConfig::int8`], but
    /// for texts of fewer than 96 tokens, for which fp32 takes less time. For a text of any length it is
    /// [`EncoderModel::set_attention`] that chooses.
    pub fn set_attention(&mut self, precision: Precision) {
        self.model.set_attention(&match precision {
            Precision::F32 | Precision::Int16 => AttentionConfig::fp32(),
            Precision::Int8 => AttentionConfig::int8(),
        });
        self.attention_mut().into_iter().for_each(|attention| attention.set_fp32_below(SHORT));
    }

    /// Writes the linear layers as they are packed, so that a start does not pack them again:
    ///
    /// ```no_run
    /// use candle_core::Device;
    /// use candle_int8_attention::models::{ModelFiles, TextEncoder};
    /// use candle_int8_attention::nn::Precision;
    ///
    /// let files = ModelFiles::from_dir("all-MiniLM-L6-v2")?;
    /// let mut encoder = TextEncoder::load_in(&files, &Device::Cpu, Precision::Int8)?;
    /// encoder.save_linear("all-MiniLM-L6-v2/int8.safetensors")?;
    ///
    /// // Another time: the same bits.
    /// let mut encoder = TextEncoder::load(&files, &Device::Cpu)?;
    /// encoder.load_linear("all-MiniLM-L6-v2/int8.safetensors")?;
    /// encoder.set_attention(Precision::Int8);
    /// # Ok::<(), candle_int8_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`EncoderModel::save_linear`].
    pub fn save_linear(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.model.save_linear(path)
    }

    /// Takes the linear layers that [`TextEncoder::save_linear`] wrote for this model. What is checked against
    /// the configuration is names and shapes, not that they are of the same weights.
    ///
    /// # Errors
    /// Those of [`EncoderModel::load_linear`].
    pub fn load_linear(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.model.load_linear(path)
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

    /// Elements of an embedding: those of a hidden state, unless poolings or dense layers make it another number.
    pub fn embedding_size(&self) -> usize {
        self.sentence.width
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

    /// Embeddings of any number of texts, in their order, as they are asked for, each as the model's authors
    /// make it: behind the default prompt if there is one, pooled, and normalized to length 1 if a module says
    /// so. A text longer than the model's input is cut, as [`TextEncoder::tokenize`] does.
    ///
    /// Texts are taken as long as a batch of some 2,000 tokens has room, and packed without padding: no
    /// order of lengths costs more than another, and an embedding has the bits that its text alone gives.
    /// Beside the batch, and what the iterator of the texts holds, no memory is needed, however many they
    /// are.
    ///
    /// Each item is an error for itself of [`TextEncoder::tokenize`] or [`EncoderModel::forward_sequences`];
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
        let texts = texts.into_iter();
        Embeddings { encoder: self, prompt: None, texts, waiting, ready, failed: false }
    }

    /// [`TextEncoder::embed`] behind the prompt of this name; a name that no prompt has is an error of the
    /// first item.
    pub fn embed_behind<I>(&self, texts: I, prompt: &str) -> Embeddings<'_, I::IntoIter>
    where
        I: IntoIterator<Item: AsRef<str> + Send>,
    {
        Embeddings { prompt: Some(prompt.to_string()), ..self.embed(texts) }
    }

    /// The embeddings of [`TextEncoder::embed`] as a tensor, `[B, width]`.
    ///
    /// # Errors
    /// Those of [`TextEncoder::embed`], and [`Error::InvalidArgument`] for no text at all.
    pub fn embed_sentences(&self, texts: &[impl AsRef<str>]) -> Result<Tensor> {
        self.rows(self.embed(texts.iter().map(|text| text.as_ref())))
    }

    /// [`TextEncoder::embed_sentences`] behind the prompt of this name.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a name that no prompt has, and those of
    /// [`TextEncoder::embed_sentences`].
    pub fn embed_with_prompt(&self, texts: &[impl AsRef<str>], name: &str) -> Result<Tensor> {
        self.rows(self.embed_behind(texts.iter().map(|text| text.as_ref()), name))
    }

    fn rows(&self, embeddings: impl Iterator<Item = Result<TextEmbedding>>) -> Result<Tensor> {
        let (mut all, mut count) = (Vec::new(), 0);
        for embedding in embeddings {
            all.extend(embedding?.vector);
            count += 1;
        }
        if count == 0 {
            return Err(Error::InvalidArgument("no text to embed, expected at least one".into()));
        }
        let (width, device) = (all.len() / count, self.model.word_embeddings().device());
        Ok(Tensor::from_vec(all, (count, width), device)?)
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

    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        self.model.linear_mut()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.model.embed(input_ids)
    }

    fn sample(&self) -> Result<Option<Tensor>> {
        self.model.sample()
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

/// The embedding of a text.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TextEmbedding {
    /// `[width]`.
    pub vector: Vec<f32>,
    /// Tokens that it was made of, special ones included.
    pub tokens: usize,
    /// Tokens that were cut off because the model's input is shorter.
    pub truncated: usize,
}

/// Texts on their way to embeddings; see [`TextEncoder::embed`].
pub struct Embeddings<'a, I> {
    encoder: &'a TextEncoder,
    /// The name of what stands before each text, unless that is the default.
    prompt: Option<String>,
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
    fn tokenize(&mut self, prompt: &str) -> Result<()> {
        let tokenizer = &self.encoder.tokenizer;
        while self.waiting.iter().map(|text| text.ids.len()).sum::<usize>() < BATCH_TOKENS {
            let texts: Vec<_> = self.texts.by_ref().take(BATCH_TEXTS).collect();
            if texts.is_empty() {
                break;
            }
            for ids in parallel::map(texts, |text| tokenizer.ids(text.as_ref(), prompt)) {
                let (ids, truncated) = ids?;
                self.waiting.push_back(Tokens { ids, truncated });
            }
        }
        Ok(())
    }

    /// Embeds one batch of those that wait.
    fn run(&mut self) -> Result<()> {
        let encoder = self.encoder;
        let prompt = encoder.sentence.prompt(self.prompt.as_deref())?;
        self.tokenize(prompt)?;
        let (mut batch, mut tokens) = (Vec::new(), 0);
        while let Some(text) = self.waiting.pop_front_if(|_| tokens < BATCH_TOKENS) {
            tokens += text.ids.len();
            batch.push(text);
        }
        let outside = match encoder.sentence.pooling.include_prompt {
            true => 0,
            false => encoder.tokenizer.prompt_tokens(prompt)?,
        };
        let hidden = encoder.model.forward_sequences(&batch)?;
        for (text, hidden) in batch.into_iter().zip(hidden) {
            let len = text.ids.len();
            let mask = (0..len).map(|token| u32::from(token >= outside)).collect();
            let mask = Tensor::from_vec(mask, (1, len), hidden.device())?;
            let vector = encoder.pool(&hidden.unsqueeze(0)?, &mask)?.squeeze(0)?.to_vec1()?;
            self.ready.push_back(TextEmbedding { vector, tokens: len, truncated: text.truncated });
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
