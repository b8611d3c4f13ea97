//! Attention with both backends: masks, shapes, dtypes, errors.

use candle_core::{D, DType, Device, Tensor};
use candle_int8_attention::attention::attention_probs;
use candle_int8_attention::{
    AttentionConfig, AttnMask, Backend, Error, Int8Config, QuantizedAttention, ScoreConfig,
    ScoreOutput, attention,
};

type TestResult = Result<(), Box<dyn std::error::Error>>;

fn randn(shape: (usize, usize, usize, usize)) -> candle_core::Result<Tensor> {
    Tensor::randn(0f32, 1., shape, &Device::Cpu)
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
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
        let (q, k, v) = (randn((b, h, m, d))?, randn((b, h_kv, n, d))?, randn((b, h_kv, n, dv))?);
        let keep: Vec<u8> = (0..b * n).map(|i| u8::from(i % 3 != 1)).collect();
        let boolean = Tensor::from_vec(keep.clone(), (b, 1, 1, n), &Device::Cpu)?;
        let additive = Tensor::randn(0f32, 1., (h, 1, n), &Device::Cpu)?;
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
    let q = randn((2, 2, 4, 8))?;
    let masks = [
        Tensor::new(&[[1u8, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], &Device::Cpu)?,
        Tensor::new(&[[0f32; 4], [f32::NEG_INFINITY; 4], [0.; 4], [f32::MIN; 4]], &Device::Cpu)?,
    ];
    for (config, _) in BOUNDS {
        for mask in &masks {
            let out = attention(&q, &q, &q, &AttnMask::Mask(mask.clone()), &config())?;
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
    let q = randn((1, 2, 6, 8))?;
    for (config, _) in BOUNDS {
        let probs = attention_probs(&q, &q, &AttnMask::causal(), &config())?;
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
    let (q, v) = (randn((1, 2, 6, 8))?, randn((1, 2, 6, 5))?);
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
    let q = randn((1, 1, 6, 16))?;
    for (config, bound) in BOUNDS {
        let scaled = AttentionConfig { softmax_scale: Some(1.0), ..config() };
        let out = attention(&q, &q, &q, &AttnMask::None, &scaled)?;
        let expected = by_definition(&(&q * 4.0)?, &q, &q, |_| 0.0);
        assert!(largest_difference(&out, &expected) < 2.0 * bound);
    }
    Ok(())
}

#[test]
fn module_switches_its_backend() -> TestResult {
    let q = randn((1, 2, 6, 16))?;
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
            let (q, k, v) = (randn(q)?, randn(k)?, randn(v)?);
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
    let q = randn((1, 4, 8, 16))?;
    for (config, _) in BOUNDS {
        let message = |k: &Tensor, v: &Tensor, mask: &AttnMask| {
            attention(&q, k, v, mask, &config()).unwrap_err().to_string()
        };
        let text = message(&q, &randn((1, 4, 9, 16))?, &AttnMask::None);
        assert!(text.contains("v has shape [1, 4, 9, 16], expected [1, 4, 8, Dv]"), "{text}");
        let wrong = Tensor::zeros((7, 8), DType::F32, &Device::Cpu)?;
        let text = message(&q, &q, &AttnMask::Mask(wrong.clone()));
        assert!(text.contains("[7, 8]") && text.contains("[1, 4, 8, 8]"), "{text}");
        let text = message(&q, &q, &AttnMask::Mask(wrong.to_dtype(DType::I64)?));
        assert!(text.contains("I64") && text.contains("non-zero = attend"), "{text}");
        let text = message(&q.to_dtype(DType::U32)?, &q, &AttnMask::None);
        assert!(text.contains("k has dtype U32"), "{text}");
        let scaled = AttentionConfig { softmax_scale: Some(f32::NAN), ..config() };
        let error = attention(&q, &q, &q, &AttnMask::None, &scaled).unwrap_err();
        assert!(error.to_string().contains("NaN"), "{error}");
    }
    let scores = ScoreConfig {
        output: ScoreOutput::Int32,
        smooth_k: false,
        smooth_q: false,
        ..ScoreConfig::default()
    };
    let config = AttentionConfig {
        backend: Backend::Int8(Int8Config { scores, ..Int8Config::default() }),
        ..AttentionConfig::default()
    };
    let error = attention(&q, &q, &q, &AttnMask::None, &config).unwrap_err();
    assert!(matches!(error, Error::Config(_)), "{error}");
    Ok(())
}
