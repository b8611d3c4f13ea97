//! The decoder: token ids in, logits out.

use super::cache::LlamaCache;
use super::config::LlamaConfig;
use super::gguf::Gguf;
use super::layer::LlamaLayer;
use super::linear::{Matrix, WeightFormat};
use super::rope::Rope;
use super::weights::{Loader, Part, Source};
use crate::attention::{AttentionConfig, KvCacheConfig};
use crate::memory::check_size;
use crate::models::Weights;
use crate::models::files::unused_head;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, RmsNorm};
use std::path::Path;

/// A Llama-family decoder with a switchable attention per layer. A clone shares the weights.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::AttentionConfig;
/// use candle_int8_attention::models::llama::{LlamaModel, WeightFormat};
///
/// let path = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// let mut model = LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu)?;
/// model.set_attention(&AttentionConfig::int8());
/// let mut cache = model.new_cache(1, 2048)?;
/// let prompt = Tensor::new(&[[504u32, 2365, 3575, 282, 4649, 314]], &Device::Cpu)?;
/// let logits = model.forward(&prompt, &mut cache)?; // of the token that comes next
/// let next = logits.argmax_keepdim(1)?;
/// let logits = model.forward(&next, &mut cache)?;
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Clone)]
pub struct LlamaModel {
    config: LlamaConfig,
    device: Device,
    embeddings: Matrix,
    rope: Rope,
    layers: Vec<LlamaLayer>,
    norm: RmsNorm,
    output: Matrix,
    warnings: Vec<String>,
}

/// Says what to set where the output matrix may be missing on purpose. A `config.json` that does not
/// say so has one: that is the default of Hugging Face.
fn untied(error: Error) -> Error {
    match error {
        Error::MissingTensor { path, name, hint } => Error::MissingTensor {
            path,
            name,
            hint: format!(
                "{hint}; if the token embeddings are the output matrix too, set \
                 \"tie_word_embeddings\": true in config.json"
            ),
        },
        other => other,
    }
}

