//! Attention with both backends: masks, shapes, dtypes, errors.

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_int8_attention::attention::{
    attention_probs, attention_scores_requantized, position_mask,
};
use candle_int8_attention::quant::{Granularity, Scheme, Smoothing};
use candle_int8_attention::reference::unfused;
use candle_int8_attention::{
    AttentionCall, AttentionConfig, AttnMask, Backend, Causal, Error, PvPrecision,
    QuantizedAttention, RequantConfig, ScoreConfig, attention,
};
use common::randn;

type TestResult = Result<(), Box<dyn std::error::Error>>;

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    common::largest_difference(a, b) as f32
}

/// Attention in f64 from the definition, one query at a time; `keep[b][h][i][j]` and an additive
/// mask through one function.
fn by_definition(q: &Tensor, k: &Tensor, v: &Tensor, mask: impl Fn([usize; 4]) -> f64) -> Tensor {
    let to_f64 = |x: &Tensor| x.to_dtype(DType::F64).unwrap().contiguous().unwrap();
    let (q, k, v) = (to_f64(q), to_f64(k), to_f64(v));
    let ((b, h, m, d), (_, h_kv, n, dv)) = (q.dims4().unwrap(), v.dims4().unwrap());
    let row = |x: &Tensor, b: usize, h: usize, i: usize| -> Vec<f64> {
        x.get(b).unwrap().get(h).unwrap().get(i).unwrap().to_vec1().unwrap()
    };
    let mut out = Vec::with_capacity(b * h * m * dv);
    for bi in 0..b {
        for hi in 0..h {
            let kv = hi / (h / h_kv);
            for i in 0..m {
                let qi = row(&q, bi, hi, i);
                let score = |j: usize| -> f64 {
                    let dot: f64 = qi.iter().zip(row(&k, bi, kv, j)).map(|(a, b)| a * b).sum();
                    dot / (d as f64).sqrt() + mask([bi, hi, i, j])
                };
                let scores: Vec<f64> = (0..n).map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let exp: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum = exp.iter().sum::<f64>().max(f64::MIN_POSITIVE);
                let mut row_out = vec![0f64; dv];
                for (j, e) in exp.iter().enumerate() {
                    for (o, x) in row_out.iter_mut().zip(row(&v, bi, kv, j)) {
                        *o += e / sum * x;
                    }
                }
                out.extend(row_out.into_iter().map(|x| x as f32));
            }
        }
    }
    Tensor::from_vec(out, (b, h, m, dv), &Device::Cpu).unwrap()
}

/// Largest error of fp32 arithmetic, and of int8 scores on N(0, 1) data of these sizes.
const BOUNDS: [(fn() -> AttentionConfig, f32); 2] =
    [(AttentionConfig::fp32, 1e-5), (AttentionConfig::int8, 0.05)];

#[test]
fn both_backends_agree_with_the_definition() -> TestResult {
    for ((b, h, h_kv, m, n), (d, dv)) in
        [((2, 4, 2, 5, 9), (16, 12)), ((1, 3, 1, 7, 7), (50, 50)), ((1, 1, 1, 1, 1), (1, 1))]
    {
        let (q, k, v) = (randn((b, h, m, d)), randn((b, h_kv, n, d)), randn((b, h_kv, n, dv)));
        let keep: Vec<u8> = (0..b * n).map(|i| u8::from(i % 3 != 1)).collect();
        let boolean = Tensor::from_vec(keep.clone(), (b, 1, 1, n), &Device::Cpu)?;
        let additive = randn((h, 1, n));
        let added = additive.squeeze(1)?.to_vec2::<f32>()?;
        for (config, bound) in BOUNDS {
            let check = |mask: AttnMask, define: &dyn Fn([usize; 4]) -> f64| -> TestResult {
                let out = attention(&q, &k, &v, &mask, &config())?;
                let difference = largest_difference(&out, &by_definition(&q, &k, &v, define));
                assert!(difference < bound, "{difference} with {mask:?}");
                Ok(())
            };
            let masked = |attend: bool| if attend { 0.0 } else { f64::NEG_INFINITY };
            check(AttnMask::None, &|_| 0.0)?;
            check(AttnMask::causal(), &|[_, _, i, j]| masked(j <= i))?;
            check(AttnMask::causal_with_offset(3), &|[_, _, i, j]| masked(j <= i + 3))?;
            let by_key = |[b, _, _, j]: [usize; 4]| masked(keep[b * n + j] != 0);
            check(AttnMask::Mask(boolean.clone()), &by_key)?;
            check(AttnMask::Mask(additive.clone()), &|[_, h, _, j]| f64::from(added[h][j]))?;
        }
    }
    Ok(())
}

