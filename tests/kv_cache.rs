//! The int8 cache: what is stored, what attention makes of it, and what goes wrong.

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::quant::{QuantConfig, QuantizedTensor};
use candle_int8_attention::{
    AttentionConfig, AttnMask, CacheMask, CacheValues, Int8KvCache, KeyOffset, KvCacheConfig,
    attention,
};

fn randn(shape: (usize, usize, usize, usize)) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap()
}

/// Keys as models have them: a bias of their own for each head.
fn keys(shape: (usize, usize, usize, usize)) -> Tensor {
    let (_, h, _, d) = shape;
    let bias = (Tensor::randn(0f32, 2., (1, h, 1, d), &Device::Cpu)).unwrap();
    randn(shape).broadcast_add(&bias).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let differences = values(a).into_iter().zip(values(b)).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |largest, x| if x <= largest { largest } else { x })
}

fn tokens(x: &Tensor, start: usize, len: usize) -> Tensor {
    x.narrow(2, start, len).unwrap()
}

const INT8: fn() -> AttentionConfig = AttentionConfig::int8;
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
    let stored_k = per_token(&k.broadcast_sub(offset).unwrap()).broadcast_add(offset).unwrap();
    let stored_v = match config.values {
        CacheValues::F16 => round(DType::F16),
        CacheValues::Bf16 => round(DType::BF16),
        CacheValues::Int8 => per_token(v),
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

#[test]
fn attention_is_that_over_what_is_stored() {
    for (b, h, h_kv, n, d, dv) in [
        (1, 4, 2, 300, 64, 64),
        (2, 3, 3, 1500, 48, 20),
        (1, 8, 1, 2100, 80, 128),
        (1, 2, 1, 70, 1, 1),
    ] {
        let (k, v) = (keys((b, h_kv, n, d)), randn((b, h_kv, n, dv)));
        for values in [CacheValues::F16, CacheValues::Bf16, CacheValues::Int8] {
            for (sinks, recent, first) in [(0, 0, 64), (4, 0, 16), (0, 32, 64), (5, 300, 7)] {
                let key_offset = KeyOffset::FirstTokens(first);
                let config =
                    KvCacheConfig { key_offset, values, sinks, recent, ..Default::default() };
                let cache = filled(config.clone(), &k, &v);
                let (k, v) = as_stored(&k, &v, &config, &mean_of(&k, sinks, first));
                for m in [1, 3, 60] {
                    let q = randn((b, h, m, d));
                    let causal = AttnMask::causal_with_offset(n - m);
                    for (mask, same) in
                        [(CacheMask::None, AttnMask::None), (CacheMask::Causal, causal)]
                    {
                        let found = cache.attention(&q, &mask, &INT8()).unwrap();
                        let expected = attention(&q, &k, &v, &same, &FP32()).unwrap();
                        let difference = largest_difference(&found, &expected);
                        let case = (b, h, h_kv, n, d, dv, m, &config, &mask);
                        assert!(difference < ARITHMETIC, "{difference}: {case:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn everything_that_changes_scores() {
    let (b, h, h_kv, n, m, d) = (2, 4, 2, 1200, 5, 32);
    let (k, v, q) = (keys((b, h_kv, n, d)), randn((b, h_kv, n, d)), randn((b, h, m, d)));
    let config = KvCacheConfig { sinks: 3, recent: 20, ..Default::default() };
    let cache = filled(config.clone(), &k, &v);
    let (k, v) = as_stored(&k, &v, &config, &mean_of(&k, 3, 64));
    let slopes = Some(vec![0.5, 0.1, 0.01, 0.0]);
    for with in [
        AttentionConfig { softmax_scale: Some(0.3), ..INT8() },
        AttentionConfig { softcap: Some(2.0), ..INT8() },
        AttentionConfig { alibi_slopes: slopes.clone(), ..INT8() },
        AttentionConfig { window_left: Some(700), ..INT8() },
        AttentionConfig { window_left: Some(2), window_right: Some(1), ..INT8() },
        AttentionConfig {
            softcap: Some(3.0),
            alibi_slopes: slopes,
            window_left: Some(1190),
            ..INT8()
        },
    ] {
        for (mask, same) in [
            (CacheMask::None, AttnMask::None),
            (CacheMask::Causal, AttnMask::causal_with_offset(n - m)),
            (CacheMask::CausalFrom(vec![200, 200]), AttnMask::causal_with_offset(200)),
            (CacheMask::CausalFrom(vec![0, 0]), AttnMask::causal_with_offset(0)),
        ] {
            let found = cache.attention(&q, &mask, &with).unwrap();
            let fp32 = AttentionConfig { backend: FP32().backend, ..with.clone() };
            let expected = attention(&q, &k, &v, &same, &fp32).unwrap();
            let difference = largest_difference(&found, &expected);
            assert!(difference < ARITHMETIC, "{difference}: {mask:?} {with:?}");
        }
    }
}

/// The bytes of a cache, which are its codes and all else that it holds.
fn saved(cache: &Int8KvCache) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.safetensors");
    cache.save(&path).unwrap();
    std::fs::read(path).unwrap()
}

#[test]
fn chunks_do_not_change_a_bit() {
    let (b, h_kv, n, d) = (2, 2, 700, 40);
    let (k, v) = (keys((b, h_kv, n, d)), randn((b, h_kv, n, d)));
    let q = randn((b, 4, 3, d));
    for config in [
        KvCacheConfig::default(),
        KvCacheConfig::int8_values(),
        KvCacheConfig {
            key_offset: KeyOffset::None,
            values: CacheValues::Bf16,
            ..Default::default()
        },
        KvCacheConfig { key_offset: KeyOffset::calibrated(&k).unwrap(), ..Default::default() },
        KvCacheConfig { sinks: 5, recent: 33, ..Default::default() },
        KvCacheConfig { key_offset: KeyOffset::FirstTokens(600), ..Default::default() },
        KvCacheConfig { key_offset: KeyOffset::FirstTokens(900), ..Default::default() },
    ] {
        let at_once = filled(config.clone(), &k, &v);
        let expected = at_once.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
        for chunk in [1, 7, 48, 256, 500] {
            let mut cache = Int8KvCache::new(config.clone());
            for start in (0..n).step_by(chunk) {
                let len = chunk.min(n - start);
                cache.append(&tokens(&k, start, len), &tokens(&v, start, len)).unwrap();
            }
            assert!(saved(&cache) == saved(&at_once), "chunks of {chunk}, {config:?}");
            let out = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
            assert_eq!(bits(&out), bits(&expected));
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (k, v) = (keys((1, 2, 5000, 64)), randn((1, 2, 5000, 64)));
    let cache = filled(KvCacheConfig::default(), &k, &v);
    for m in [1, 4, 200] {
        let q = randn((1, 6, m, 64));
        let attend = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap())
        };
        let expected = bits(&attend(1));
        for threads in [2, 3, 8] {
            assert_eq!(bits(&attend(threads)), expected, "{m} queries, {threads} threads");
        }
    }
}
