//! What is stored: chunks, truncation, clones, memory.

use super::*;

#[test]
fn chunks_do_not_change_a_bit() {
    let (b, h_kv, n, d) = (2, 2, 700, 40);
    let (k, v) = (keys((b, h_kv, n, d)), randn((b, h_kv, n, d)));
    let q = randn((b, 4, 3, d));
    for config in [
        KvCacheConfig::default(),
        KvCacheConfig::int8_values(),
        KvCacheConfig {
            key_smoothing: KeySmoothing::None,
            values: CacheValues::Bf16,
            ..Default::default()
        },
        KvCacheConfig {
            key_smoothing: KeySmoothing::calibrated(&k).unwrap(),
            ..Default::default()
        },
        KvCacheConfig { sinks: 5, recent: 33, ..Default::default() },
        KvCacheConfig { key_smoothing: KeySmoothing::FirstTokens(600), ..Default::default() },
        KvCacheConfig { key_smoothing: KeySmoothing::FirstTokens(900), ..Default::default() },
    ] {
        let at_once = filled(config.clone(), &k, &v);
        let expected = at_once.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
        for chunk in [1, 7, 48, 256, 500] {
            let mut cache = Int8KvCache::new(config.clone());
            for start in (0..n).step_by(chunk) {
                let len = chunk.min(n - start);
                cache.append(&tokens(&k, start, len), &tokens(&v, start, len)).unwrap();
            }
            assert!(saved(&cache) == saved(&at_once), "chunks of {chunk}, {config:?}");
            let out = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
            assert_eq!(bits(&out), bits(&expected));
        }
    }
}

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
        for (before, after) in
            [(900, 895), (900, 512), (900, 256), (600, 64), (300, 257), (330, 257)]
        {
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
    let found = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
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
            [(KvCacheConfig::int8_values(), 3.3), (KvCacheConfig::default(), 2.4)]
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