#[test]
fn a_fully_masked_row_gives_zeros() -> TestResult {
    let q = randn((2, 2, 4, 8));
    let masks = [
        Tensor::new(&[[1u8, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], &Device::Cpu)?,
        Tensor::new(&[[0f32; 4], [f32::NEG_INFINITY; 4], [0.; 4], [f32::MIN; 4]], &Device::Cpu)?,
    ];
    for (config, _) in BOUNDS {
        for mask in &masks {
            let out = attention(&q, &q, &q, AttnMask::Mask(mask.clone()), &config())?;
            for (i, row) in
                out.permute((2, 0, 1, 3))?.flatten_from(1)?.to_vec2::<f32>()?.iter().enumerate()
            {
                assert!(row.iter().all(|x| x.is_finite()));
                assert_eq!(row.iter().all(|&x| x == 0.0), i % 2 == 1, "row {i}");
            }
        }
    }
    Ok(())
}

#[test]
fn probabilities_sum_to_one() -> TestResult {
    let q = randn((1, 2, 6, 8));
    for (config, _) in BOUNDS {
        let probs = attention_probs(&q, &q, AttnMask::causal(), &config())?;
        assert_eq!(probs.dims(), [1, 2, 6, 6]);
        for sum in values(&probs.sum(D::Minus1)?) {
            assert!((sum - 1.0).abs() < 1e-6);
        }
        assert_eq!(values(&probs.narrow(2, 0, 1)?.narrow(3, 1, 5)?), vec![0.0; 10]);
    }
    Ok(())
}

#[test]
fn output_has_the_dtype_of_the_queries() -> TestResult {
    let (q, v) = (randn((1, 2, 6, 8)), randn((1, 2, 6, 5)));
    for (config, bound) in BOUNDS {
        let full = attention(&q, &q, &v, &AttnMask::None, &config())?;
        for dtype in [DType::F16, DType::BF16] {
            let (q, v) = (q.to_dtype(dtype)?, v.to_dtype(dtype)?);
            let half = attention(&q, &q, &v, &AttnMask::None, &config())?;
            assert_eq!(half.dtype(), dtype);
            assert!(largest_difference(&half, &full) < bound + 0.05);
        }
    }
    Ok(())
}

#[test]
fn softmax_scale_is_applied() -> TestResult {
    let q = randn((1, 1, 6, 16));
    for (config, bound) in BOUNDS {
        let scaled = config().softmax_scale(1.0);
        let out = attention(&q, &q, &q, &AttnMask::None, &scaled)?;
        let expected = by_definition(&(&q * 4.0)?, &q, &q, |_| 0.0);
        assert!(largest_difference(&out, &expected) < 2.0 * bound);
    }
    Ok(())
}

#[test]
fn module_switches_its_backend() -> TestResult {
    let q = randn((1, 2, 6, 16));
    let mut layer = QuantizedAttention::new(AttentionConfig::fp32());
    let exact = layer.forward(&q, &q, &q, &AttnMask::None)?;
    layer.set_config(AttentionConfig::int8());
    assert!(matches!(layer.config().backend, Backend::Int8(_)));
    let int8 = layer.forward(&q, &q, &q, &AttnMask::None)?;
    let difference = largest_difference(&exact, &int8);
    assert!(difference > 0.0 && difference < 0.05, "{difference}");
    Ok(())
}

#[test]
fn empty_dimensions() -> TestResult {
    for (config, _) in BOUNDS {
        for (q, k, v) in [
            ((0, 2, 3, 4), (0, 2, 5, 4), (0, 2, 5, 6)),
            ((1, 2, 0, 4), (1, 2, 5, 4), (1, 2, 5, 6)),
            ((1, 2, 3, 4), (1, 2, 0, 4), (1, 2, 0, 6)),
            ((1, 2, 3, 0), (1, 2, 5, 0), (1, 2, 5, 6)),
            ((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 0)),
        ] {
            let (q, k, v) = (randn(q), randn(k), randn(v));
            let out = attention(&q, &k, &v, &AttnMask::None, &config())?;
            let (b, h, m, _) = q.dims4()?;
            assert_eq!(out.dims(), [b, h, m, v.dim(3)?]);
            assert!(values(&out).iter().all(|x| x.is_finite()));
        }
    }
    Ok(())
}

#[test]
fn errors_name_the_values() -> TestResult {
    let q = randn((1, 4, 8, 16));
    for (config, _) in BOUNDS {
        let message = |k: &Tensor, v: &Tensor, mask: &AttnMask| {
            attention(&q, k, v, mask, &config()).unwrap_err().to_string()
        };
        let text = message(&q, &randn((1, 4, 9, 16)), &AttnMask::None);
        assert!(text.contains("v has shape [1, 4, 9, 16], expected [1, 4, 8, Dv]"), "{text}");
        let wrong = Tensor::zeros((7, 8), DType::F32, &Device::Cpu)?;
        let text = message(&q, &q, &AttnMask::Mask(wrong.clone()));
        assert!(text.contains("[7, 8]") && text.contains("[1, 4, 8, 8]"), "{text}");
        let text = message(&q, &q, &AttnMask::Mask(wrong.to_dtype(DType::I64)?));
        assert!(text.contains("I64") && text.contains("non-zero = attend"), "{text}");
        let text = message(&q.to_dtype(DType::U32)?, &q, &AttnMask::None);
        assert!(text.contains("k has dtype U32"), "{text}");
        let scaled = config().softmax_scale(f32::NAN);
        let error = attention(&q, &q, &q, &AttnMask::None, &scaled).unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error}");
    }
    let to = RequantConfig::default();
    let requantized =
        unfused::attention_requantized(&q, &q, &q, &AttnMask::None, &AttentionConfig::fp32(), &to);
    assert!(matches!(requantized, Err(Error::Contradiction(_))), "{requantized:?}");
    Ok(())
}

