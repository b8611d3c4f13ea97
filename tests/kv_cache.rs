//! The int8 cache: what is stored, what attention makes of it, and what goes wrong.

mod common;

// Named, so that the files are in a folder of their own.
mod kv_cache {
    mod attend;
    mod errors;
    mod files;
    mod smoothing;
    mod storage;
    mod window;

    use super::*;
}

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::quant::{CodeStorage, QuantConfig, QuantizedTensor, Rotation};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, AttnMask, CacheValues, Causal, Error, Int8KvCache,
    KeySmoothing, KvCacheConfig, PvPrecision, attention,
};
use common::randn;

/// Keys as models have them: a bias of their own for each head. They are multiples of 2^-10, so that
/// their mean is exact in any order of sums: another last bit would move a code now and then.
fn keys(shape: (usize, usize, usize, usize)) -> Tensor {
    let (_, h, _, d) = shape;
    let bias = (randn((1, h, 1, d)) * 2.0).unwrap();
    let keys = randn(shape).broadcast_add(&bias).unwrap();
    ((keys * 1024.0).unwrap().round().unwrap() / 1024.0).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    common::largest_difference(a, b) as f32
}

fn tokens(x: &Tensor, start: usize, len: usize) -> Tensor {
    x.narrow(2, start, len).unwrap()
}

/// P·V in f32, so that what is stored is all that differs from fp32.
const INT8: fn() -> AttentionConfig = || AttentionConfig::int8().pv(PvPrecision::F32);
const FP32: fn() -> AttentionConfig = AttentionConfig::fp32;

fn filled(config: KvCacheConfig, k: &Tensor, v: &Tensor) -> Int8KvCache {
    let mut cache = Int8KvCache::new(config);
    cache.append(k, v).unwrap();
    cache
}

/// What the cache holds, as f32: keys quantized once each after subtracting `offset`, values in
/// their format; the first `sinks` and the last `recent` tokens as they are.
fn as_stored(k: &Tensor, v: &Tensor, config: &KvCacheConfig, offset: &Tensor) -> (Tensor, Tensor) {
    let per_token = |x: &Tensor| {
        let quantized = QuantizedTensor::quantize(x, &QuantConfig::default()).unwrap();
        quantized.dequantize(&Device::Cpu).unwrap().reshape(x.shape()).unwrap()
    };
    let round = |dtype| v.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap();
    let rotate = |x: &Tensor| {
        let mut rows = values(x);
        Rotation::new(x.dim(3).unwrap()).apply(&mut rows).unwrap();
        Tensor::from_vec(rows, x.shape(), &Device::Cpu).unwrap()
    };
    let codes = per_token(&rotate(&k.broadcast_sub(offset).unwrap()));
    let stored_k = rotate(&codes).broadcast_add(offset).unwrap();
    let stored_v = match config.values {
        CacheValues::F16 => round(DType::F16),
        CacheValues::Bf16 => round(DType::BF16),
        CacheValues::Int8 => per_token(v),
        other => panic!("values in {other:?} are not tested"),
    };
    let n = k.dim(2).unwrap();
    let (sinks, recent) = (config.sinks.min(n), config.recent.min(n));
    let middle = n.saturating_sub(sinks + recent);
    let splice = |stored: &Tensor, exact: &Tensor| {
        let parts = [
            tokens(exact, 0, sinks),
            tokens(stored, sinks, middle),
            tokens(exact, sinks + middle, n - sinks - middle),
        ];
        Tensor::cat(&parts, 2).unwrap()
    };
    (splice(&stored_k, k), splice(&stored_v, v))
}

fn mean_of(k: &Tensor, start: usize, len: usize) -> Tensor {
    let mean = tokens(k, start, len).to_dtype(DType::F64).unwrap().mean_keepdim(2).unwrap();
    mean.to_dtype(DType::F32).unwrap()
}

/// Queries in 16 bits and sums in another order.
const ARITHMETIC: f32 = 2e-4;

/// The bytes of a cache, which are its codes and all else that it holds.
fn saved(cache: &Int8KvCache) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.safetensors");
    cache.save(&path).unwrap();
    std::fs::read(path).unwrap()
}
