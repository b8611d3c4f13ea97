//! Keys and values of the tokens so far.

use super::LlamaConfig;
use crate::{AttentionConfig, AttnMask, Backend, Error, Result, attention};
use candle_core::{DType, Device, Tensor};
use candle_nn::attention::flash_attn;

/// The cache of a whole model: one [`LayerCache`] a layer, all of the same length.
#[derive(Debug)]
pub struct LlamaCache {
    layers: Vec<LayerCache>,
    /// `[B, H_kv, D]`.
    shape: [usize; 3],
    context: usize,
}

impl LlamaCache {
    /// An empty cache for `batch` sequences of at most `context` tokens.
    ///
    /// # Errors
    /// [`Error::Config`] if `context` is 0 or beyond the model's context length.
    pub fn new(
        config: &LlamaConfig,
        batch: usize,
        context: usize,
        device: &Device,
    ) -> Result<Self> {
        let longest = config.context_length;
        if context == 0 || context > longest {
            return Err(Error::Config(format!(
                "context of {context} tokens, expected 1 to {longest}, which the model was trained \
                 for"
            )));
        }
        let shape = [batch, config.num_kv_heads, config.head_dim];
        let layer = || Ok(LayerCache::Full(FullCache::new(shape, context, device)?));
        let layers = (0..config.num_layers).map(|_| layer()).collect::<Result<_>>()?;
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

    /// Forgets all tokens, and keeps the memory.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(len));
    }

    /// Memory in use, in bytes.
    pub fn memory(&self) -> usize {
        self.layers.iter().map(LayerCache::memory).sum()
    }

    pub(super) fn layers_mut(&mut self) -> &mut [LayerCache] {
        &mut self.layers
    }