#[test]
fn requantized_scores_in_attention_are_those_of_the_op() -> TestResult {
    let (q, k, v) = (randn((1, 4, 6, 16)), randn((1, 2, 9, 16)), randn((1, 2, 9, 8)));
    let to = RequantConfig::default();
    let config = AttentionConfig::int8();
    let causal = AttnMask::causal_with_offset(3);
    let out = unfused::attention_requantized(&q, &k, &v, &causal, &config, &to)?;
    let probs = unfused::attention_probs_requantized(&q, &k, &causal, &config, &to)?;
    let scores = (attention_scores_requantized(&q, &k, &ScoreConfig::default(), &to)? * 0.25)?;
    let keep = position_mask((6, 9), 3, None, Some(0), &Device::Cpu)?.broadcast_as((1, 4, 6, 9))?;
    let masked = Tensor::full(f32::NEG_INFINITY, (1, 4, 6, 9), &Device::Cpu)?;
    let scores = keep.where_cond(&scores, &masked)?;
    let expected = candle_nn::ops::softmax(&scores, D::Minus1)?;
    assert!(largest_difference(&probs, &expected) < 1e-6);
    let v = v.unsqueeze(2)?.expand((1, 2, 2, 9, 8))?.reshape((1, 4, 9, 8))?;
    assert!(largest_difference(&out, &expected.matmul(&v)?) < 1e-5);
    Ok(())
}

