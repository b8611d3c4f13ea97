//! The int8 cache: what is stored, what attention makes of it, and what goes wrong.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::quant::{CodeStorage, QuantConfig, QuantizedTensor};
use candle_int8_attention::{
    AttentionConfig, AttnMask, Backend, CacheMask, CacheValues, Error, Int8Config, Int8KvCache,
    KeyOffset, KvCacheConfig, PvPrecision, attention,
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
    assert_eq!(a.dims(), b.dims());
    let differences = values(a).into_iter().zip(values(b)).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |largest, x| if x <= largest { largest } else { x })
}

fn tokens(x: &Tensor, start: usize, len: usize) -> Tensor {
    x.narrow(2, start, len).unwrap()
}

/// P·V in f32, so that what is stored is all that differs from fp32.
const INT8: fn() -> AttentionConfig = || AttentionConfig {
    backend: Backend::Int8(Int8Config { pv: PvPrecision::F32, ..Int8Config::default() }),
    ..AttentionConfig::default()
};
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
            for (sinks, recent, first) in [(0, 0, 64), (4, 0, 16), (0, 32, 64), (5, 300, 8)] {
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
    let key_offset = KeyOffset::FirstTokens(64);
    let config = KvCacheConfig { key_offset, sinks: 3, recent: 20, ..Default::default() };
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

// ---- shortening, windows, lengths ---------------------------------------------------------------

#[test]
fn truncated_tokens_leave_no_trace() {
    let (k, v) = (keys((2, 2, 900, 32)), randn((2, 2, 900, 32)));
    let (other_k, other_v) = (keys((2, 2, 400, 32)), randn((2, 2, 400, 32)));
    // What a speculation got wrong may hold what no format holds.
    let wrong = Tensor::full(f32::NAN, (2, 2, 5, 32), &Device::Cpu).unwrap();
    for config in [
        KvCacheConfig::default(),
        KvCacheConfig { sinks: 3, recent: 17, ..KvCacheConfig::int8_values() },
    ] {
        for (before, after) in [(900, 895), (900, 512), (900, 256), (600, 80), (300, 257)] {
            let mut cache = Int8KvCache::new(config.clone());
            cache.append(&tokens(&k, 0, before), &tokens(&v, 0, before)).unwrap();
            cache.append(&wrong, &wrong).unwrap();
            cache.truncate(after).unwrap();
            assert_eq!(cache.lens(), [after, after]);
            cache.truncate(5000).unwrap(); // no tokens there: nothing to do
            cache.append(&other_k, &other_v).unwrap();
            let mut straight = Int8KvCache::new(config.clone());
            straight.append(&tokens(&k, 0, after), &tokens(&v, 0, after)).unwrap();
            straight.append(&other_k, &other_v).unwrap();
            assert!(saved(&cache) == saved(&straight), "{before} to {after}, {config:?}");
        }
    }
}

#[test]
fn truncated_to_almost_nothing_the_offset_stays_frozen() {
    let (k, v) = (keys((1, 1, 300, 16)), randn((1, 1, 300, 16)));
    let mut cache = filled(KvCacheConfig { sinks: 4, ..KvCacheConfig::default() }, &k, &v);
    for len in [2, 0] {
        cache.truncate(len).unwrap();
        assert_eq!((cache.len(), cache.is_empty()), (len, len == 0));
    }
    cache.append(&tokens(&k, 0, 10), &tokens(&v, 0, 10)).unwrap();
    let q = randn((1, 1, 1, 16));
    let found = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
    let (k, v) = (tokens(&k, 0, 10), tokens(&v, 0, 10));
    let exact = attention(&q, &k, &v, &AttnMask::None, &FP32()).unwrap();
    assert!(largest_difference(&found, &exact) < 0.05);
    // A reset forgets everything, the shape too.
    cache.reset();
    assert_eq!((cache.lens(), cache.memory_bytes()), (vec![], 0));
    cache.append(&keys((3, 2, 5, 8)), &randn((3, 2, 5, 4))).unwrap();
    assert_eq!(cache.lens(), [5, 5, 5]);
}

#[test]
fn a_window_drops_what_nobody_sees() {
    let (h, h_kv, n, d, window, sinks) = (4, 2, 2400, 32, 300, 4);
    let (k, v) = (keys((1, h_kv, n, d)), randn((1, h_kv, n, d)));
    let key_offset = KeyOffset::FirstTokens(64);
    let config = KvCacheConfig { key_offset, window: Some(window), sinks, ..Default::default() };
    let mut cache = Int8KvCache::new(config.clone());
    let (stored_k, stored_v) = as_stored(&k, &v, &config, &mean_of(&k, sinks, 64));
    let mut largest = 0;
    for (start, len) in [(0, 700), (700, 1), (701, 99), (800, 600), (1400, 1000)] {
        cache.append(&tokens(&k, start, len), &tokens(&v, start, len)).unwrap();
        largest = largest.max(cache.memory_bytes());
        let end = start + len;
        let m = len.min(50);
        let q = randn((1, h, m, d));
        let found = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
        // The sinks stay in sight: a mask says so.
        let seen = |i: usize, j: usize| {
            let at = end - m + i;
            j <= at && (j < sinks || j + window >= at)
        };
        let mask: Vec<u8> = (0..m * end).map(|x| u8::from(seen(x / end, x % end))).collect();
        let mask = AttnMask::Mask(Tensor::from_vec(mask, (m, end), &Device::Cpu).unwrap());
        let (k, v) = (tokens(&stored_k, 0, end), tokens(&stored_v, 0, end));
        let expected = attention(&q, &k, &v, &mask, &FP32()).unwrap();
        let difference = largest_difference(&found, &expected);
        assert!(difference < ARITHMETIC, "{difference} after {end} tokens");
    }
    let everything = filled(KvCacheConfig { window: None, ..config }, &k, &v);
    assert!(largest < everything.memory_bytes() * 3 / 4);
    // A page of slack: some tokens can be taken back, others are gone.
    cache.truncate(n - 1).unwrap();
    let before = saved(&cache);
    let error = cache.truncate(400).unwrap_err().to_string();
    assert!(error.contains("truncating to 400") && error.contains("dropped"), "{error}");
    let q = randn((1, h, 1, d));
    let error = cache.attention(&q, &CacheMask::CausalFrom(vec![500]), &INT8()).unwrap_err();
    assert!(error.to_string().contains("window has dropped"), "{error}");
    assert!(saved(&cache) == before);
    cache.truncate(0).unwrap();
    assert!(cache.is_empty());
}

#[test]
fn sequences_of_their_own_lengths() {
    let (h, h_kv, d) = (4, 2, 32);
    let lens = [300, 0, 77];
    let (k, v) = (keys((3, h_kv, 300, d)), randn((3, h_kv, 300, d)));
    let config = KvCacheConfig { key_offset: KeyOffset::None, ..KvCacheConfig::default() };
    let mut cache = Int8KvCache::new(config.clone());
    cache.append_lens(&k, &v, &lens).unwrap();
    assert_eq!((cache.lens(), cache.len()), (lens.to_vec(), 300));
    // The queries of the prompt stand from position 0 on, whatever their padding.
    let q = randn((3, h, 300, d));
    let prompt = cache.attention(&q, &CacheMask::CausalFrom(vec![0; 3]), &INT8()).unwrap();
    // A token more for each.
    let (next_k, next_v, next_q) =
        (keys((3, h_kv, 1, d)), randn((3, h_kv, 1, d)), randn((3, h, 1, d)));
    cache.append(&next_k, &next_v).unwrap();
    let next = cache.attention(&next_q, &CacheMask::Causal, &INT8()).unwrap();
    for (b, len) in lens.into_iter().enumerate() {
        let of = |x: &Tensor, len: usize| x.narrow(0, b, 1).unwrap().narrow(2, 0, len).unwrap();
        let mut alone = Int8KvCache::new(config.clone());
        alone.append(&of(&k, len), &of(&v, len)).unwrap();
        if len > 0 {
            let expected = alone.attention(&of(&q, len), &CacheMask::Causal, &INT8()).unwrap();
            assert_eq!(bits(&of(&prompt, len)), bits(&expected), "sequence {b}");
        } else {
            assert_eq!(values(&of(&prompt, 300)), vec![0.0; h * 300 * d]);
        }
        alone.append(&of(&next_k, 1), &of(&next_v, 1)).unwrap();
        let expected = alone.attention(&of(&next_q, 1), &CacheMask::Causal, &INT8()).unwrap();
        assert_eq!(bits(&of(&next, 1)), bits(&expected), "sequence {b}");
    }
    cache.truncate_lens(&[10, 1, 50]).unwrap();
    assert_eq!(cache.lens(), [10, 1, 50]);
}

#[test]
fn clones_go_their_own_ways() {
    let (k, v) = (keys((1, 2, 300, 32)), randn((1, 2, 300, 32)));
    let mut cache = filled(KvCacheConfig::default(), &k, &v);
    let before = saved(&cache);
    let mut draft = cache.clone();
    draft.append(&tokens(&k, 0, 7), &tokens(&v, 0, 7)).unwrap();
    draft.truncate(100).unwrap();
    assert!(saved(&cache) == before);
    cache.append(&tokens(&k, 0, 7), &tokens(&v, 0, 7)).unwrap();
    assert_eq!((cache.len(), draft.len()), (307, 100));
}

// ---- memory, files ------------------------------------------------------------------------------

#[test]
fn memory_is_a_fraction_of_fp32() {
    for (h_kv, d) in [(12, 64), (8, 128)] {
        let (n, fp32) = (4096, 2 * h_kv * 4096 * d * 4);
        let (k, v) = (randn((1, h_kv, n, d)), randn((1, h_kv, n, d)));
        for (config, ratio) in
            [(KvCacheConfig::int8_values(), 3.5), (KvCacheConfig::default(), 2.5)]
        {
            let memory = filled(config, &k, &v).memory_bytes();
            let found = fp32 as f64 / memory as f64;
            assert!(found >= ratio, "{h_kv} heads of {d}: {found}");
        }
    }
}

#[test]
fn decoding_takes_no_memory_but_the_pages() {
    let config = KvCacheConfig { recent: 8, sinks: 2, ..KvCacheConfig::int8_values() };
    let mut cache = Int8KvCache::new(config);
    let (k, v) = (randn((1, 2, 1, 64)), randn((1, 2, 1, 64)));
    let mut sizes = Vec::new();
    for _ in 0..2048 {
        cache.append(&k, &v).unwrap();
        sizes.push(cache.memory_bytes());
    }
    // 256 tokens of 64 codes of keys and of values, two scales and a sum, and four offsets, for
    // two heads.
    let page = 2 * (256 * (64 + 64 + 12) + 4 * 64 * 4);
    assert_eq!(sizes[1999] - sizes[1999 - 256], page);
    let grown = sizes.windows(2).filter(|pair| pair[1] != pair[0]).count();
    assert!(grown < 100, "memory changed {grown} times");
}

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.safetensors");
    let (k, v) = (keys((2, 2, 700, 40)), randn((2, 2, 700, 24)));
    // A value that no format holds, and a key that has no codes.
    let spoiled = Tensor::full(f32::INFINITY, (2, 2, 1, 40), &Device::Cpu).unwrap();
    let (k, v) = (
        Tensor::cat(&[&k, &spoiled], 2).unwrap(),
        Tensor::cat(&[&v, &spoiled.narrow(3, 0, 24).unwrap()], 2).unwrap(),
    );
    let q = randn((2, 4, 3, 40));
    let given = KeyOffset::calibrated(&tokens(&k, 0, 700)).unwrap();
    for config in [
        KvCacheConfig::default(),
        KvCacheConfig::int8_values(),
        KvCacheConfig { values: CacheValues::Bf16, key_offset: given, ..Default::default() },
        KvCacheConfig { sinks: 300, recent: 33, capacity: Some(9000), ..Default::default() },
        KvCacheConfig { window: Some(100), sinks: 3, ..KvCacheConfig::int8_values() },
        KvCacheConfig { key_offset: KeyOffset::FirstTokens(5000), ..Default::default() },
    ] {
        let mut cache = Int8KvCache::new(config.clone());
        for (start, len) in [(0, 650), (650, 51)] {
            cache.append(&tokens(&k, start, len), &tokens(&v, start, len)).unwrap();
        }
        cache.append_lens(&tokens(&k, 0, 9), &tokens(&v, 0, 9), &[9, 2]).unwrap();
        cache.save(&path).unwrap();
        let mut loaded = Int8KvCache::load(&path).unwrap();
        assert_eq!(loaded.config(), &config);
        assert_eq!(loaded.lens(), [710, 703]);
        assert!(saved(&loaded) == saved(&cache), "{config:?}");
        // They are the same in use, and go on in the same way.
        for cache in [&mut cache, &mut loaded] {
            cache.append(&tokens(&k, 5, 20), &tokens(&v, 5, 20)).unwrap();
        }
        assert!(saved(&loaded) == saved(&cache), "{config:?}");
        let out =
            |cache: &Int8KvCache| bits(&cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap());
        assert_eq!(out(&loaded), out(&cache));
    }
    // Without a token, and without a shape.
    let mut empty = Int8KvCache::new(KvCacheConfig { recent: 7, ..KvCacheConfig::default() });
    for _ in 0..2 {
        empty.save(&path).unwrap();
        let loaded = Int8KvCache::load(&path).unwrap();
        assert_eq!((loaded.config(), loaded.lens()), (empty.config(), empty.lens()));
        empty.append(&tokens(&k, 0, 0), &tokens(&v, 0, 0)).unwrap();
    }
}

