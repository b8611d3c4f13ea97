//! The score op against its independent path in tensor operations, and against floating point.

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_int8_attention::attention::{
    attention_scores_int8, attention_scores_int32, attention_scores_requantized,
};
use candle_int8_attention::quant::{
    Granularity, QuantConfig, QuantParams, QuantizedTensor, RangeSource, Requantizer, Scheme,
    Smoothing,
};
use candle_int8_attention::reference::tensor_ops;
use candle_int8_attention::{Error, RequantConfig, RequantMode, ScoreConfig, attention_scores};
use common::{largest, largest_difference, randn};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const GRANULARITIES: [Granularity; 5] = [
    Granularity::PerTensor,
    Granularity::PerHead,
    Granularity::PerToken,
    Granularity::PerBlock(1),
    Granularity::PerBlock(7),
];

/// Normal data with what Gaussian data hides: a biased channel and an outlier token.
fn data(shape: (usize, usize, usize, usize)) -> candle_core::Result<Tensor> {
    let (b, h, s, d) = shape;
    let x = randn(shape);
    let bias = (randn((1, h, 1, d)) * 2.0)?;
    let outlier: Vec<f32> = (0..s).map(|token| if token == s / 2 { 5.0 } else { 1.0 }).collect();
    let outlier = Tensor::from_vec(outlier, (1, 1, s, 1), &Device::Cpu)?;
    let _ = b;
    x.broadcast_add(&bias)?.broadcast_mul(&outlier)
}

fn fp32(q: &Tensor, k: &Tensor) -> candle_core::Result<Tensor> {
    let group = q.dim(1)? / k.dim(1)?;
    let (b, h_kv, n, d) = k.dims4()?;
    let k = k.unsqueeze(2)?.expand((b, h_kv, group, n, d))?.reshape((b, h_kv * group, n, d))?;
    q.contiguous()?.matmul(&k.t()?)
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// Signal to quantization noise in dB.
fn sqnr(reference: &Tensor, candidate: &Tensor) -> f64 {
    let (a, b) = (values(reference), values(candidate));
    let noise: f64 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
    10.0 * (a.iter().map(|a| a * a).sum::<f64>() / noise).log10()
}

fn requantizations() -> Vec<RequantConfig> {
    let granularities = [Granularity::PerTensor, Granularity::PerHead, Granularity::PerToken];
    let schemes = [Scheme::Symmetric, Scheme::Affine];
    let of_scheme = |scheme| {
        granularities.map(|granularity| RequantConfig {
            scheme,
            granularity,
            ..RequantConfig::default()
        })
    };
    schemes.into_iter().flat_map(of_scheme).collect()
}

#[test]
fn equals_tensor_ops_to_the_bit_without_smoothing() -> TestResult {
    let shapes = [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((1, 2, 5, 3), (1, 2, 7, 3)),
        ((2, 4, 49, 50), (2, 2, 65, 50)),
        ((2, 3, 97, 33), (2, 1, 130, 33)),
        ((1, 1, 3, 1100), (1, 1, 66, 1100)),
    ];
    for (q_shape, k_shape) in shapes {
        let (q, k) = (data(q_shape)?, data(k_shape)?);
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            for granularity in GRANULARITIES {
                let config = ScoreConfig::plain(scheme, granularity);
                let equal = |op: Tensor, oracle: Tensor| {
                    assert_eq!(op.dtype(), oracle.dtype());
                    assert_eq!(largest_difference(&op, &oracle), 0.0, "{q_shape:?} {config:?}");
                };
                equal(
                    attention_scores(&q, &k, &config)?,
                    tensor_ops::attention_scores(&q, &k, &config)?,
                );
                equal(
                    attention_scores_int32(&q, &k, &config)?,
                    tensor_ops::attention_scores_int32(&q, &k, &config)?,
                );
                for to in requantizations() {
                    let op = attention_scores_requantized(&q, &k, &config, &to)?;
                    let codes = attention_scores_int8(&q, &k, &config, &to)?;
                    equal(codes.dequantize(&Device::Cpu)?, op.clone());
                    let oracle = tensor_ops::attention_scores_requantized(&q, &k, &config, &to)?;
                    equal(op, oracle);
                }
            }
        }
    }
    Ok(())
}

