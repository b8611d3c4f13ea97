//! Keys and values of the tokens so far.

use super::LlamaConfig;
use crate::attention::{
    AttentionCall, AttentionConfig, Backend, Int8KvCache, KvCacheConfig, attention,
};
use crate::memory::check_size;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// The cache of a whole model: one [`LayerCache`] a layer, all of the same length.
#[derive(Debug)]
pub struct LlamaCache {
    layers: Vec<LayerCache>,
    /// `[B, H_kv, D]`.
    shape: [usize; 3],
    context: usize,
}

impl LlamaCache {
    /// An empty cache in f32 for `batch` sequences of at most `context` tokens, which serves both
    /// kinds of attention. [`LlamaModel::new_cache`](super::LlamaModel::new_cache) makes one in
    /// int8.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `context` is 0 or beyond the model's context length, [`Error::Shape`] for a
    /// batch that memory has no addresses for, and those of [`LlamaConfig::check`].
    pub fn full(
        config: &LlamaConfig,
        batch: usize,
        context: usize,
        device: &Device,
    ) -> Result<Self> {
        let full = |shape| Ok(LayerCache::Full(FullCache::new(shape, context, device)?));
        Self::build(config, batch, context, |_, shape| full(shape))
    }

    /// An empty cache that is int8 in the layers with int8 attention, and f32 in the others; the
    /// int8 cache is for the CPU, so on another device all of it is f32.
    ///
    /// # Errors
    /// Those of [`LlamaCache::full`].
    pub(super) fn of_layers(
        layers: &[(&AttentionConfig, &KvCacheConfig)],
        config: &LlamaConfig,
        batch: usize,
        context: usize,
        device: &Device,
    ) -> Result<Self> {
        Self::build(config, batch, context, |layer, shape| {
            let (attention, kv_cache) = layers[layer];
            Ok(match attention.backend {
                Backend::Int8(_) if device.is_cpu() => {
                    LayerCache::Int8(Int8KvCache::new(kv_cache.clone()))
                }
                _ => LayerCache::Full(FullCache::new(shape, context, device)?),
            })
        })
    }

    /// With what `layer` makes of a layer's number and `[B, H_kv, D]`.
    fn build(
        config: &LlamaConfig,
        batch: usize,
        context: usize,
        layer: impl Fn(usize, [usize; 3]) -> Result<LayerCache>,
    ) -> Result<Self> {
        let longest = config.max_position_embeddings;
        if context == 0 || context > longest {
            return Err(Error::InvalidArgument(format!(
                "context of {context} tokens, expected 1 to {longest}, which the model was trained \
                 for"
            )));
        }
        config.check()?;
        let [heads, depth] = [config.num_key_value_heads, config.head_dim];
        // Of one token: a context may be any number, and takes no memory before its tokens.
        let token = [config.num_hidden_layers, batch, heads, depth];
        check_size("LlamaCache", "the keys of a token", &token)?;
        let shape = [batch, heads, depth];
        let layers = (0..config.num_hidden_layers).map(|index| layer(index, shape));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { layers, shape, context })
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most tokens it can hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[LayerCache] {
        &self.layers
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(LayerCache::reset);
    }

    /// Forgets all but the first `len` tokens.
    ///
    /// What comes next is then the same as if no more tokens had been there, bit for bit, but for
    /// two things in int8 layers: tokens that were quantized, because they were no longer among the
    /// [recent](crate::KvCacheConfig::recent) ones, stay so, and so does a mean of keys that came
    /// from tokens which are forgotten.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the [window](crate::KvCacheConfig::window) of a layer has dropped
    /// tokens that would be seen again. The cache is then as it was.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        self.layers.iter().try_for_each(|layer| layer.check_truncate(len))?;
        self.layers.iter_mut().try_for_each(|layer| layer.truncate(len))
    }

    /// Memory in use, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::memory_bytes).sum()
    }

    pub(super) fn layers_mut(&mut self) -> &mut [LayerCache] {
        &mut self.layers
    }

    /// Whether input ids of this shape, `[B, N]`, can be added by these layers.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for the cache of another model or of other kinds of attention,
    /// [`Error::Shape`] for another batch, [`Error::ContextLength`] if there is no room for `N`
    /// tokens.
    pub(super) fn check(
        &self,
        config: &LlamaConfig,
        layers: &[&AttentionConfig],
        ids: &[usize],
    ) -> Result<()> {
        let shape = [self.shape[0], config.num_key_value_heads, config.head_dim];
        if self.layers.len() != config.num_hidden_layers || self.shape != shape {
            return Err(Error::Mismatch(format!(
                "a cache of {} layers of [B, H_kv, D] {:?}, expected {} of {shape:?}",
                self.layers.len(),
                self.shape,
                config.num_hidden_layers
            )));
        }
        if ids[0] != self.shape[0] {
            return Err(Error::Shape {
                op: "LlamaModel::forward",
                tensor: "input_ids",
                shape: ids.to_vec(),
                expected: format!("[{}, N] like the cache", self.shape[0]),
            });
        }
        for (index, (cache, attention)) in self.layers.iter().zip(layers).enumerate() {
            cache.check(index, attention, config)?;
        }
        let (tokens, used, context) = (ids[1], self.len(), self.context);
        match tokens <= context - used {
            true => Ok(()),
            false => Err(Error::ContextLength { tokens, used, context }),
        }
    }
}

