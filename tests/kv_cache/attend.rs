//! What attention makes of what is stored.

use super::*;

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
                let key_smoothing = KeySmoothing::FirstTokens(first);
                let config =
                    KvCacheConfig { key_smoothing, values, sinks, recent, ..Default::default() };
                let cache = filled(config.clone(), &k, &v);
                let (k, v) = as_stored(&k, &v, &config, &mean_of(&k, sinks, first));
                for m in [1, 3, 60] {
                    let q = randn((b, h, m, d));
                    let causal = AttnMask::causal_with_offset(n - m);
                    for (call, same) in [
                        (AttentionCall::default(), AttnMask::None),
                        (AttentionCall::causal(), causal),
                    ] {
                        let found = cache.attention(&q, &call, &INT8()).unwrap();
                        let expected = attention(&q, &k, &v, &same, &FP32()).unwrap();
                        let difference = largest_difference(&found, &expected);
                        let case = (b, h, h_kv, n, d, dv, m, &config, &call);
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
    let key_smoothing = KeySmoothing::FirstTokens(64);
    let config = KvCacheConfig { key_smoothing, sinks: 3, recent: 20, ..Default::default() };
    let cache = filled(config.clone(), &k, &v);
    let (k, v) = as_stored(&k, &v, &config, &mean_of(&k, 3, 64));
    let slopes = vec![0.5, 0.1, 0.01, 0.0];
    for with in [
        INT8().softmax_scale(0.3),
        INT8().softcap(2.0),
        INT8().alibi_slopes(slopes.clone()),
        INT8().window(Some(700), None),
        INT8().window(Some(2), Some(1)),
        INT8().softcap(3.0).alibi_slopes(slopes).window(Some(1190), None),
    ] {
        for (call, same) in [
            (AttentionCall::default(), AttnMask::None),
            (AttentionCall::causal(), AttnMask::causal_with_offset(n - m)),
            (Causal::From(vec![200, 200]).into(), AttnMask::causal_with_offset(200)),
            (Causal::From(vec![0, 0]).into(), AttnMask::causal_with_offset(0)),
        ] {
            let found = cache.attention(&q, &call, &with).unwrap();
            let fp32 = with.with_backend(FP32().backend);
            let expected = attention(&q, &k, &v, &same, &fp32).unwrap();
            let difference = largest_difference(&found, &expected);
            assert!(difference < ARITHMETIC, "{difference}: {call:?} {with:?}");
        }
    }
}

/// What a call says about keys is the same for a cache and for tensors.
#[test]
fn masks_and_lengths_of_a_call() {
    let (b, h, h_kv, n, m, d) = (2, 4, 2, 700, 5, 32);
    let (k, v, q) = (keys((b, h_kv, n, d)), randn((b, h_kv, n, d)), randn((b, h, m, d)));
    let key_smoothing = KeySmoothing::FirstTokens(64);
    let config = KvCacheConfig { key_smoothing, sinks: 3, recent: 20, ..Default::default() };
    let cache = filled(config.clone(), &k, &v);
    let (k, v) = as_stored(&k, &v, &config, &mean_of(&k, 3, 64));
    let hidden = |i: usize| u8::from(!i.is_multiple_of(3));
    let boolean = Tensor::from_vec((0..b * n).map(hidden).collect(), (b, 1, 1, n), &Device::Cpu);
    let additive = randn((h, m, n));
    let lens = vec![n, 130];
    for call in [
        AttentionCall::default().with_mask(boolean.unwrap()),
        AttentionCall::default().with_mask(additive.clone()),
        AttentionCall::default().with_kv_lens(lens.clone()),
        AttentionCall::causal().with_kv_lens(lens.clone()),
        AttentionCall::causal().with_kv_lens(vec![2, 0]),
        AttentionCall::from(Causal::From(vec![600, 10])).with_mask(additive).with_kv_lens(lens),
    ] {
        for with in [INT8(), INT8().alibi_slopes(vec![0.5, 0.1, 0.01, 0.0]).softcap(3.0)] {
            let found = cache.attention(&q, &call, &with).unwrap();
            let expected = attention(&q, &k, &v, &call, &with.with_backend(FP32().backend));
            let difference = largest_difference(&found, &expected.unwrap());
            assert!(difference < ARITHMETIC, "{difference}: {call:?} {with:?}");
        }
    }
}

/// The window of the last query is beyond the last key, and its row of the mask beyond what is stored.
#[test]
fn a_query_that_sees_no_key_through_a_transposed_mask_gives_zeros() {
    let (k, v, q) = (keys((1, 1, 4, 8)), randn((1, 1, 4, 8)), randn((1, 1, 2, 8)));
    let mask = Tensor::ones((4, 2), DType::U8, &Device::Cpu).unwrap().t().unwrap();
    let window = INT8().window(Some(0), None);
    for (config, with) in [
        (KvCacheConfig::default(), window),
        (KvCacheConfig { window: Some(0), ..KvCacheConfig::default() }, INT8()),
    ] {
        let cache = filled(config, &k, &v);
        for mask in [mask.clone(), mask.to_dtype(DType::F32).unwrap()] {
            let call = AttentionCall::from(Causal::Offset(3)).with_mask(mask);
            let out = cache.attention(&q, &call, &with).unwrap();
            let rows = out.flatten_to(2).unwrap().to_vec2::<f32>().unwrap();
            assert!(rows[0].iter().all(|x| *x != 0.0), "{rows:?}");
            assert_eq!(rows[1], [0.0; 8], "{:?}", with.spec.window_left);
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
            pool.install(|| cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap())
        };
        let expected = bits(&attend(1));
        for threads in [2, 3, 8] {
            assert_eq!(bits(&attend(threads)), expected, "{m} queries, {threads} threads");
        }
    }
}

// ---- shortening, windows, lengths ---------------------------------------------------------------

#[test]
fn sequences_of_their_own_lengths() {
    let (h, h_kv, d) = (4, 2, 32);
    let lens = [300, 0, 77];
    let (k, v) = (keys((3, h_kv, 300, d)), randn((3, h_kv, 300, d)));
    let config = KvCacheConfig { key_smoothing: KeySmoothing::None, ..KvCacheConfig::default() };
    let mut cache = Int8KvCache::new(config.clone());
    cache.append_lens(&k, &v, &lens).unwrap();
    assert_eq!((cache.lens(), cache.len()), (lens.to_vec(), 300));
    // The queries of the prompt stand from position 0 on, whatever their padding.
    let q = randn((3, h, 300, d));
    let prompt = cache.attention(&q, Causal::From(vec![0; 3]), &INT8()).unwrap();
    // A token more for each.
    let (next_k, next_v, next_q) =
        (keys((3, h_kv, 1, d)), randn((3, h_kv, 1, d)), randn((3, h, 1, d)));
    cache.append(&next_k, &next_v).unwrap();
    let next = cache.attention(&next_q, AttentionCall::causal(), &INT8()).unwrap();
    for (b, len) in lens.into_iter().enumerate() {
        let of = |x: &Tensor, len: usize| x.narrow(0, b, 1).unwrap().narrow(2, 0, len).unwrap();
        let mut alone = Int8KvCache::new(config.clone());
        alone.append(&of(&k, len), &of(&v, len)).unwrap();
        if len > 0 {
            let expected = alone.attention(&of(&q, len), AttentionCall::causal(), &INT8()).unwrap();
            assert_eq!(bits(&of(&prompt, len)), bits(&expected), "sequence {b}");
        } else {
            assert_eq!(values(&of(&prompt, 300)), vec![0.0; h * 300 * d]);
        }
        alone.append(&of(&next_k, 1), &of(&next_v, 1)).unwrap();
        let expected = alone.attention(&of(&next_q, 1), AttentionCall::causal(), &INT8()).unwrap();
        assert_eq!(bits(&of(&next, 1)), bits(&expected), "sequence {b}");
    }
    cache.truncate_lens(&[10, 1, 50]).unwrap();
    assert_eq!(cache.lens(), [10, 1, 50]);
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
                let out = cache.attention(&q, AttentionCall::causal(), &INT8()).unwrap();
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
    let out = expected.attention(&q, AttentionCall::default(), &INT8()).unwrap();
    assert_eq!(
        bits(&strided.attention(&bshd(&q), AttentionCall::default(), &INT8()).unwrap()),
        bits(&out)
    );
    for dtype in [DType::F16, DType::BF16] {
        let half = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let cache = filled(KvCacheConfig::default(), &half(&k), &half(&v));
        let found = cache.attention(&half(&q), AttentionCall::default(), &INT8()).unwrap();
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
        let out =
            cache.attention(&randn(q), AttentionCall::causal(), &AttentionConfig::int8()).unwrap();
        assert_eq!(out.dims(), [q.0, q.1, q.2, v.3]);
        assert!(values(&out).iter().all(|x| x.is_finite()));
    }
}