    /// Whether input ids of this shape, `[B, N]`, can be added.
    ///
    /// # Errors
    /// [`Error::Config`] for the cache of another model, [`Error::Shape`] for another batch,
    /// [`Error::ContextLength`] if there is no room for `N` tokens.
    pub(super) fn check(&self, config: &LlamaConfig, ids: &[usize]) -> Result<()> {
        let shape = [self.shape[0], config.num_kv_heads, config.head_dim];
        if self.layers.len() != config.num_layers || self.shape != shape {
            return Err(Error::Config(format!(
                "a cache of {} layers of [B, H_kv, D] {:?}, expected {} of {shape:?}",
                self.layers.len(),
                self.shape,
                config.num_layers
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
}

impl LayerCache {
    /// Adds the keys and values of new tokens, `[B, H_kv, M, D]` each.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        match self {
            Self::Full(cache) => cache.append(k, v),
        }
    }

    /// Attention of the last `M` tokens of the cache to all tokens up to themselves:
    /// `q` `[B, H, M, D]` to `[B, H, M, D]`.
    pub(super) fn attend(&self, q: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
        match self {
            Self::Full(cache) => cache.attend(q, config),
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        match self {
            Self::Full(cache) => cache.len,
        }
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory in use, in bytes.
    pub fn memory(&self) -> usize {
        match self {
            Self::Full(cache) => cache.memory(),
        }
    }

    fn truncate(&mut self, len: usize) {
        match self {
            Self::Full(cache) => cache.len = cache.len.min(len),
        }
    }
}

/// Keys and values in f32, in buffers that double when they are full.
#[derive(Debug)]
pub struct FullCache {
    /// `[B, capacity, H_kv, D]`; the first `len` tokens are in use. With the heads inside, the
    /// tokens of one sequence lie together, and are not copied to be read.
    keys: Tensor,
    values: Tensor,
    len: usize,
    context: usize,
}

/// Tokens that the buffers hold at first.
const FIRST_CAPACITY: usize = 256;

/// Queries of an fp32 call: all scores of a call are in memory at once, and keys beyond the last
/// query need not be scored.
const QUERIES: usize = 256;

impl FullCache {
    fn new([b, heads, depth]: [usize; 3], context: usize, device: &Device) -> Result<Self> {
        let shape = (b, FIRST_CAPACITY.min(context), heads, depth);
        let buffer = || Tensor::zeros(shape, DType::F32, device);
        Ok(Self { keys: buffer()?, values: buffer()?, len: 0, context })
    }

    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let end = self.len + k.dim(2)?;
        self.grow(end)?;
        self.keys.slice_set(&k.transpose(1, 2)?.contiguous()?, 1, self.len)?;
        self.values.slice_set(&v.transpose(1, 2)?.contiguous()?, 1, self.len)?;
        self.len = end;
        Ok(())
    }

    /// Makes room for `len` tokens.
    fn grow(&mut self, len: usize) -> Result<()> {
        let (b, capacity, heads, depth) = self.keys.dims4()?;
        if len <= capacity {
            return Ok(());
        }
        let capacity = len.max(2 * capacity).min(self.context.max(len));
        for buffer in [&mut self.keys, &mut self.values] {
            let larger = Tensor::zeros((b, capacity, heads, depth), DType::F32, buffer.device())?;
            if self.len > 0 {
                larger.slice_set(&buffer.narrow(1, 0, self.len)?.contiguous()?, 1, 0)?;
            }
            *buffer = larger;
        }
        Ok(())
    }

    fn memory(&self) -> usize {
        (self.keys.elem_count() + self.values.elem_count()) * size_of::<f32>()
    }

    fn attend(&self, q: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
        let (b, _, queries, _) = q.dims4()?;
        let past = self.len - queries;
        // Views `[B, H_kv, N, D]`.
        let of = |x: &Tensor| x.narrow(1, 0, self.len)?.transpose(1, 2);
        let (keys, values) = (of(&self.keys)?, of(&self.values)?);
        match (&config.backend, queries) {
            // Candle's flash attention refuses a softcap for more than one sequence.
            (Backend::Fp32, 1)
                if sees_everything(config) && (b == 1 || config.softcap.is_none()) =>
            {
                one_query_fp32(q, &keys, &values, config)
            }
            (Backend::Fp32, _) => in_blocks(q, &keys, &values, past, config),
            (Backend::Int8(_), 1) if sees_everything(config) => {
                one_query_int8(q, &keys, &values, config)
            }
            (Backend::Int8(_), _) => {
                attention(q, &keys, &values, &AttnMask::causal_with_offset(past), config)
            }
        }
    }
}

/// Whether the newest query sees all keys alike, wherever it stands.
fn sees_everything(config: &AttentionConfig) -> bool {
    config.window_left.is_none()
        && config.window_right.is_none()
        && config.alibi_slopes.is_none()
        && config.kv_lens.is_none()
}

/// The newest token in fp32: Candle's flash attention reads the buffers as they are, where
/// products of whole matrices would copy and repeat them.
fn one_query_fp32(q: &Tensor, k: &Tensor, v: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
    let (b, _, _, depth) = q.dims4()?;
    // For one sequence, the causal path has the faster code; for several, only the other knows
    // that the query is the last token.
    let mask = if b == 1 { AttnMask::causal_with_offset(k.dim(2)? - 1) } else { AttnMask::None };
    let [q, k, v] = [q, k, v].map(|x| x.transpose(1, 2));
    let scale = config.softmax_scale.unwrap_or(1.0 / (depth as f32).sqrt());
    Ok(flash_attn::<f32>(&q?, &k?, &v?, scale, mask, None, config.softcap)?)
}

/// The newest token in int8: the query heads that share a key head become queries of one head.
fn one_query_int8(q: &Tensor, k: &Tensor, v: &Tensor, config: &AttentionConfig) -> Result<Tensor> {
    let (b, heads, _, depth) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let q = q.reshape((b, kv_heads, heads / kv_heads, depth))?;
    let out = attention(&q, k, v, &AttnMask::None, config)?;
    Ok(out.reshape((b, heads, 1, depth))?)
}

/// Many queries in fp32, block by block.
fn in_blocks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    past: usize,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let queries = q.dim(2)?;
    let mut out = Vec::with_capacity(queries.div_ceil(QUERIES));
    for start in (0..queries).step_by(QUERIES) {
        let len = QUERIES.min(queries - start);
        let q = q.narrow(2, start, len)?;
        let keys = past + start + len;
        let mask = AttnMask::causal_with_offset(past + start);
        out.push(attention(&q, &k.narrow(2, 0, keys)?, &v.narrow(2, 0, keys)?, &mask, config)?);
    }
    Ok(Tensor::cat(&out, 2)?)
}