/// The fused op against the unfused path with the same int8 scores: what differs is the rounding
/// of P·V. Values in bf16 bound it; or probabilities in int8, where hundreds of small ones beside a
/// large one round to 0 or to 1/255 of it.
fn fused_equals_unfused(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: &AttentionCall,
    config: &AttentionConfig,
) -> TestResult {
    for (pv, bound) in
        [(PvPrecision::F32, 2e-5), (PvPrecision::Auto, 0.02), (PvPrecision::Int8, 0.15)]
    {
        let config = config.clone().pv(pv);
        let fused = attention(q, k, v, call, &config)?;
        let check = unfused::attention(q, k, v, call, &config)?;
        let difference = largest_difference(&fused, &check);
        let size = (common::largest(&check) as f32).max(1.0);
        assert!(difference <= bound * size, "{difference} {pv:?} {config:?} {call:?}");
        assert!(values(&fused).iter().all(|x| x.is_finite()));
    }
    Ok(())
}

#[test]
fn fused_equals_unfused_over_shapes() -> TestResult {
    for (b, h, h_kv, m, n) in [
        (1, 1, 1, 1, 1),
        (2, 4, 2, 5, 9),
        (1, 2, 1, 47, 65),
        (1, 1, 1, 49, 511),
        (1, 2, 2, 50, 513),
        (1, 1, 1, 97, 1100),
        (3, 6, 1, 1, 700),
    ] {
        for (d, dv) in [(1, 1), (33, 50), (64, 64), (80, 17), (256, 130)] {
            let (q, k) = (randn((b, h, m, d)), randn((b, h_kv, n, d)));
            let v = randn((b, h_kv, n, dv));
            let config = AttentionConfig::int8();
            fused_equals_unfused(&q, &k, &v, &AttnMask::None.into(), &config)?;
            fused_equals_unfused(&q, &k, &v, &AttnMask::causal_with_offset(n / 3).into(), &config)?;
        }
    }
    Ok(())
}

#[test]
fn fused_equals_unfused_with_everything_that_changes_scores() -> TestResult {
    let (b, h, h_kv, m, n, d) = (3, 4, 2, 60, 530, 32);
    let (q, k, v) = (randn((b, h, m, d)), randn((b, h_kv, n, d)), randn((b, h_kv, n, d)));
    let keep: Vec<u8> = (0..b * n).map(|i| u8::from(i % 7 != 1 && i % n < 500)).collect();
    let keep = Tensor::from_vec(keep, (b, 1, 1, n), &Device::Cpu)?;
    let over_queries = randn((m, n));
    let over_heads = randn((1, h, 1, n));
    let masks = [
        AttnMask::None,
        AttnMask::causal(),
        AttnMask::causal_with_offset(n - m),
        AttnMask::Mask(keep),
        AttnMask::Mask(over_queries.clone()),
        AttnMask::Mask(over_queries.to_dtype(DType::BF16)?),
        AttnMask::Mask(over_heads),
        AttnMask::Mask(over_queries.t()?.contiguous()?.t()?),
    ];
    let int8 = AttentionConfig::int8;
    let plain = int8().scheme(Scheme::Affine).granularity(Granularity::PerHead);
    let configs = [
        int8(),
        int8().softcap(5.0),
        int8().alibi_slopes(vec![0.5, 0.1, 0.02, 0.0]),
        int8().window(Some(40), None),
        int8().window(Some(9), Some(3)),
        plain.smoothing(Smoothing::None, Smoothing::None).softmax_scale(0.3),
    ];
    for mask in &masks {
        for config in &configs {
            fused_equals_unfused(&q, &k, &v, &mask.into(), config)?;
        }
        let call = AttentionCall::from(mask).with_kv_lens(vec![n, 0, 77]);
        fused_equals_unfused(&q, &k, &v, &call, &int8())?;
        let call = AttentionCall::from(mask).with_kv_lens(vec![500, 530, 1]);
        let all = int8().softcap(20.0).window(None, Some(100)).alibi_slopes(vec![0.01; h]);
        fused_equals_unfused(&q, &k, &v, &call, &all)?;
        // A mask tensor with a causal rule, of which each sequence has its own.
        for causal in [Causal::End, Causal::From(vec![0, 300, 700])] {
            fused_equals_unfused(&q, &k, &v, &call.clone().with_causal(causal), &all)?;
        }
    }
    Ok(())
}

