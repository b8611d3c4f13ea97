//! Saved and loaded; damaged files.

use super::*;

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
    let given = KeySmoothing::calibrated(&tokens(&k, 0, 700)).unwrap();
    for config in [
        KvCacheConfig::default(),
        KvCacheConfig::int8_values(),
        KvCacheConfig { values: CacheValues::Bf16, key_smoothing: given, ..Default::default() },
        KvCacheConfig { sinks: 300, recent: 33, capacity: Some(9000), ..Default::default() },
        KvCacheConfig { window: Some(100), sinks: 3, ..KvCacheConfig::int8_values() },
        KvCacheConfig { key_smoothing: KeySmoothing::FirstTokens(5000), ..Default::default() },
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
        let out = |cache: &Int8KvCache| {
            bits(&cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap())
        };
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
        (r#"len\":300"#, r#"len\":299"#, "0.recent.keys"),
        (r#"packed\":256"#, r#"packed\":192"#, "0.keys"),
        (r#"first\":0"#, r#"first\":1"#, "1..256 in pages"),
        (r#"[1,2,16,16]"#, r#"[1,4,16,16]"#, "expected (I8, [4, 256, 16])"),
        (r#"[1,2,16,16]"#, r#"[2,2,16,16]"#, "1 sequences"),
        (r#"values\":\"int8"#, r#"values\":\"bf16"#, "expected (BF16"),
        ("0.offsets", "9.offsets", "0.offsets"),
        ("0.key_scales", "0.kex_scales", "0.key_scales"),
    ] {
        let text = message(&replaced(from, to));
        assert!(text.contains(says), "{from} {to}: {text}");
    }
}

// ---- what does not fit ----------------------------------------------------------------------------
