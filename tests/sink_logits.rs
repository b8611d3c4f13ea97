//! Learned sink logits: one a query head, in the denominator of the softmax.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_int8_attention::reference::{tensor_ops, unfused};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, Causal, Error, Int8KvCache, KvCacheConfig, PvPrecision,
    attention,
};
use common::{largest_difference, randn};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const HEADS: usize = 4;
const DEPTH: usize = 32;

/// Of fp32 against f64.
const OF_F32: f64 = 2e-6;
/// Of int8 scores against f64, on normal numbers; that of attention without sink logits.
const OF_INT8: f64 = 0.02;

/// Nothing, little, much, all that there is, and more than scores have room for.
const LOGITS: [[f32; HEADS]; 3] =
    [[f32::NEG_INFINITY, -3.0, 0.0, 4.5], [300.0, -300.0, 1.0, -1e30], [3e38, -3e38, 1e30, 2.0]];

/// Queries of `HEADS` heads, keys and values of two, the last of each sequence.
fn inputs(queries: usize, keys: usize) -> (Tensor, Tensor, Tensor) {
    let kv = (2, 2, keys, DEPTH);
    (randn((2, HEADS, queries, DEPTH)), randn(kv), (randn(kv) + 0.5).unwrap())
}

/// By the definition, in f64: query `i` sees the keys up to `i + keys - queries`, or all.
fn by_definition(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    causal: bool,
    logits: &[f32],
) -> Result<Tensor, candle_core::Error> {
    let of = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let ((batch, heads, queries, _), keys) = (q.dims4()?, k.dim(2)?);
    let (q, k, v) = (of(q)?, of(k)?, of(v)?);
    let mut out = Vec::new();
    for row in 0..batch * heads * queries {
        let (head, i) = (row / queries % heads, row % queries);
        let first = (row / queries / heads * 2 + head / (heads / 2)) * keys;
        let seen = if causal { i + 1 + keys - queries } else { keys };
        let score = |j: usize| -> f64 {
            let (q, k) = (&q[row * DEPTH..], &k[(first + j) * DEPTH..]);
            let dot: f64 = (0..DEPTH).map(|d| q[d] * k[d]).sum();
            dot / (DEPTH as f64).sqrt()
        };
        let scores: Vec<f64> = (0..seen).map(score).collect();
        let logit = f64::from(logits[head]);
        let max = scores.iter().copied().fold(logit, f64::max);
        let sum: f64 = scores.iter().chain([&logit]).map(|s| (s - max).exp()).sum();
        out.extend((0..DEPTH).map(|d| {
            let term = |(j, s): (usize, &f64)| (s - max).exp() * v[(first + j) * DEPTH + d];
            (scores.iter().enumerate().map(term).sum::<f64>() / sum) as f32
        }));
    }
    Tensor::from_vec(out, (batch, heads, queries, DEPTH), &Device::Cpu)
}

fn calls() -> [(bool, AttentionCall); 2] {
    [(false, AttentionCall::default()), (true, Causal::End.into())]
}

