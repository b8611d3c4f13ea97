//! The sliding window.

use super::*;

#[test]
fn a_window_drops_what_nobody_sees() {
    let (h, h_kv, n, d, window, sinks) = (4, 2, 2400, 32, 300, 4);
    let (k, v) = (keys((1, h_kv, n, d)), randn((1, h_kv, n, d)));
    let key_smoothing = KeySmoothing::FirstTokens(64);
    let config = KvCacheConfig { key_smoothing, window: Some(window), sinks, ..Default::default() };
    let mut cache = Int8KvCache::new(config.clone());
    let (stored_k, stored_v) = as_stored(&k, &v, &config, &mean_of(&k, sinks, 64));
    let mut largest = 0;
    for (start, len) in [(0, 700), (700, 1), (701, 99), (800, 600), (1400, 1000)] {
        cache.append(&tokens(&k, start, len), &tokens(&v, start, len)).unwrap();
        largest = largest.max(cache.memory_bytes());
        let end = start + len;
        let m = len.min(50);
        let q = randn((1, h, m, d));
        let found = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
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
    let error = cache.attention(&q, Causal::From(vec![500]), &INT8()).unwrap_err();
    assert!(error.to_string().contains("window has dropped"), "{error}");
    assert!(saved(&cache) == before);
    cache.truncate(0).unwrap();
    assert!(cache.is_empty());
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
    let found = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
    let exact =
        attention(&q, &tokens(&k, 1189, 11), &tokens(&v, 1189, 11), &AttnMask::None, &FP32());
    assert!(largest_difference(&found, &exact.unwrap()) < ARITHMETIC);
}
