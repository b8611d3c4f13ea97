//! Arguments that make no sense: the same error of this crate from every path, as itself and not as a text
//! of Candle's.

use super::*;
use candle_core::DType;
use candle_int8_attention::attention::{
    attention_scores_int32, attention_scores_requantized, position_mask,
};
use candle_int8_attention::quant::{Granularity, QuantConfig, QuantParams, RangeSource, Scheme};
use candle_int8_attention::reference::{tensor_ops, unfused};
use candle_int8_attention::{
    AttentionCall, AttnMask, Backend, Causal, Int8Config, RequantConfig, RequantMode, ScoreConfig,
    attention, attention_scores,
};
use common::randn;

type Failed = Result<Tensor, Error>;

/// The variant of an error.
fn kind(error: &Error) -> String {
    format!("{error:?}").split(['(', ' ', '{']).next().unwrap_or_default().to_string()
}

/// All of them are errors of this kind with the same message, which names these.
fn same_error(what: &str, expected: &str, named: &str, paths: Vec<(&str, Failed)>) {
    let errors: Vec<(&str, Error)> = (paths.into_iter())
        .map(|(path, result)| (path, result.err().unwrap_or_else(|| panic!("{what}: {path}"))))
        .collect();
    for (path, error) in &errors {
        assert_eq!(kind(error), expected, "{what}, {path}: {error}");
        let text = error.to_string();
        assert!(text.contains(named), "{what}, {path}: {text}");
        assert_eq!(text, errors[0].1.to_string(), "{what}, {path}");
    }
}

/// The default but for how keys are quantized.
fn of_keys(k: QuantConfig) -> AttentionConfig {
    let scores = ScoreConfig { k, ..ScoreConfig::default() };
    AttentionConfig::from(Int8Config { scores, ..Int8Config::default() })
}

fn blocks(n: usize) -> QuantConfig {
    QuantConfig { granularity: Granularity::PerBlock(n), ..QuantConfig::default() }
}

fn given(count: usize, params: QuantParams) -> QuantConfig {
    let granularity = Granularity::PerHead;
    let range = RangeSource::Static(vec![params; count]);
    QuantConfig { granularity, range, ..QuantConfig::default() }
}

#[test]
fn attention_fails_alike_on_every_path_for_one_query_and_for_many() {
    let symmetric = QuantParams::symmetric(0.1).unwrap();
    let affine = QuantParams::affine(0.1, 3).unwrap();
    let none = AttentionCall::default;
    for m in [1, 5, 60] {
        let (q, kv) = (randn((2, 4, m, 8)), randn((2, 2, 9, 8)));
        // Of the call and the model, whoever computes.
        for (name, config) in backends() {
            for (what, call, config, expected, named) in [
                ("lens", none().with_kv_lens(vec![9; 3]), config.clone(), "Mismatch", "3 kv_lens"),
                ("a len", none().with_kv_lens(vec![9, 10]), config.clone(), "Mismatch", "holds 10"),
                ("starts", Causal::From(vec![1]).into(), config.clone(), "Mismatch", "1 first"),
                ("NaN", none(), config.clone().softmax_scale(f32::NAN), "InvalidArgument", "NaN"),
                ("inf", none(), config.clone().softmax_scale(1.0 / 0.0), "InvalidArgument", "inf"),
                ("cap", none(), config.clone().softcap(-1.0), "InvalidArgument", "-1"),
                ("slopes", none(), config.clone().alibi_slopes(vec![1.0]), "Mismatch", "1 ALiBi"),
                (
                    "slope",
                    none(),
                    config.clone().alibi_slopes(vec![f32::NAN; 4]),
                    "InvalidArgument",
                    "NaN",
                ),
                ("mask", none().with_mask(randn((2, 4, m, 8))), config.clone(), "Shape", "mask"),
            ] {
                let paths = vec![
                    ("fused", attention(&q, &kv, &kv, &call, &config)),
                    ("unfused", unfused::attention(&q, &kv, &kv, &call, &config)),
                    ("tensor_ops", tensor_ops::attention(&q, &kv, &kv, &call, &config)),
                ];
                same_error(&format!("{what}, {name}, {m}"), expected, named, paths);
            }
        }
        // Of the precision.
        for (what, keys, expected, named) in [
            ("block", blocks(0), "InvalidArgument", "block of 0"),
            ("count", given(3, symmetric), "Mismatch", "3 static parameters for 4 groups"),
            ("scheme", given(4, affine), "Contradiction", "the scheme is symmetric"),
        ] {
            let (call, config) = (AttnMask::None, of_keys(keys));
            let paths = vec![
                ("fused", attention(&q, &kv, &kv, &call, &config)),
                ("unfused", unfused::attention(&q, &kv, &kv, &call, &config)),
                ("tensor_ops", tensor_ops::attention(&q, &kv, &kv, &call, &config)),
            ];
            same_error(&format!("{what}, {m}"), expected, named, paths);
        }
    }
}