/// Few and many queries, over keys of one tile and of spans that threads share.
#[test]
fn attention_is_that_of_the_definition() -> TestResult {
    for (queries, keys) in [(1, 1), (1, 2500), (5, 700), (60, 600)] {
        let (q, k, v) = inputs(queries, keys);
        for logits in LOGITS {
            for (causal, call) in calls() {
                let expected = by_definition((&q, &k, &v), causal, &logits)?;
                let formats = [PvPrecision::Int16, PvPrecision::F32, PvPrecision::Int8];
                let int8 = formats.map(|pv| (AttentionConfig::int8().pv(pv), OF_INT8));
                for (config, bound) in int8.into_iter().chain([(AttentionConfig::fp32(), OF_F32)]) {
                    let config = config.sink_logits(logits.into());
                    let what = format!("{queries} x {keys}, causal {causal}, {config:?}");
                    let fused = attention(&q, &k, &v, &call, &config)?;
                    let off = largest_difference(&fused, &expected);
                    assert!(off < bound, "{what}: {off}");
                    for (name, steps) in [
                        ("unfused", unfused::attention(&q, &k, &v, &call, &config)?),
                        ("tensor_ops", tensor_ops::attention(&q, &k, &v, &call, &config)?),
                    ] {
                        let off = largest_difference(&steps, &expected);
                        assert!(off < bound, "{name}, {what}: {off}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_cache_has_them_too() -> TestResult {
    for (queries, keys) in [(1, 1), (1, 70), (1, 2500), (60, 600)] {
        let (q, k, v) = inputs(queries, keys);
        let mut cache = Int8KvCache::new(KvCacheConfig::default());
        cache.append(&k, &v)?;
        for logits in LOGITS {
            for (causal, call) in calls() {
                let config = AttentionConfig::int8().sink_logits(logits.into());
                let out = cache.attention(&q, call, &config)?;
                let off = largest_difference(&out, &by_definition((&q, &k, &v), causal, &logits)?);
                assert!(off < OF_INT8, "{queries} x {keys}, causal {causal}, {logits:?}: {off}");
            }
        }
    }
    Ok(())
}

#[test]
fn minus_infinity_is_none_to_the_bit() -> TestResult {
    // One block of keys, whose mean adds the same to all scores of a row.
    let (q, k, v) = inputs(9, 40);
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    cache.append(&k, &v)?;
    let smoothed = AttentionConfig::int8().with_scores(|scores| scores.outliers = false);
    for config in [AttentionConfig::int8(), smoothed, AttentionConfig::fp32()] {
        let none = config.clone().sink_logits(vec![f32::NEG_INFINITY; HEADS]);
        let call = AttentionCall::causal();
        let bits = |x: Tensor| -> Result<Vec<u32>, candle_core::Error> {
            Ok(x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        let of = |config| bits(attention(&q, &k, &v, &call, config)?);
        assert_eq!(of(&config)?, of(&none)?);
        let of = |config| bits(tensor_ops::attention(&q, &k, &v, &call, config)?);
        assert_eq!(of(&config)?, of(&none)?);
        if config == AttentionConfig::int8() {
            let of = |config| bits(cache.attention(&q, &call, config)?);
            assert_eq!(of(&config)?, of(&none)?);
        }
    }
    Ok(())
}

#[test]
fn a_query_that_sees_no_key_gives_zeros_and_nan_stays_nan() -> TestResult {
    let (q, k, v) = inputs(3, 5);
    let masks = |x: f32| {
        let mut mask = vec![0f32; 15];
        mask[5..10].fill(x);
        Tensor::from_vec(mask, (3, 5), &Device::Cpu)
    };
    for config in [AttentionConfig::int8(), AttentionConfig::fp32()] {
        for logit in [-3e38, -2.0, 50.0, 3e38] {
            let config = config.clone().sink_logits(vec![logit; HEADS]);
            for (hidden, expected) in [(f32::NEG_INFINITY, 0.0), (f32::NAN, f32::NAN)] {
                let call = AttentionCall::default().with_mask(masks(hidden)?);
                for out in [
                    attention(&q, &k, &v, &call, &config)?,
                    tensor_ops::attention(&q, &k, &v, &call, &config)?,
                ] {
                    let rows = out.transpose(1, 2)?.flatten_from(2)?.to_vec3::<f32>()?;
                    for sequence in rows {
                        let is_expected =
                            |x: &f32| *x == expected || x.is_nan() && expected.is_nan();
                        assert!(sequence[1].iter().all(is_expected), "{logit} {hidden}");
                        let others = sequence[0].iter().chain(&sequence[2]);
                        assert!(others.into_iter().all(|x| x.is_finite()), "{logit} {hidden}");
                    }
                }
            }
        }
    }
    Ok(())
}

/// Values up to the largest number, of which a part goes to the logit.
#[test]
fn large_values_stay_finite() -> TestResult {
    let (q, k, v) = inputs(2, 40);
    let v = (v.ones_like()? * f64::from(f32::MAX))?;
    for config in [AttentionConfig::int8(), AttentionConfig::fp32()] {
        let logits = [f32::NEG_INFINITY, 0.0, 3.0, 1e30];
        let out =
            attention(&q, &k, &v, AttentionCall::default(), &config.sink_logits(logits.into()))?;
        let largest = out.max(3)?.max(2)?.max(0)?.to_vec1::<f32>()?;
        assert!(largest[0] > 0.99 * f32::MAX && largest[0].is_finite(), "{largest:?}");
        assert!(largest[1] < largest[0] && largest[2] < largest[1], "{largest:?}");
        assert_eq!(largest[3], 0.0);
    }
    Ok(())
}

#[test]
fn gradients_flow_past_them() -> TestResult {
    let (q, k, v) = inputs(6, 9);
    for config in [AttentionConfig::int8(), AttentionConfig::fp32()] {
        let gradients = |logit: f32, fused: bool| -> Result<Vec<Tensor>, Error> {
            let vars = [Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?];
            let config = config.clone().sink_logits(vec![logit; HEADS]);
            let call = AttentionCall::causal();
            let [q, k, v] = &vars;
            let out = if fused {
                attention(q, k, v, call, &config)?
            } else {
                let exact = config.with_backend(AttentionConfig::fp32().backend);
                tensor_ops::attention(q, k, v, call, &exact)?
            };
            let gradients = out.sqr()?.sum_all()?.backward()?;
            Ok(vars.iter().filter_map(|var| gradients.get(var).cloned()).collect())
        };
        let (fused, steps, without) =
            (gradients(1.0, true)?, gradients(1.0, false)?, gradients(f32::NEG_INFINITY, false)?);
        assert_eq!((fused.len(), steps.len()), (3, 3));
        for ((fused, steps), without) in fused.iter().zip(&steps).zip(&without) {
            // The output that is squared is that of int8.
            let off = largest_difference(fused, steps);
            let counts = largest_difference(steps, without);
            assert!(off < 0.1 && off < counts / 10.0, "{off}, and without them {counts}");
        }
    }
    Ok(())
}

/// A logit that is trained: the additive mask of one more key, without a key and without a value.
#[test]
fn a_mask_of_one_more_key_is_a_logit_with_a_gradient() -> TestResult {
    let (m, n) = (6, 9);
    let (q, k, v) = inputs(m, n);
    let zeros = |x: &Tensor| x.narrow(2, 0, 1)?.zeros_like();
    let (more_k, more_v) =
        (Tensor::cat(&[&k, &zeros(&k)?], 2)?, Tensor::cat(&[&v, &zeros(&v)?], 2)?);
    let logits = Var::new(&[-3f32, 0.0, 1.0, 4.5], &Device::Cpu)?;
    let none = Tensor::zeros((1, HEADS, m, n), DType::F32, &Device::Cpu)?;
    let of_last = logits.reshape((1, HEADS, 1, 1))?.broadcast_as((1, HEADS, m, 1))?;
    let call = AttentionCall::default().with_mask(Tensor::cat(&[&none, &of_last], 3)?);
    let out = attention(&q, &more_k, &more_v, call, &AttentionConfig::fp32())?;
    let sink = |logits: Vec<f32>| {
        let config = AttentionConfig::fp32().sink_logits(logits);
        attention(&q, &k, &v, AttentionCall::default(), &config)
    };
    let off = largest_difference(&out, &sink(logits.to_vec1()?)?);
    assert!(off < OF_F32, "{off}");
    let gradient =
        out.sum_all()?.backward()?.get(&logits).ok_or("no gradient")?.to_vec1::<f32>()?;
    for (head, found) in gradient.into_iter().enumerate() {
        const STEP: f32 = 1e-2;
        let moved = |by: f32| -> Result<f64, Error> {
            let mut logits = logits.to_vec1::<f32>()?;
            logits[head] += by;
            Ok(sink(logits)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?)
        };
        let expected = (moved(STEP)? - moved(-STEP)?) / f64::from(2.0 * STEP);
        let off = (f64::from(found) - expected).abs();
        assert!(off < 0.01 + 0.01 * expected.abs(), "{head}: {found} {expected}");
    }
    Ok(())
}

#[test]
fn logits_that_make_no_sense_are_errors() {
    let (q, k, v) = inputs(2, 3);
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    cache.append(&k, &v).unwrap();
    let of = |logits: Vec<f32>| {
        let config = AttentionConfig::int8().sink_logits(logits);
        let call = AttentionCall::default();
        let exact = config.with_backend(AttentionConfig::fp32().backend);
        [
            attention(&q, &k, &v, &call, &config),
            attention(&q, &k, &v, &call, &exact),
            tensor_ops::attention(&q, &k, &v, &call, &config),
            cache.attention(&q, &call, &config),
        ]
        .map(Result::unwrap_err)
    };
    for error in of(vec![0.0; HEADS + 1]) {
        assert!(matches!(error, Error::Mismatch(_)), "{error}");
        assert!(error.to_string().contains("5 sink logits for 4 heads"), "{error}");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        for error in of(vec![0.0, bad, 0.0, 0.0]) {
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            assert!(error.to_string().contains(&format!("sink logit {bad}")), "{error}");
        }
    }
}