/// The difference of the ends of such a range is no number of f32; its scale is.
#[test]
fn rows_as_wide_as_numbers_go_have_the_scores_of_tensor_ops() -> TestResult {
    let q = Tensor::new(&[[[[3e38f32, -3e38, 0.0], [1.0, -1.0, 0.5]]]], &Device::Cpu)?;
    // One step where queries are large, so that sums times the scale of a query are finite.
    let k = Tensor::new(&[[[[4e-33f32, 0.0, 1e-30], [0.0, 4e-33, 1e-30]]]], &Device::Cpu)?;
    for granularity in GRANULARITIES {
        let config = ScoreConfig::plain(Scheme::Affine, granularity);
        let (op, oracle) =
            (attention_scores(&q, &k, &config)?, tensor_ops::attention_scores(&q, &k, &config)?);
        assert!(values(&op).iter().all(|x| x.is_finite()), "{op}");
        assert_eq!(largest_difference(&op, &oracle), 0.0, "{config:?}");
    }
    Ok(())
}

/// The fixed-point mode and static ranges beside the definition, code by code.
#[test]
fn codes_come_straight_from_the_sums() -> TestResult {
    let (q, k) = (data((2, 4, 9, 24))?, data((2, 2, 13, 24))?);
    for granularity in GRANULARITIES {
        let config = ScoreConfig::plain(Scheme::Affine, granularity);
        let sums = attention_scores_int32(&q, &k, &config)?.flatten_all()?.to_vec1::<i32>()?;
        let codes_of = |x: &Tensor, side: &QuantConfig| QuantizedTensor::quantize(x, side);
        let (q_codes, k_codes) = (codes_of(&q, &config.q)?, codes_of(&k, &config.k)?);
        let given: Vec<QuantParams> =
            (0..4).map(|i| QuantParams::affine(0.3 + i as f32, i)).collect::<Result<_, _>>()?;
        for mode in [RequantMode::Fp32, RequantMode::FixedPoint] {
            let to = RequantConfig {
                granularity: Granularity::PerHead,
                range: RangeSource::Static(given.clone()),
                mode,
                ..RequantConfig::default()
            };
            let found = attention_scores_int8(&q, &k, &config, &to)?;
            for (i, &sum) in sums.iter().enumerate() {
                let (head, row, column) = (i / (9 * 13), i / 13, i % 13);
                let q_scale = q_codes.params(row).unwrap().scale();
                let k_scale = k_codes.params(head / 2 * 13 + column).unwrap().scale();
                let output = given[head % 4];
                let requantizer = match mode {
                    RequantMode::FixedPoint => Requantizer::fixed_point(q_scale, k_scale, output)?,
                    _ => Requantizer::fp32(q_scale, k_scale, output)?,
                };
                assert_eq!(found.values()[i], requantizer.requantize(sum), "{mode:?} {i}");
            }
        }
    }
    Ok(())
}