#[test]
fn damaged_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache.safetensors");
    let message = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = Int8KvCache::load(&path).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        error.to_string()
    };
    let error = Int8KvCache::load(folder.path().join("none")).unwrap_err();
    assert!(matches!(error, Error::MissingFile { .. }), "{error:?}");

    let (k, v) = (keys((1, 2, 300, 16)), randn((1, 2, 300, 16)));
    let good = saved(&filled(KvCacheConfig::int8_values(), &k, &v));
    for len in [0, 7, 100, good.len() / 2, good.len() - 1] {
        message(&good[..len]);
    }
    // Another file in this format.
    let quantized = QuantizedTensor::quantize(&k, &QuantConfig::default()).unwrap();
    let other = quantized.to_safetensors(CodeStorage::I8).unwrap();
    assert!(message(&other).contains("not a saved cache"));
    // A header that says something else than the tensors, at the same length.
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = good.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        [&good[..at], to.as_bytes(), &good[at + from.len()..]].concat()
    };
    for (from, to, says) in [
        (r#"version\":1"#, r#"version\":7"#, "format version 7"),
        (r#"len\":300"#, r#"len\":299"#, "299 tokens"),
        (r#"packed\":300"#, r#"packed\":256"#, "0.keys"),
        (r#"first\":0"#, r#"first\":1"#, "1..300 in pages"),
        (r#"[1,2,16,16]"#, r#"[1,4,16,16]"#, "expected (I8, [4, 300, 16])"),
        (r#"[1,2,16,16]"#, r#"[2,2,16,16]"#, "1 sequences"),
        (r#"values\":\"int8"#, r#"values\":\"bf16"#, "expected (BF16"),
        ("0.offset", "9.offset", "without their offset"),
        ("0.key_scales", "0.kex_scales", "0.key_scales"),
    ] {
        let text = message(&replaced(from, to));
        assert!(text.contains(says), "{from} {to}: {text}");
    }
}

// ---- what does not fit ----------------------------------------------------------------------------

#[test]
fn what_does_not_fit_is_named_and_changes_nothing() {
    let (k, v) = (keys((2, 2, 90, 32)), randn((2, 2, 90, 16)));
    let config = KvCacheConfig { capacity: Some(100), ..KvCacheConfig::default() };
    let mut cache = filled(config, &k, &v);
    let before = saved(&cache);
    let mut check = |k: &Tensor, v: &Tensor, says: &[&str]| {
        let text = cache.append(k, v).unwrap_err().to_string();
        assert!(says.iter().all(|word| text.contains(word)), "{says:?} not in: {text}");
        assert!(saved(&cache) == before, "{text}");
    };
    check(&tokens(&k, 0, 11), &tokens(&v, 0, 11), &["11 tokens", "90", "capacity of 100", "reset"]);
    check(&randn((2, 3, 1, 32)), &randn((2, 3, 1, 16)), &["[2, 3, 1, 32]", "[2, 2, S, 32]"]);
    check(&randn((1, 2, 1, 32)), &randn((1, 2, 1, 16)), &["[1, 2, 1, 32]", "[2, 2, S, 32]"]);
    check(&randn((2, 2, 1, 32)), &randn((2, 2, 1, 32)), &["v has", "[2, 2, S, 16]"]);
    check(&randn((2, 2, 1, 32)), &randn((2, 2, 2, 16)), &["v has", "[2, 2, 1, Dv]"]);
    let flat = k.flatten(0, 1).unwrap();
    check(&flat, &v, &["k has shape [4, 90, 32]", "rank 3"]);
    check(&k.to_dtype(DType::I64).unwrap(), &v, &["I64", "F32, F16 or BF16"]);
    cache.append(&tokens(&k, 0, 10), &tokens(&v, 0, 10)).unwrap(); // to the brim

    let says = |lens: &[usize], word: &str| {
        let text = cache.clone().append_lens(&k, &v, lens).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    says(&[1], "1 lens for a batch of 2");
    says(&[1, 91], "lens holds 91, but there are 90 tokens");
    let error = cache.clone().truncate_lens(&[1]).unwrap_err().to_string();
    assert!(error.contains("1 lens for a batch of 2"), "{error}");

    let offset = KeyOffset::Given(vec![vec![0.0; 31]; 2]);
    let mut other = Int8KvCache::new(KvCacheConfig { key_offset: offset, ..Default::default() });
    let error = other.append(&k, &v).unwrap_err().to_string();
    assert!(error.contains("2 vectors of 31 elements, expected 2 of 32"), "{error}");
    assert!(other.is_empty());
}

#[test]
fn queries_that_do_not_fit_are_named() {
    let cache = filled(KvCacheConfig::default(), &keys((2, 2, 90, 32)), &randn((2, 2, 90, 16)));
    let q = randn((2, 4, 3, 32));
    let message = |q: &Tensor, mask: CacheMask, config: AttentionConfig| {
        cache.attention(q, &mask, &config).unwrap_err().to_string()
    };
    for (shape, word) in [
        ((2, 3, 1, 32), "[2, 3, 1, 32]"),
        ((1, 4, 1, 32), "[2, a multiple of 2, M, 32]"),
        ((2, 4, 1, 31), "[2, 4, 1, 31]"),
    ] {
        let text = message(&randn(shape), CacheMask::Causal, INT8());
        assert!(text.contains("q has") && text.contains(word), "{text}");
    }
    let text = message(&q.flatten(0, 1).unwrap(), CacheMask::Causal, INT8());
    assert!(text.contains("rank 3"), "{text}");
    let text = message(&q, CacheMask::CausalFrom(vec![1]), INT8());
    assert!(text.contains("1 first positions for a batch of 2"), "{text}");
    for (config, word) in [
        (FP32(), "fp32 attention over a cache of int8 keys"),
        (INT8().with_kv_lens(vec![1, 2]), "kv_lens"),
        (AttentionConfig { softcap: Some(-1.0), ..INT8() }, "softcap -1"),
        (AttentionConfig { alibi_slopes: Some(vec![1.0]), ..INT8() }, "1 ALiBi slopes for 4"),
        (AttentionConfig { softmax_scale: Some(f32::NAN), ..INT8() }, "NaN"),
    ] {
        let text = message(&q, CacheMask::Causal, config);
        assert!(text.contains(word), "{text}");
    }
    let empty = Int8KvCache::new(KvCacheConfig::default());
    let error = empty.attention(&q, &CacheMask::Causal, &INT8()).unwrap_err().to_string();
    assert!(error.contains("nothing was appended"), "{error}");
}

#[test]
fn not_a_number_stays_where_it_is() {
    let (n, d) = (300, 16);
    let clean = (keys((1, 2, n, d)), randn((1, 2, n, d)));
    let bad = Tensor::full(f32::NAN, (1, 2, 1, d), &Device::Cpu).unwrap();
    let with = |x: &Tensor, at: usize| {
        Tensor::cat(&[&tokens(x, 0, at), &bad, &tokens(x, at + 1, n - at - 1)], 2).unwrap()
    };
    for config in [
        KvCacheConfig::int8_values(),
        KvCacheConfig { sinks: 4, recent: 10, ..KvCacheConfig::default() },
    ] {
        // In a page, among the sinks, among the recent ones, among those of the mean.
        for at in [200, 2, 295, 40] {
            for (k, v) in
                [(with(&clean.0, at), clean.1.clone()), (clean.0.clone(), with(&clean.1, at))]
            {
                let cache = filled(config.clone(), &k, &v);
                let q = randn((1, 2, n, d));
                let out = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
                for (i, row) in
                    out.get(0).unwrap().get(0).unwrap().to_vec2::<f32>().unwrap().iter().enumerate()
                {
                    let sees = i >= at;
                    assert!(row.iter().all(|x| x.is_nan() == sees), "{at} {i}: {row:?}");
                }
            }
        }
    }
}

#[test]
fn half_precision_strides_and_empty_dimensions() {
    let (k, v, q) = (keys((2, 2, 130, 32)), randn((2, 2, 130, 32)), randn((2, 4, 3, 32)));
    let expected = filled(KvCacheConfig::default(), &k, &v);
    let bshd =
        |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
    let strided = filled(KvCacheConfig::default(), &bshd(&k), &bshd(&v));
    assert!(saved(&strided) == saved(&expected));
    let out = expected.attention(&q, &CacheMask::None, &INT8()).unwrap();
    assert_eq!(bits(&strided.attention(&bshd(&q), &CacheMask::None, &INT8()).unwrap()), bits(&out));
    for dtype in [DType::F16, DType::BF16] {
        let half = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let cache = filled(KvCacheConfig::default(), &half(&k), &half(&v));
        let found = cache.attention(&half(&q), &CacheMask::None, &INT8()).unwrap();
        assert_eq!(found.dtype(), dtype);
        assert!(largest_difference(&found, &out) < 0.06);
    }
    for (k, v, q) in [
        ((0, 2, 5, 8), (0, 2, 5, 8), (0, 4, 1, 8)),
        ((1, 2, 0, 8), (1, 2, 0, 8), (1, 4, 1, 8)),
        ((1, 2, 5, 0), (1, 2, 5, 8), (1, 4, 1, 0)),
        ((1, 2, 5, 8), (1, 2, 5, 0), (1, 4, 1, 8)),
        ((1, 2, 5, 8), (1, 2, 5, 8), (1, 4, 0, 8)),
        ((1, 0, 5, 8), (1, 0, 5, 8), (1, 0, 1, 8)),
    ] {
        let cache = filled(KvCacheConfig::default(), &randn(k), &randn(v));
        let out = cache.attention(&randn(q), &CacheMask::Causal, &AttentionConfig::int8()).unwrap();
        assert_eq!(out.dims(), [q.0, q.1, q.2, v.3]);
        assert!(values(&out).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_calibrated_offset_and_the_default_take_the_bias_out() {
    let (k, v, q) = (keys((1, 2, 500, 64)), randn((1, 2, 500, 64)), randn((1, 2, 4, 64)));
    // A bias that is much larger than what differs between the keys.
    let k = (k * 0.2).unwrap().broadcast_add(&(randn((1, 2, 1, 64)) * 5.0).unwrap()).unwrap();
    let exact = attention(&q, &k, &v, &AttnMask::None, &FP32()).unwrap();
    let error = |key_offset| {
        let cache = filled(KvCacheConfig { key_offset, ..Default::default() }, &k, &v);
        largest_difference(&cache.attention(&q, &CacheMask::None, &INT8()).unwrap(), &exact)
    };
    let (none, first) = (error(KeyOffset::None), error(KeyOffset::default()));
    let calibrated = error(KeyOffset::calibrated(&k).unwrap());
    assert!(first < 0.3 * none && calibrated < 0.3 * none, "{none} {first} {calibrated}");
}

#[test]
fn more_recent_tokens_than_a_window_has() {
    let (k, v) = (keys((1, 1, 1200, 8)), randn((1, 1, 1200, 8)));
    let config = KvCacheConfig { window: Some(10), recent: 1000, ..KvCacheConfig::default() };
    let mut cache = filled(config, &tokens(&k, 0, 1100), &tokens(&v, 0, 1100));
    for token in 1100..1200 {
        cache.append(&tokens(&k, token, 1), &tokens(&v, token, 1)).unwrap();
    }
    let q = randn((1, 1, 1, 8));
    let found = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
    let exact =
        attention(&q, &tokens(&k, 1189, 11), &tokens(&v, 1189, 11), &AttnMask::None, &FP32());
    assert!(largest_difference(&found, &exact.unwrap()) < ARITHMETIC);
}

/// A bias that turns with the position, as a rotary embedding makes it do: a frozen mean is no
/// longer that of later keys, and doubles their range where it points the other way.
#[test]
fn a_moving_offset_follows_a_bias_that_turns() {
    let (n, d, period) = (4096, 32, 2000.0);
    let noise = randn((1, 1, n, d));
    let bias: Vec<f32> = (0..n * d)
        .map(|i| {
            let angle = (i / d) as f32 / period * std::f32::consts::TAU;
            let pair = (i % d / 2) as f32;
            4.0 * if i % 2 == 0 { (angle + pair).cos() } else { (angle + pair).sin() }
        })
        .collect();
    let k = (noise + Tensor::from_vec(bias, (1, 1, n, d), &Device::Cpu).unwrap()).unwrap();
    let (v, q) = (randn((1, 1, n, d)), randn((1, 4, 1, d)));
    let exact = attention(&q, &k, &v, &AttnMask::None, &FP32()).unwrap();
    let error = |key_offset| {
        let cache = filled(KvCacheConfig { key_offset, ..Default::default() }, &k, &v);
        let out = cache.attention(&q, &CacheMask::Causal, &INT8()).unwrap();
        let square = (out - &exact).unwrap().sqr().unwrap().sum_all().unwrap();
        square.to_scalar::<f32>().unwrap().sqrt()
    };
    let moving = error(KeyOffset::Moving);
    for other in [KeyOffset::None, KeyOffset::FirstTokens(64), KeyOffset::FirstTokens(4096)] {
        let other = (error(other.clone()), other);
        assert!(moving < 0.6 * other.0, "{moving}, {other:?}");
    }
}