#[test]
fn scores_fail_alike_from_the_op_and_from_tensor_operations() {
    let x = randn((1, 2, 6, 8));
    let integers = x.to_dtype(DType::U32).unwrap();
    let deep = |depth| Tensor::zeros((1, 1, 1, depth), DType::F32, &Device::Cpu).unwrap();
    let plain = || ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
    let keys = |k| ScoreConfig { k, ..plain() };
    let params = QuantParams::symmetric(0.1).unwrap();
    for (what, q, k, config, expected, named) in [
        ("integers", &integers, &x, plain(), "DType", "U32"),
        ("integer keys", &x, &integers, plain(), "DType", "U32"),
        ("deep", &deep(65_794), &deep(65_794), plain(), "Depth", "65793"),
        ("deep, affine", &deep(33_026), &deep(33_026), ScoreConfig::default(), "Depth", "33025"),
        ("block", &x, &x, keys(blocks(0)), "InvalidArgument", "block of 0"),
        ("count", &x, &x, keys(given(5, params)), "Mismatch", "5 static parameters"),
        ("shape", &x, &randn((1, 2, 6, 9)), plain(), "Shape", "[1, 2, 6, 9]"),
    ] {
        let errors = [attention_scores(q, k, &config), tensor_ops::attention_scores(q, k, &config)];
        for error in errors.map(|result| result.err().unwrap_or_else(|| panic!("{what}"))) {
            assert_eq!(kind(&error), expected, "{what}: {error}");
            assert!(error.to_string().contains(named), "{what}: {error}");
        }
    }
    // Also where there is nothing to multiply.
    let nothing = randn((1, 2, 0, 8));
    for config in [keys(blocks(0)), keys(given(5, params))] {
        assert!(attention_scores(&nothing, &x, &config).is_err());
        assert!(tensor_ops::attention_scores(&nothing, &x, &config).is_err());
    }
}

#[test]
fn errors_that_only_the_data_shows_arrive_as_themselves() {
    let plain = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
    let bad = Tensor::new(&[[[[1f32, f32::NAN]]]], &Device::Cpu).unwrap();
    let to = RequantConfig::default();
    let error = attention_scores_requantized(&bad, &bad, &plain, &to).unwrap_err();
    assert_eq!(kind(&error), "NonFinite", "{error}");
    // A multiplier that 31 bits and a shift cannot hold.
    let tiny = QuantParams::symmetric(1e-30).unwrap();
    let (scheme, range) = (Scheme::Symmetric, RangeSource::Static(vec![tiny]));
    let (granularity, mode) = (Granularity::PerTensor, RequantMode::FixedPoint);
    let to = RequantConfig { scheme, granularity, range, mode };
    let x = randn((1, 1, 2, 4));
    let error = attention_scores_requantized(&x, &x, &plain, &to).unwrap_err();
    assert_eq!(kind(&error), "QuantParams", "{error}");
    let to = RequantConfig { granularity: Granularity::PerBlock(0), ..RequantConfig::default() };
    for result in [
        attention_scores_requantized(&x, &x, &plain, &to),
        tensor_ops::attention_scores_requantized(&x, &x, &plain, &to),
    ] {
        assert_eq!(kind(&result.unwrap_err()), "InvalidArgument");
    }
    let smoothed = attention_scores_int32(&x, &x, &ScoreConfig::default()).unwrap_err();
    assert_eq!(kind(&smoothed), "Contradiction", "{smoothed}");
}

#[test]
fn a_configuration_is_checked_where_there_is_nothing_to_compute() {
    let mask = position_mask((1, 0), 0, None, None, &Device::Cpu).unwrap();
    let (q, kv) = (randn((1, 2, 1, 8)), randn((1, 2, 0, 8)));
    for (name, config) in backends() {
        let config = config.softmax_scale(f32::NAN);
        for call in [AttnMask::None, AttnMask::Mask(mask.clone())] {
            let error = attention(&q, &kv, &kv, &call, &config).unwrap_err();
            assert_eq!(kind(&error), "InvalidArgument", "{name}: {error}");
        }
    }
    let Backend::Int8(int8) = of_keys(blocks(0)).backend else { panic!("int8") };
    let config = AttentionConfig::from(int8);
    let error = attention(&q, &kv, &kv, &AttnMask::None, &config).unwrap_err();
    assert_eq!(kind(&error), "InvalidArgument", "{error}");
}