#[test]
fn equals_tensor_ops_within_float_rounding_with_smoothing() -> TestResult {
    for (q_shape, k_shape) in [((2, 4, 49, 50), (2, 2, 65, 50)), ((1, 2, 1, 64), (1, 2, 300, 64))] {
        let (q, k) = (data(q_shape)?, data(k_shape)?);
        // The dot products with the means are summed in another order: f32 epsilon times a
        // generous number of terms.
        let rounding = largest(&fp32(&q, &k)?) * f64::from(f32::EPSILON) * 100.0;
        // The means too, so that an element near a tie may get the next code, on both sides.
        let one_code = 2.0 * 2.0 / 255.0 * largest(&q) * largest(&k);
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            for granularity in GRANULARITIES {
                let (none, head, block) = (Smoothing::None, Smoothing::Head, Smoothing::Block);
                for (smooth_q, smooth_k, rotate, outliers) in [
                    (head, none, false, false),
                    (none, head, false, true),
                    (head, head, true, false),
                    (block, none, false, true),
                    (none, block, true, false),
                    (block, block, true, true),
                ] {
                    let config = ScoreConfig {
                        smooth_q,
                        smooth_k,
                        rotate,
                        outliers,
                        ..ScoreConfig::plain(scheme, granularity)
                    };
                    let op = attention_scores(&q, &k, &config)?;
                    let oracle = tensor_ops::attention_scores(&q, &k, &config)?;
                    assert!(largest_difference(&op, &oracle) < rounding + one_code, "{config:?}");
                    let pairs = values(&op).into_iter().zip(values(&oracle));
                    let off = pairs.filter(|(a, b)| (a - b).abs() > rounding).count();
                    assert!(off <= op.elem_count() / 20, "{off} scores differ, {config:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_question_a_times_a_transposed() -> TestResult {
    let a = randn((1, 4, 1024, 256));
    let exact = fp32(&a, &a)?;
    // (configuration, dB that facts about such data lead to expect, less a margin of half a dB)
    let per_head = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerHead);
    let requantized = |scheme, granularity| {
        Some(RequantConfig { scheme, granularity, ..RequantConfig::default() })
    };
    let cases = [
        (per_head.clone(), None, 36.5),
        (per_head.clone(), requantized(Scheme::Symmetric, Granularity::PerHead), 26.5),
        (per_head, requantized(Scheme::Affine, Granularity::PerHead), 30.0),
        (ScoreConfig::default(), None, 40.0),
    ];
    for (config, to, at_least) in cases {
        let scores = match &to {
            None => attention_scores(&a, &a, &config)?,
            Some(to) => attention_scores_requantized(&a, &a, &config, to)?,
        };
        let db = sqnr(&exact, &scores);
        assert!(db > at_least, "{db} dB, expected more than {at_least}: {config:?} {to:?}");
    }
    Ok(())
}

#[test]
fn int32_scores_times_scales_are_the_dequantized_ones() -> TestResult {
    let (q, k) = (data((1, 2, 20, 32))?, data((1, 2, 30, 32))?);
    let params = vec![QuantParams::symmetric(0.05)?, QuantParams::symmetric(0.07)?];
    let side = QuantConfig {
        granularity: Granularity::PerHead,
        range: RangeSource::Static(params),
        ..QuantConfig::default()
    };
    let config = ScoreConfig {
        q: side.clone(),
        k: side,
        ..ScoreConfig::plain(Scheme::Symmetric, Granularity::PerHead)
    };
    let real = attention_scores(&q, &k, &config)?;
    let int32 = attention_scores_int32(&q, &k, &config)?;
    assert_eq!(int32.dtype(), DType::I32);
    let scales =
        Tensor::new(&[0.05f32 * 0.05, 0.07 * 0.07], &Device::Cpu)?.reshape((1, 2, 1, 1))?;
    let scaled = int32.to_dtype(DType::F32)?.broadcast_mul(&scales)?;
    assert!(sqnr(&real, &scaled) > 120.0);
    Ok(())
}

#[test]
fn int8_codes_come_with_their_scales() -> TestResult {
    let (q, k) = (data((2, 2, 20, 32))?, data((2, 1, 30, 32))?);
    let (config, to) = (ScoreConfig::default(), RequantConfig::default());
    let real = attention_scores_requantized(&q, &k, &config, &to)?;
    let codes = attention_scores_int8(&q, &k, &config, &to)?;
    assert_eq!(codes.shape(), [2, 2, 20, 30]);
    assert_eq!(codes.all_params().len(), 2 * 2 * 20);
    assert_eq!(largest_difference(&codes.dequantize(&Device::Cpu)?, &real), 0.0);
    let shifted = codes.to_u8_tensor(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
    let signed = shifted.iter().map(|code| (i16::from(*code) - 128) as i8);
    assert!(signed.eq(codes.values().iter().copied()));
    // What smoothing adds is in f32, so codes are those of the f32 scores.
    let scores = attention_scores(&q, &k, &config)?;
    assert_eq!(codes, QuantizedTensor::quantize(&scores, &to.to_quant_config())?);
    Ok(())
}

#[test]
fn any_strides_give_the_same() -> TestResult {
    let (q, k) = (data((2, 4, 37, 24))?, data((2, 2, 53, 24))?);
    for config in [ScoreConfig::default(), ScoreConfig::plain(Scheme::Affine, Granularity::PerHead)]
    {
        let expected = attention_scores(&q, &k, &config)?;
        let check = |q: &Tensor, k: &Tensor, what: &str| -> TestResult {
            let difference = largest_difference(&attention_scores(q, k, &config)?, &expected);
            assert_eq!(difference, 0.0, "{what}");
            Ok(())
        };
        let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
        check(&bshd(&q)?, &bshd(&k)?, "[B, S, H, D] seen as [B, H, S, D]")?;
        let by_columns = |x: &Tensor| x.t()?.contiguous()?.t();
        check(&by_columns(&q)?, &by_columns(&k)?, "transposed")?;
        let wider = Tensor::cat(&[&k, &k.zeros_like()?, &k], D::Minus1)?;
        check(&q, &wider.narrow(3, 48, 24)?, "narrowed in D")?;
        let longer = Tensor::cat(&[&k.zeros_like()?, &k], 2)?;
        check(&q, &longer.narrow(2, 53, 53)?, "narrowed in N")?;
    }
    let one = data((1, 1, 9, 24))?;
    let spread = one.broadcast_as((2, 4, 9, 24))?;
    let config = ScoreConfig::default();
    let a = attention_scores(&q, &spread, &config)?;
    let b = attention_scores(&q, &spread.contiguous()?, &config)?;
    assert_eq!(largest_difference(&a, &b), 0.0, "broadcast");
    Ok(())
}

#[test]
fn half_precision_inputs_equal_their_f32_values() -> TestResult {
    let (q, k) = (data((1, 2, 30, 40))?, data((1, 2, 50, 40))?);
    for dtype in [DType::F16, DType::BF16] {
        let (q, k) = (q.to_dtype(dtype)?, k.to_dtype(dtype)?);
        let half = attention_scores(&q, &k, &ScoreConfig::default())?;
        let (q, k) = (q.to_dtype(DType::F32)?, k.to_dtype(DType::F32)?);
        let full = attention_scores(&q, &k, &ScoreConfig::default())?;
        assert_eq!(half.dtype(), DType::F32);
        assert_eq!(largest_difference(&half, &full), 0.0);
    }
    Ok(())
}

#[test]
fn empty_dimensions() -> TestResult {
    let config = ScoreConfig::default();
    // What a thread keeps of other data is not seen.
    attention_scores(&data((1, 4, 3, 32))?, &data((1, 2, 5, 32))?, &config)?;
    for (q, k) in [
        ((0, 4, 3, 8), (0, 2, 5, 8)),
        ((1, 0, 3, 8), (1, 0, 5, 8)),
        ((1, 4, 0, 8), (1, 2, 5, 8)),
        ((1, 4, 3, 8), (1, 2, 0, 8)),
        ((1, 4, 3, 0), (1, 2, 5, 0)),
    ] {
        let q = Tensor::zeros(q, DType::F32, &Device::Cpu)?;
        let k = Tensor::zeros(k, DType::F32, &Device::Cpu)?;
        let scores = attention_scores(&q, &k, &config)?;
        let (b, h, m, _) = q.dims4()?;
        assert_eq!(scores.dims(), [b, h, m, k.dim(2)?]);
        assert!(values(&scores).iter().all(|&x| x == 0.0));
        let oracle = tensor_ops::attention_scores(&q, &k, &config)?;
        assert_eq!(oracle.dims(), scores.dims());
    }
    Ok(())
}

#[test]
fn nan_and_infinity_stay_in_their_rows_and_columns() -> TestResult {
    let clean = data((1, 1, 6, 8))?;
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut rows = clean.flatten_all()?.to_vec1::<f32>()?;
        rows[2 * 8 + 3] = bad;
        let spoiled = Tensor::from_vec(rows, clean.shape(), &Device::Cpu)?;
        for granularity in GRANULARITIES {
            for scheme in [Scheme::Symmetric, Scheme::Affine] {
                let plain = ScoreConfig::plain(scheme, granularity);
                let (q, k) = (plain.q.clone(), plain.k.clone());
                let whole = ScoreConfig { q, k, ..ScoreConfig::default() };
                for config in [plain, whole] {
                    let op = attention_scores(&spoiled, &spoiled, &config)?;
                    let oracle = tensor_ops::attention_scores(&spoiled, &spoiled, &config)?;
                    for scores in [op, oracle] {
                        let scores = scores.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
                        for (i, row) in scores.iter().enumerate() {
                            for (j, score) in row.iter().enumerate() {
                                assert_eq!(score.is_nan(), i == 2 || j == 2, "{bad} {config:?}");
                            }
                        }
                    }
                }
            }
        }
        let plain = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
        for config in [ScoreConfig::default(), plain] {
            let to = RequantConfig::default();
            let error = attention_scores_int8(&spoiled, &spoiled, &config, &to).unwrap_err();
            assert!(matches!(error, Error::NonFinite { index: 2, .. }), "{error}");
            let error = attention_scores_requantized(&spoiled, &spoiled, &config, &to);
            let error = error.unwrap_err().to_string();
            assert!(error.contains("NaN, expected a finite number"), "{error}");
        }
    }
    Ok(())
}

#[test]
fn zeros_constants_and_extreme_ranges() -> TestResult {
    for magnitude in [0.0, 1.0, 1e-44, 1e-20, 1e18] {
        let x = Tensor::full(magnitude as f32, (1, 1, 5, 4), &Device::Cpu)?;
        for config in [
            ScoreConfig::default(),
            ScoreConfig::plain(Scheme::Symmetric, Granularity::PerTensor),
            ScoreConfig::plain(Scheme::Affine, Granularity::PerHead),
        ] {
            let (scores, exact) = (attention_scores(&x, &x, &config)?, fp32(&x, &x)?);
            for (score, exact) in values(&scores).into_iter().zip(values(&exact)) {
                let bound = exact.abs() * 1e-5 + 1e-40;
                assert!((score - exact).abs() <= bound, "{magnitude}: {score} and {exact}");
            }
        }
    }
    Ok(())
}

#[test]
fn any_number_of_threads_gives_the_same_scores() -> TestResult {
    let (q, k) = (data((2, 4, 130, 64))?, data((2, 2, 200, 64))?);
    for config in
        [ScoreConfig::default(), ScoreConfig::plain(Scheme::Affine, Granularity::PerTensor)]
    {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            values(&pool.install(|| attention_scores(&q, &k, &config)).unwrap())
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
    Ok(())
}

#[test]
fn gradient_is_that_of_the_floating_point_product() -> TestResult {
    for (q_shape, k_shape) in [((2, 4, 5, 8), (2, 2, 7, 8)), ((1, 3, 4, 6), (1, 3, 4, 6))] {
        let (q, k) = (Var::from_tensor(&data(q_shape)?)?, Var::from_tensor(&data(k_shape)?)?);
        let (b, h, m, n) = (q_shape.0, q_shape.1, q_shape.2, k_shape.2);
        let weight = randn((b, h, m, n));
        let (config, to) = (ScoreConfig::default(), RequantConfig::default());
        for scores in [
            attention_scores(&q, &k, &config)?,
            attention_scores_requantized(&q, &k, &config, &to)?,
        ] {
            let int8 = (scores * &weight)?.sum_all()?.backward()?;
            let exact = (fp32(&q, &k)? * &weight)?.sum_all()?.backward()?;
            for var in [&q, &k] {
                let (int8, exact) = (int8.get(var).unwrap(), exact.get(var).unwrap());
                assert!(largest_difference(int8, exact) < 1e-4);
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_come_in_the_dtype_of_their_inputs() -> TestResult {
    let q = Var::from_tensor(&data((1, 2, 5, 8))?.to_dtype(DType::BF16)?)?;
    let grads = attention_scores(&q, &q, &ScoreConfig::default())?.sum_all()?.backward()?;
    assert_eq!(grads.get(&q).unwrap().dtype(), DType::BF16);
    Ok(())
}

#[test]
fn errors_name_the_values() -> TestResult {
    let config = ScoreConfig::default();
    let message = |q: &Tensor, k: &Tensor, config: &ScoreConfig| {
        attention_scores(q, k, config).unwrap_err().to_string()
    };
    let q = data((1, 4, 8, 16))?;
    let text = message(&q, &data((1, 3, 8, 16))?, &config);
    assert!(text.contains("[1, 3, 8, 16]") && text.contains("H_kv dividing 4"), "{text}");
    let text = message(&q, &data((1, 4, 8, 17))?, &config);
    assert!(text.contains("[1, 4, 8, 17]") && text.contains("[1, 4, 8, 16]"), "{text}");
    let text = message(&q.squeeze(0)?, &q, &config);
    assert!(text.contains("rank 3"), "{text}");
    let text = message(&q.to_dtype(DType::F64)?, &q, &config);
    assert!(text.contains("F64") && text.contains("F32, F16 or BF16"), "{text}");
    let text = message(&q, &q.to_dtype(DType::U8)?, &config);
    assert!(text.contains("U8"), "{text}");

    let deep = Tensor::zeros((1, 1, 1, 65_794), DType::F32, &Device::Cpu)?;
    let text = message(&deep, &deep, &config);
    assert!(text.contains("65794") && text.contains("33025"), "{text}");
    assert!(matches!(attention_scores(&deep, &deep, &config), Err(Error::Depth { .. })));
    let error = attention_scores_int32(&q, &q, &config).unwrap_err();
    assert!(matches!(&error, Error::Contradiction(text) if text.contains("smooth")), "{error}");
    let fixed = RequantConfig { mode: RequantMode::FixedPoint, ..RequantConfig::default() };
    let error = attention_scores_int8(&q, &q, &config, &fixed).unwrap_err();
    assert!(matches!(&error, Error::Contradiction(text) if text.contains("smooth")), "{error}");
    let plain = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerHead);
    let range = RangeSource::Static(vec![QuantParams::symmetric(1.0)?; 32]);
    let other = RequantConfig { range, ..RequantConfig::default() };
    let error = attention_scores_int8(&q, &q, &plain, &other).unwrap_err();
    assert!(matches!(&error, Error::Contradiction(text) if text.contains("affine")), "{error}");
    let mut bad = ScoreConfig::default();
    bad.q.granularity = Granularity::PerBlock(0);
    assert!(message(&q, &q, &bad).contains("block of 0"));
    bad.q.granularity = Granularity::PerHead;
    bad.q.range = RangeSource::Static(vec![QuantParams::affine(1.0, 3)?; 3]);
    assert!(message(&q, &q, &bad).contains("3 static parameters for 4 groups"));
    bad.q.range = RangeSource::Static(vec![QuantParams::symmetric(1.0)?; 4]);
    assert!(message(&q, &q, &bad).contains("are symmetric, but the scheme is affine"));
    let f64 = q.to_dtype(DType::F64)?;
    assert!(matches!(attention_scores(&f64, &f64, &config), Err(Error::DType { .. })));
    Ok(())
}