#[test]
fn queries_at_the_end_of_their_sequence_are_those_of_it_alone() -> TestResult {
    let (h, m, n, d) = (2, 3, 90, 16);
    let (q, k, v) = (randn((2, h, m, d)), randn((2, h, n, d)), randn((2, h, n, d)));
    let lens = [90, 50];
    let starts: Vec<usize> = lens.iter().map(|len| len - m).collect();
    let end = AttentionCall::causal().with_kv_lens(lens.to_vec());
    for config in [AttentionConfig::int8(), AttentionConfig::fp32()] {
        let config = config.alibi_slopes(vec![0.3, 0.1]).window(Some(20), None);
        let together = attention(&q, &k, &v, &end, &config)?;
        let from = attention(&q, &k, &v, Causal::From(starts.clone()), &config)?;
        assert_eq!(largest_difference(&together, &from), 0.0);
        for (b, len) in lens.into_iter().enumerate() {
            let of = |x: &Tensor, len| x.narrow(0, b, 1)?.narrow(2, 0, len);
            let (k, v) = (of(&k, len)?, of(&v, len)?);
            let mask = AttnMask::causal_with_offset(len - m);
            // Keys that are not seen still count in smooth-K's mean.
            let exact = config.with_backend(Backend::Fp32);
            let alone = attention(&of(&q, m)?, &k, &v, &mask, &exact)?;
            let difference = largest_difference(&together.narrow(0, b, 1)?, &alone);
            assert!(difference < 0.03, "{difference} in sequence {b}");
        }
    }
    Ok(())
}

#[test]
fn fused_output_does_not_depend_on_strides_or_threads() -> TestResult {
    for pv in [PvPrecision::Auto, PvPrecision::F32, PvPrecision::Int8] {
        does_not_depend_on_strides_or_threads(&with_pv(pv))?;
    }
    Ok(())
}

fn with_pv(pv: PvPrecision) -> AttentionConfig {
    AttentionConfig::int8().pv(pv)
}

fn does_not_depend_on_strides_or_threads(config: &AttentionConfig) -> TestResult {
    let (q, k, v) = (randn((2, 4, 130, 40)), randn((2, 2, 200, 40)), randn((2, 2, 200, 24)));
    let expected = attention(&q, &k, &v, AttnMask::causal(), config)?;
    let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    let strided = attention(&bshd(&q)?, &bshd(&k)?, &bshd(&v)?, AttnMask::causal(), config)?;
    assert_eq!(largest_difference(&strided, &expected), 0.0);
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let out = pool.install(|| attention(&q, &k, &v, AttnMask::causal(), config))?;
        assert_eq!(largest_difference(&out, &expected), 0.0, "{threads} threads");
    }
    Ok(())
}

#[test]
fn nan_in_masked_keys_and_values_does_not_leak() -> TestResult {
    for pv in [PvPrecision::Auto, PvPrecision::F32, PvPrecision::Int8] {
        nan_does_not_leak(&with_pv(pv))?;
    }
    Ok(())
}

