//! What takes part: caches of this crate and Candle's, with the same keys and values.

use crate::Shape;
use candle_core::{Device, Result, Tensor};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, CacheValues, Int8KvCache, KvCacheConfig,
};
use candle_nn::attention::cpu_flash::causal::run_causal_attn_cpu;

/// One way to compute.
pub struct Contender {
    /// For programs.
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    /// Bytes of keys and values.
    pub memory: usize,
    pub run: Box<dyn FnMut() -> Result<Tensor>>,
}

/// The last queries of `[1, H, M, D]`, and keys and values of `[1, H_kv, N, D]`.
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Inputs {
    /// From the standard normal distribution.
    pub fn random([h, h_kv, n, d]: Shape, queries: usize) -> Result<Self> {
        let randn = |shape| Tensor::randn(0f32, 1., shape, &Device::Cpu);
        let (k, v) = (randn((1, h_kv, n, d))?, randn((1, h_kv, n, d))?);
        Ok(Self { q: randn((1, h, queries, d))?, k, v })
    }
}

/// Everyone; the first is the default cache.
pub fn all(inputs: &Inputs) -> Result<Vec<Contender>> {
    let Inputs { q, k, v } = inputs;
    let mut contenders = Vec::new();
    for (id, name, values) in [
        ("ours", "f16 values", CacheValues::F16),
        ("ours-bf16", "bf16 values", CacheValues::Bf16),
        ("ours-int8", "int8 values", CacheValues::Int8),
    ] {
        let mut cache = Int8KvCache::new(KvCacheConfig { values, ..KvCacheConfig::default() });
        cache.append(k, v)?;
        let (memory, q, config) = (cache.memory_bytes(), q.clone(), AttentionConfig::int8());
        let run = move || Ok(cache.attention(&q, AttentionCall::causal(), &config)?);
        contenders.push(Contender { id, name, memory, run: Box::new(run) });
    }
    // Candle's layout is (B, S, H, D); its f32 path is its fastest one.
    let memory = (k.elem_count() + v.elem_count()) * size_of::<f32>();
    let (scale, offset) = (1.0 / (q.dim(3)? as f32).sqrt(), k.dim(2)? - q.dim(2)?);
    let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (q, k, v) = (bshd(q)?, bshd(k)?, bshd(v)?);
    let run = move || run_causal_attn_cpu::<f32>(&q, &k, &v, scale, offset, None, None);
    contenders.push(Contender { id: "candle", name: "Candle fp32", memory, run: Box::new(run) });
    Ok(contenders)
}