impl LlamaModel {
    /// Loads a GGUF file, or a folder with `config.json` and safetensors; all layers start with
    /// fp32 attention. The format is for GGUF; safetensors become f32.
    ///
    /// # Errors
    /// Those of [`LlamaModel::from_gguf`] and [`LlamaModel::from_folder`].
    pub fn load(path: impl AsRef<Path>, format: WeightFormat, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::from_folder(path, device);
        }
        Self::from_gguf(&Gguf::open(path)?, format, device)
    }

    /// Loads the tensors of a GGUF file.
    ///
    /// # Errors
    /// Those of [`Gguf::llama_config`]; [`Error::MissingTensor`], [`Error::ModelShape`], or
    /// [`Error::Corrupt`] for a tensor that is not there, does not fit, or cannot be read.
    pub fn from_gguf(file: &Gguf, format: WeightFormat, device: &Device) -> Result<Self> {
        let config = file.llama_config()?;
        let eps = config.rms_norm_eps;
        Self::new(Loader::new(Source::Gguf(file, format), eps, device), config, device)
    }

    /// Loads `config.json` and `model.safetensors` (or what `model.safetensors.index.json` names)
    /// of a folder, as Hugging Face's `LlamaForCausalLM` writes them.
    ///
    /// # Errors
    /// Those of [`LlamaConfig::load`], [`Weights::open`] and [`Weights::get`].
    pub fn from_folder(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let config = LlamaConfig::load(folder.join("config.json"))?;
        let weights = Weights::open_folder(folder)?;
        let loader = Loader::new(Source::Safetensors(&weights), config.rms_norm_eps, device);
        Self::new(loader, config, device)
    }

    fn new(mut from: Loader<'_>, config: LlamaConfig, device: &Device) -> Result<Self> {
        let (rows, hidden) = (config.vocab_size, config.hidden_size);
        if from.has_layer(config.num_hidden_layers) {
            return Err(Error::Mismatch(format!(
                "{} layers by the configuration, but the weights hold more",
                config.num_hidden_layers
            )));
        }
        let embeddings = from.matrix(Part::EMBEDDINGS, rows, hidden)?;
        let output = match config.tie_word_embeddings {
            true => embeddings.clone(),
            false => from.matrix(Part::OUTPUT, rows, hidden).map_err(untied)?,
        };
        let norm = from.norm(Part::OUTPUT_NORM, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| LlamaLayer::load(from.layer(index), &config))
            .collect::<Result<_>>()?;
        Ok(Self {
            embeddings,
            output,
            norm,
            layers,
            warnings: from.unused_head().map(unused_head).into_iter().collect(),
            // After the weights, whose shapes bound the head dim.
            rope: Rope::new(&config.rope, config.head_dim),
            config,
            device: device.clone(),
        })
    }

    /// What of the files is not computed with, and changes what the model is: in sentences, for
    /// people.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The device it was loaded to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[LlamaLayer] {
        &self.layers
    }

    /// The layers, to switch the attention or the kind of cache of one.
    pub fn layers_mut(&mut self) -> &mut [LlamaLayer] {
        &mut self.layers
    }

    /// Switches the attention of all layers.
    pub fn set_attention(&mut self, config: &AttentionConfig) {
        for layer in &mut self.layers {
            layer.attention.set_config(config.clone());
        }
    }

    /// Sets how new caches hold the keys and values of layers with int8 attention.
    pub fn set_kv_cache(&mut self, config: &KvCacheConfig) {
        for layer in &mut self.layers {
            layer.kv_cache = config.clone();
        }
    }

    /// An empty cache for `batch` sequences of at most `context` tokens: on the CPU an
    /// [`Int8KvCache`](crate::Int8KvCache) with the layer's own
    /// [`kv_cache`](LlamaLayer::kv_cache) where attention is int8, f32 elsewhere.
    ///
    /// A layer that is switched to fp32 later refuses an int8 cache. [`LlamaCache::full`] makes one
    /// that serves both kinds of attention, and then keys are quantized again with every call, as
    /// the layer's attention says: an int8 cache has scales of its own, so a granularity or static
    /// ranges that were chosen there change nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `context` is 0 or beyond the model's context length, [`Error::Shape`] for a
    /// batch that memory has no addresses for.
    pub fn new_cache(&self, batch: usize, context: usize) -> Result<LlamaCache> {
        let layers = self.layers.iter().map(|layer| (layer.attention.config(), &layer.kv_cache));
        let layers: Vec<_> = layers.collect();
        LlamaCache::of_layers(&layers, &self.config, batch, context, &self.device)
    }

    /// Logits of the token that follows: `input_ids` `[B, N]` U32, which come after the tokens in
    /// the cache and are added to it, to `[B, vocab_size]`.
    ///
    /// # Errors
    /// Those of [`LlamaModel::hidden_states`].
    pub fn forward(&self, input_ids: &Tensor, cache: &mut LlamaCache) -> Result<Tensor> {
        let hidden = self.hidden_states(input_ids, cache)?;
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?;
        self.logits(&last)
    }

    /// The last hidden states, normalized: `input_ids` `[B, N]` U32, which come after the tokens
    /// in the cache and are added to it, to `[B, N, hidden_size]`.
    ///
    /// # Errors
    /// [`Error::ContextLength`] if the cache has no room, [`Error::Shape`] for an empty input or
    /// one that does not fit to the cache, [`Error::DType`] unless ids are U32,
    /// [`Error::InvalidArgument`] for an id outside of the vocabulary, [`Error::Mismatch`] for the
    /// cache of another model or a layer switched to fp32 over an int8 cache, and those of [`attention`](crate::attention()). After an error the cache is as it was.
    pub fn hidden_states(&self, input_ids: &Tensor, cache: &mut LlamaCache) -> Result<Tensor> {
        let before = cache.len();
        let hidden = self.run_layers(input_ids, cache);
        if hidden.is_err() {
            cache.truncate(before)?;
        }
        hidden
    }

    /// What enters the first layer: `input_ids` `[B, N]` U32 to `[B, N, hidden_size]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty input, [`Error::DType`] unless ids are U32, [`Error::InvalidArgument`]
    /// for an id outside of the vocabulary.
    pub fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        self.check_ids(input_ids)?;
        self.embeddings.rows(input_ids)
    }

    /// Layer `index` over whole sequences, without a cache and with attention by someone else:
    /// `hidden` `[B, N, hidden_size]` to the same. `attend` gets queries `[B, H, N, head_dim]` and
    /// keys and values `[B, H_kv, N, head_dim]` behind the rotary embedding, computes causal
    /// attention, and returns `[B, H, N, head_dim]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such layer, [`Error::Shape`] for hidden states of another
    /// shape; those of `attend`; Candle's own.
    pub fn layer_with(
        &self,
        index: usize,
        hidden: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(layer) = self.layers.get(index) else {
            let layers = self.layers.len();
            return Err(Error::InvalidArgument(format!(
                "layer {index}, expected less than {layers}"
            )));
        };
        const OP: &str = "LlamaModel::layer_with";
        let (batch, tokens) = match *hidden.dims() {
            [batch, tokens, width] if width == self.config.hidden_size => (batch, tokens),
            ref shape => {
                let expected = format!("[B, N, {}]", self.config.hidden_size);
                let shape = shape.to_vec();
                return Err(Error::Shape { op: OP, tensor: "hidden", shape, expected });
            }
        };
        self.check_batch(OP, batch, tokens)?;
        let rotation = self.rope.at(0, tokens, &self.device)?;
        layer.forward_with(hidden, &rotation, attend)
    }

    /// What follows the last layer: `[B, N, hidden_size]`, normalized.
    ///
    /// # Errors
    /// Candle's own, for a tensor of another shape or dtype.
    pub fn normalize(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.norm.forward(hidden)?)
    }

    /// Logits of hidden states: `[.., hidden_size]` to `[.., vocab_size]`.
    ///
    /// # Errors
    /// Candle's own, for a tensor of another shape or dtype.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output.forward(&hidden.contiguous()?)
    }

    fn run_layers(&self, input_ids: &Tensor, cache: &mut LlamaCache) -> Result<Tensor> {
        let tokens = self.check_ids(input_ids)?;
        let layers: Vec<_> = self.layers.iter().map(|layer| layer.attention.config()).collect();
        cache.check(&self.config, &layers, input_ids.dims())?;
        let rotation = self.rope.at(cache.len(), tokens, &self.device)?;
        let mut hidden = self.embeddings.rows(input_ids)?;
        for (layer, cache) in self.layers.iter().zip(cache.layers_mut()) {
            hidden = layer.forward(&hidden, &rotation, cache)?;
        }
        self.normalize(&hidden)
    }

    /// The number of tokens of each sequence.
    fn check_ids(&self, ids: &Tensor) -> Result<usize> {
        const OP: &str = "LlamaModel::forward";
        if ids.dtype() != DType::U32 {
            let dtype = ids.dtype();
            return Err(Error::DType { op: OP, tensor: "input_ids", dtype, expected: "U32" });
        }
        let tokens = match *ids.dims() {
            [_, tokens] if tokens > 0 => tokens,
            ref shape => {
                let expected = "[B, N] with at least one token".to_string();
                let shape = shape.to_vec();
                return Err(Error::Shape { op: OP, tensor: "input_ids", shape, expected });
            }
        };
        self.check_batch(OP, ids.dims()[0], tokens)?;
        let rows = self.config.vocab_size;
        let ids = ids.flatten_all()?.to_vec1::<u32>()?;
        match ids.into_iter().find(|&id| id as usize >= rows) {
            Some(id) => Err(Error::InvalidArgument(format!(
                "input_ids holds {id}, expected less than {rows}"
            ))),
            None => Ok(tokens),
        }
    }

    /// # Errors
    /// [`Error::Shape`] for a batch of which memory has no addresses for the widest tensors of a forward pass:
    /// of a feed-forward block, of all heads, and the logits.
    fn check_batch(&self, op: &'static str, batch: usize, tokens: usize) -> Result<()> {
        let LlamaConfig { hidden_size, intermediate_size, vocab_size, .. } = self.config;
        let heads = self.config.num_attention_heads * self.config.head_dim;
        let width = hidden_size.max(intermediate_size).max(heads).max(vocab_size);
        check_size(op, "the widest tensor of a forward pass", &[batch, tokens, width])
    }
}
