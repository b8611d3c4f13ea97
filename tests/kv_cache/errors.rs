//! What does not fit.

use super::*;

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

    let offset = KeySmoothing::Given(vec![vec![0.0; 31]; 2]);
    let mut other = Int8KvCache::new(KvCacheConfig { key_smoothing: offset, ..Default::default() });
    let error = other.append(&k, &v).unwrap_err().to_string();
    assert!(error.contains("2 vectors of 31 elements, expected 2 of 32"), "{error}");
    assert!(other.is_empty());
}

#[test]
fn queries_that_do_not_fit_are_named() {
    let cache = filled(KvCacheConfig::default(), &keys((2, 2, 90, 32)), &randn((2, 2, 90, 16)));
    let q = randn((2, 4, 3, 32));
    let message = |q: &Tensor, call: AttentionCall, config: AttentionConfig| {
        cache.attention(q, call, &config).unwrap_err().to_string()
    };
    for (shape, word) in [
        ((2, 3, 1, 32), "[2, 3, 1, 32]"),
        ((1, 4, 1, 32), "[2, a multiple of 2, M, 32]"),
        ((2, 4, 1, 31), "[2, 4, 1, 31]"),
    ] {
        let text = message(&randn(shape), AttentionCall::causal(), INT8());
        assert!(text.contains("q has") && text.contains(word), "{text}");
    }
    let text = message(&q.flatten(0, 1).unwrap(), AttentionCall::causal(), INT8());
    assert!(text.contains("rank 3"), "{text}");
    let text = message(&q, Causal::From(vec![1]).into(), INT8());
    assert!(text.contains("1 first positions for a batch of 2"), "{text}");
    for (call, word) in [
        (AttentionCall::default().with_kv_lens(vec![1]), "1 kv_lens for a batch of 2"),
        (AttentionCall::default().with_kv_lens(vec![1, 91]), "91, but there are 90 keys"),
        (AttentionCall::default().with_mask(randn((3, 91))), "[3, 91], expected something that"),
    ] {
        let text = message(&q, call, INT8());
        assert!(text.contains(word), "{text}");
    }
    for (config, word) in [
        (FP32(), "fp32 attention over a cache of int8 keys"),
        (INT8().pv(PvPrecision::Int8), "P·V in int8 over a cache"),
        (INT8().softcap(-1.0), "softcap -1"),
        (INT8().alibi_slopes(vec![1.0]), "1 ALiBi slopes for 4"),
        (INT8().softmax_scale(f32::NAN), "NaN"),
    ] {
        let text = message(&q, AttentionCall::causal(), config);
        assert!(text.contains(word), "{text}");
    }
    let empty = Int8KvCache::new(KvCacheConfig::default());
    let error = empty.attention(&q, AttentionCall::causal(), &INT8()).unwrap_err().to_string();
    assert!(error.contains("nothing was appended"), "{error}");
}