fn nan_does_not_leak(int8: &AttentionConfig) -> TestResult {
    let (b, h, m, n, d) = (1, 2, 5, 70, 16);
    let (q, k, v) = (randn((b, h, m, d)), randn((b, h, n, d)), randn((b, h, n, d)));
    let keep = Tensor::from_vec((0..n).map(|j| u8::from(j < 60)).collect(), (1, n), &Device::Cpu)?;
    let spoil = |x: &Tensor, bad: f32| -> candle_core::Result<Tensor> {
        Tensor::cat(&[&x.narrow(2, 0, 60)?, &Tensor::full(bad, (b, h, 10, d), &Device::Cpu)?], 2)
    };
    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        let (bad_k, bad_v) = (spoil(&k, bad)?, spoil(&v, bad)?);
        let additive =
            keep.to_dtype(DType::F32)?.affine(-f64::from(f32::MIN), f64::from(f32::MIN))?;
        for call in [
            AttentionCall::default().with_mask(keep.clone()),
            AttentionCall::default().with_mask(additive),
            AttentionCall::default().with_kv_lens(vec![60]),
        ] {
            let short = |x: &Tensor| x.narrow(2, 0, 60);
            let out = attention(&q, &bad_k, &bad_v, call, int8)?;
            let exact =
                attention(&q, &short(&k)?, &short(&v)?, &AttnMask::None, &AttentionConfig::fp32())?;
            let difference = largest_difference(&out, &exact);
            // Finite huge keys spoil the mean that smooth-K subtracts, not the result's meaning.
            if bad.is_finite() {
                assert!(values(&out).iter().all(|x| x.is_finite()));
            } else {
                assert!(difference < 0.05, "{bad} {difference}");
            }
        }
        // A value that is seen is not hidden.
        let seen = attention(&q, &k, &bad_v, &AttnMask::None, int8)?;
        assert!(values(&seen).iter().all(|x| !x.is_finite() || bad.is_finite()));
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_fp32_attention() -> TestResult {
    let var = |shape| Var::from_tensor(&randn(shape));
    let (q, k, v) = (var((2, 4, 6, 8))?, var((2, 2, 9, 8))?, var((2, 2, 9, 5))?);
    let weight = randn((2, 4, 6, 5));
    for mask in [AttnMask::None, AttnMask::causal_with_offset(3)] {
        let grads = |config: &AttentionConfig| -> Result<_, Box<dyn std::error::Error>> {
            let out = attention(&q, &k, &v, &mask, config)?;
            Ok((out * &weight)?.sum_all()?.backward()?)
        };
        let (int8, fp32) = (grads(&AttentionConfig::int8())?, grads(&AttentionConfig::fp32())?);
        for var in [&q, &k, &v] {
            let difference = largest_difference(int8.get(var).unwrap(), fp32.get(var).unwrap());
            assert!(difference < 1e-5, "{difference}");
        }
    }
    Ok(())
}

#[test]
fn nothing_as_large_as_all_scores_is_allocated() -> TestResult {
    // [1, 1, 40000, 16]: all scores would be 6.4 GB, more than a test machine likes to give.
    let q = randn((1, 1, 40_000, 16));
    let window = AttentionConfig::int8().window(Some(20), Some(0));
    let out = attention(&q, &q, &q, &AttnMask::None, &window)?;
    assert_eq!(out.dims(), q.dims());
    Ok(())
}

#[test]
fn contradictions_in_the_configuration_are_named() -> TestResult {
    let q = randn((2, 4, 8, 16));
    let int8 = AttentionConfig::int8;
    let call = AttentionCall::default;
    for (call, config, message) in [
        (call(), int8().softcap(0.0), "softcap 0"),
        (call(), int8().alibi_slopes(vec![1.0; 3]), "3 ALiBi slopes for 4"),
        (call().with_kv_lens(vec![8]), int8(), "1 kv_lens for a batch of 2"),
        (call().with_kv_lens(vec![8, 9]), int8(), "kv_lens holds 9, but there are 8 keys"),
        (Causal::From(vec![0]).into(), int8(), "1 first positions for a batch of 2"),
    ] {
        for backend in [Backend::Fp32, Backend::default()] {
            let config = config.with_backend(backend);
            let error = attention(&q, &q, &q, &call, &config).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
    Ok(())
}

#[test]
fn views_of_nothing_that_start_beyond_their_storage() -> TestResult {
    let qkv = Tensor::zeros((1, 0, 3, 2, 4), DType::F32, &Device::Cpu)?;
    let part = |i| qkv.get_on_dim(2, i)?.transpose(1, 2);
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    for config in [AttentionConfig::int8(), AttentionConfig::fp32()] {
        let out = attention(&q, &k, &v, &AttnMask::None, &config)?;
        assert_eq!(out.dims(), [1, 2, 0, 4]);
    }
    Ok(())
}
