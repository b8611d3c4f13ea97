//! Arguments of functions over plain slices and numbers that make no sense: an error, or a value that the
//! documentation names, never a panic.

use super::*;
use candle_core::DType;
use candle_int8_attention::KeySmoothing;
use candle_int8_attention::attention::alibi_slopes;
use candle_int8_attention::drift::layers::Energy;
use candle_int8_attention::drift::{Drift, ErrorSums, Summary, metrics};
use candle_int8_attention::models::BertConfig;
use candle_int8_attention::models::llama::{LlamaCache, LlamaModel};
use candle_int8_attention::nn::LayerNorm;
use candle_int8_attention::quant::{
    FixedPointMultiplier, Granularity, QuantConfig, QuantParams, QuantizedTensor, Requantizer,
    Rotation, Scheme, ValueRange, token_mean,
};

use common::tiny::Tiny;

type TestResult = Result<(), Error>;

/// That it is [`Error::Mismatch`].
fn mismatch<T>(what: &str, result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Mismatch(_))), "{what}: {:?}", result.err());
}

#[test]
fn slices_of_different_length_are_not_compared() {
    let (a, b) = ([1.0, 2.0], [1.0]);
    mismatch("cosine", metrics::cosine(&a, &b));
    mismatch("kl", metrics::kl_divergence(&a, &b));
    mismatch("top1", metrics::same_top1(&a, &b));
    mismatch("topk", metrics::topk_agreement(&a, &b, usize::MAX));
    mismatch("of_outputs", Drift::of_outputs(&a, &b));
    mismatch("sums", ErrorSums::of(&a, &b));
    let (mut sums, mut energy) = (ErrorSums::default(), Energy::default());
    mismatch("push", sums.push(&a, &b));
    mismatch("energy", energy.add(&a, &b));
    assert_eq!((sums, energy), (ErrorSums::default(), Energy::default()), "nothing was added");
}

#[test]
fn parts_of_rows_are_neither_rotated_nor_averaged() {
    for (depth, len) in [(3, 4), (0, 1), (1 << 56, 1)] {
        let mut rows = vec![1.0; len];
        mismatch("rotation", Rotation::new(depth).apply(&mut rows));
        assert_eq!(rows, vec![1.0; len], "nothing was changed");
        mismatch("mean", token_mean(&rows, depth));
    }
    let keys = nothing_of(&[1 << 20, 1 << 20, 1 << 20, 1 << 20]);
    assert!(matches!(KeySmoothing::calibrated(&keys), Err(Error::Shape { .. })));
    for depth in [1 << 62, usize::MAX] {
        assert!(matches!(token_mean(&[], depth), Err(Error::Shape { .. })), "{depth}");
    }
}

#[test]
fn a_row_that_is_not_there_has_no_scale() -> TestResult {
    for granularity in [
        Granularity::PerTensor,
        Granularity::PerHead,
        Granularity::PerToken,
        Granularity::PerBlock(usize::MAX),
    ] {
        let config = QuantConfig { granularity, ..QuantConfig::default() };
        let quantized = QuantizedTensor::quantize_slice(&[1.0; 12], &[2, 2, 3], &config)?;
        assert_eq!(quantized.params(3)?.scale(), 1.0 / 127.0);
        let empty = QuantizedTensor::quantize_slice(&[], &[2, 0, 3], &config)?;
        for (quantized, row) in [(&quantized, 4), (&quantized, usize::MAX), (&empty, 0)] {
            let error = quantized.params(row);
            assert!(matches!(error, Err(Error::InvalidArgument(_))), "{granularity} {row}");
        }
    }
    Ok(())
}

#[test]
fn a_norm_has_as_many_biases_as_weights() -> TestResult {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    for (weight, bias) in
        [(&[4][..], &[3][..]), (&[3], &[4]), (&[3], &[]), (&[], &[]), (&[1, 3], &[3])]
    {
        for dtype in [DType::F32, DType::F16] {
            let of = |shape| zeros(shape)?.to_dtype(dtype);
            let norm = LayerNorm::new(of(weight)?, of(bias)?, 1e-5);
            assert!(matches!(norm, Err(Error::Shape { .. })), "{weight:?} {bias:?}");
        }
    }
    Ok(())
}

/// A batch that was only named takes no memory; a batch that is larger than memory is an error.
#[test]
fn a_cache_of_a_decoder_takes_memory_for_tokens_alone() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    Tiny::new(true)?.write_folder(folder.path())?;
    let model = LlamaModel::from_folder(folder.path(), &Device::Cpu)?;
    let full = |batch| LlamaCache::full(model.config(), batch, 4, &Device::Cpu);
    for batch in [usize::MAX, 1 << 60] {
        for cache in [full(batch), model.new_cache(batch, 4)] {
            assert!(matches!(cache, Err(Error::Shape { .. })), "{batch}");
        }
    }
    let mut config = model.config().clone();
    config.num_hidden_layers = usize::MAX;
    let cache = LlamaCache::full(&config, 1, 4, &Device::Cpu);
    assert!(matches!(cache, Err(Error::Shape { .. })));
    config.num_key_value_heads = 0;
    let cache = LlamaCache::full(&config, 1, 4, &Device::Cpu);
    assert!(matches!(cache, Err(Error::InvalidArgument(_))));
    assert_eq!(full(1 << 40)?.memory_bytes(), 0);
    assert_eq!(model.new_cache(1 << 40, 4)?.memory_bytes(), 0);
    Ok(())
}

#[test]
fn numbers_that_make_no_sense_give_what_the_documentation_says() -> TestResult {
    assert_eq!(alibi_slopes(0), [0f32; 0]);
    assert_eq!(metrics::top_k(&[], usize::MAX), [0usize; 0]);
    assert_eq!(metrics::lowest([]), f64::INFINITY);
    let mut summary = Summary::default();
    [f64::NAN, f64::INFINITY, f64::MIN, f64::MAX].into_iter().for_each(|x| summary.push(x));
    assert!(summary.mean().is_nan());

    let json = r#"{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 0,
        "intermediate_size": 8, "vocab_size": 3, "max_position_embeddings": 4, "type_vocab_size": 1, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12}"#;
    let config: BertConfig = serde_json::from_str(json).expect("a configuration");
    assert_eq!(config.head_dim(), 0);

    let range = |min, max| ValueRange { min, max };
    for range in [range(f32::NAN, 1.0), range(1.0, f32::INFINITY), range(5.0, -5.0)] {
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            if let Ok(params) = QuantParams::from_range(scheme, range) {
                assert!(params.scale().is_finite() && params.scale() > 0.0, "{range:?}");
                let codes = [f32::NAN, f32::INFINITY, f32::MAX].map(|x| params.quantize(x));
                assert_eq!(codes[1..], [127; 2], "{range:?}");
            }
        }
    }
    let output = QuantParams::affine(f32::MIN_POSITIVE, -128)?;
    for requantizer in
        [Requantizer::fp32(1.0, 1.0, output), Requantizer::fixed_point(1.0, 1.0, output)]
    {
        let Ok(requantizer) = requantizer else { continue };
        assert_eq!(requantizer.requantize_all(&[i32::MIN, 0, i32::MAX]), [-128, -128, 127]);
    }
    for real in [f64::MIN_POSITIVE, 2f64.powi(-60), 2f64.powi(30)] {
        let Ok(multiplier) = FixedPointMultiplier::from_real(real) else { continue };
        assert!(multiplier.apply(i32::MIN) <= 0 && multiplier.apply(i32::MAX) >= 0, "{real}");
    }
    Ok(())
}