/// The keys and values of one layer.
#[derive(Debug)]
#[non_exhaustive]
pub enum LayerCache {
    /// In f32.
    Full(FullCache),
    /// In int8, for int8 attention on the CPU.
    Int8(Int8KvCache),
}

impl LayerCache {
    /// Adds the keys and values of new tokens, `[B, H_kv, M, D]` each.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        match self {
            Self::Full(cache) => cache.append(k, v),
            Self::Int8(cache) => cache.append(k, v),
        }
    }

    /// Attention of the last `M` tokens of the cache to all tokens up to themselves:
    /// `q` `[B, H, M, D]` to `[B, H, M, D]`.
    pub(super) fn attend(&self, q: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
        match self {
            Self::Full(cache) => cache.attend(q, config),
            Self::Int8(cache) => cache.attention(q, AttentionCall::causal(), config),
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        match self {
            Self::Full(cache) => cache.len,
            Self::Int8(cache) => cache.len(),
        }
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory in use, in bytes.
    pub fn memory_bytes(&self) -> usize {
        match self {
            Self::Full(cache) => cache.memory_bytes(),
            Self::Int8(cache) => cache.memory_bytes(),
        }
    }

    /// Whether attention can be so. What an int8 cache has quantized cannot be taken back after an
    /// error, so it is asked before.
    fn check(&self, layer: usize, attention: &AttentionConfig, config: &LlamaConfig) -> Result<()> {
        match self {
            Self::Full(_) => Ok(()),
            Self::Int8(_) if attention.backend == Backend::Fp32 => Err(Error::Mismatch(format!(
                "fp32 attention in layer {layer}, whose cache is int8; expected int8, or a cache \
                 that is made after the attention was switched"
            ))),
            Self::Int8(_) => {
                Int8KvCache::check_config(config.num_attention_heads, config.head_dim, attention)
            }
        }
    }

    fn reset(&mut self) {
        match self {
            Self::Full(cache) => cache.len = 0,
            Self::Int8(cache) => cache.reset(),
        }
    }

    /// # Errors
    /// Those of [`LayerCache::truncate`].
    fn check_truncate(&self, len: usize) -> Result<()> {
        match self {
            Self::Full(_) => Ok(()),
            Self::Int8(cache) => cache.check_truncate(&vec![len; cache.lens().len()]),
        }
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        match self {
            _ if len == 0 => self.reset(),
            Self::Full(cache) => cache.len = cache.len.min(len),
            Self::Int8(cache) => cache.truncate(len)?,
        }
        Ok(())
    }
}

/// Keys and values in f32, in buffers that double when they are full.
#[derive(Debug)]
pub struct FullCache {
    /// `[B, H_kv, capacity, D]`; the first `len` tokens are in use.
    keys: Tensor,
    values: Tensor,
    len: usize,
    context: usize,
}

/// Tokens that the buffers hold at first.
const FIRST_CAPACITY: usize = 256;

impl FullCache {
    /// Without room for any token: memory follows what is appended, however large the batch is said to be.
    fn new([b, heads, depth]: [usize; 3], context: usize, device: &Device) -> Result<Self> {
        let buffer = || Tensor::zeros((b, heads, 0, depth), DType::F32, device);
        Ok(Self { keys: buffer()?, values: buffer()?, len: 0, context })
    }

    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let end = self.len + k.dim(2)?;
        self.grow(end)?;
        self.keys.slice_set(&k.contiguous()?, 2, self.len)?;
        self.values.slice_set(&v.contiguous()?, 2, self.len)?;
        self.len = end;
        Ok(())
    }

    /// Makes room for `len` tokens.
    fn grow(&mut self, len: usize) -> Result<()> {
        let (b, heads, capacity, depth) = self.keys.dims4()?;
        if len <= capacity {
            return Ok(());
        }
        let capacity = len.max(2 * capacity).max(FIRST_CAPACITY).min(self.context.max(len));
        for buffer in [&mut self.keys, &mut self.values] {
            let larger = Tensor::zeros((b, heads, capacity, depth), DType::F32, buffer.device())?;
            if self.len > 0 {
                larger.slice_set(&buffer.narrow(2, 0, self.len)?.contiguous()?, 2, 0)?;
            }
            *buffer = larger;
        }
        Ok(())
    }

    fn memory_bytes(&self) -> usize {
        (self.keys.elem_count() + self.values.elem_count()) * size_of::<f32>()
    }

    fn attend(&self, q: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
        let of = |x: &Tensor| x.narrow(2, 0, self.len);
        attention(q, &of(&self.keys)?, &of(&self.values)?, AttentionCall::causal(), config)
    }
}
