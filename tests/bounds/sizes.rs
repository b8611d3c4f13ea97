//! Products of dims that leave the address space, which views of stride 0 reach without any memory: nothing
//! is allocated, and no result has less storage than its shape says.

use super::common::tiny::{HIDDEN, Tiny};
use super::*;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Result as CandleResult};
use candle_int8_attention::attention::{
    attention_scores_int8, attention_scores_int32, attention_scores_requantized, position_mask,
    restrict_mask,
};
use candle_int8_attention::models::llama::{LlamaModel, WeightFormat};
use candle_int8_attention::models::{
    BertModel, CalibrationConfig, Calibrator, Pooling, mean_pool, padding_mask,
};
use candle_int8_attention::nn::{Activation, LayerNorm, Linear, Precision};
use candle_int8_attention::product::{Lhs, ZeroPoints, matmul_nt};
use candle_int8_attention::quant::{Granularity, QuantConfig, QuantizedTensor, Rotation, Scheme};
use candle_int8_attention::reference::{tensor_ops, unfused};
use candle_int8_attention::{
    AttentionCall, AttnMask, CacheValues, Int8KvCache, KeySmoothing, KvCacheConfig, RequantConfig,
    ScoreConfig, attention, attention_scores, flash_attn, flash_attn_varlen_cpu,
};

type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

/// The message of the `Error::Shape` that `result` must be.
fn shape_error<T>(what: &str, result: std::result::Result<T, Error>) -> String {
    match result {
        Err(error @ Error::Shape { .. }) => error.to_string(),
        Err(other) => panic!("{what}: {other:?} is not Error::Shape"),
        Ok(_) => panic!("{what}: there is a result"),
    }
}

/// The same, after Candle's error type.
fn shape_in_candle<T>(what: &str, result: CandleResult<T>) {
    let text = result.err().unwrap_or_else(|| panic!("{what}: there is a result")).to_string();
    assert!(text.contains("less than memory has addresses"), "{what}: {text}");
}

/// Queries times channels of values: `2^64 + 384`, and two powers of two.
const RESULTS: [(usize, usize); 3] =
    [(18_446_744_073_709_552, 1000), (1 << 40, 1 << 24), (1 << 61, 2)];

#[test]
fn a_result_of_attention_that_overflows_is_an_error() {
    for (m, dv) in RESULTS {
        let (q, k, v) =
            (nothing_of(&[1, 1, m, 1]), nothing_of(&[1, 1, 1, 1]), nothing_of(&[1, 1, 1, dv]));
        for (name, config) in backends() {
            let text = shape_error(name, attention(&q, &k, &v, &AttnMask::None, &config));
            assert!(text.contains(&format!("{m}")), "{text}");
            shape_error(name, unfused::attention(&q, &k, &v, &AttnMask::None, &config));
            shape_error(name, tensor_ops::attention(&q, &k, &v, &AttnMask::None, &config));
        }
        let tokens_first = |x: &Tensor| x.transpose(1, 2).unwrap();
        let (q, k, v) = (tokens_first(&q), tokens_first(&k), tokens_first(&v));
        shape_in_candle("flash", flash_attn::<f32>(&q, &k, &v, 1.0, AttnMask::None, None, None));
    }
}

#[test]
fn scores_that_overflow_are_an_error() {
    let plain = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken);
    for (m, n, d) in
        [(1 << 32, 1 << 32, 1), (1 << 61, 8, 1), (1 << 31, 1 << 31, 8), (8, 8, 1 << 60)]
    {
        let (q, k) = (nothing_of(&[1, 1, m, d]), nothing_of(&[1, 1, n, d]));
        let to = RequantConfig::default();
        shape_error("scores", attention_scores(&q, &k, &plain));
        shape_error("int32", attention_scores_int32(&q, &k, &plain));
        shape_error("requantized", attention_scores_requantized(&q, &k, &plain, &to));
        shape_error("int8", attention_scores_int8(&q, &k, &plain, &to));
        shape_error("tensor_ops", tensor_ops::attention_scores(&q, &k, &plain));
        shape_error("probs", unfused::attention_probs(&q, &k, &AttnMask::None, &backends()[0].1));
    }
}

#[test]
fn heads_and_batches_that_overflow_are_an_error() {
    for shape in [[1 << 40, 1 << 40, 0, 1], [1 << 62, 1, 1, 1], [1, usize::MAX, 1, 1]] {
        let x = nothing_of(&shape);
        for (name, config) in backends() {
            shape_error(name, attention(&x, &x, &x, &AttnMask::None, &config));
        }
        shape_error("scores", attention_scores(&x, &x, &ScoreConfig::default()));
    }
}

#[test]
fn masks_that_overflow_are_an_error() -> TestResult {
    let mask = |m, n| position_mask((m, n), 0, None, Some(0), &Device::Cpu);
    for (m, n) in [(1 << 32, 1 << 32), (usize::MAX, 2), (1 << 63, 2), (usize::MAX, 1)] {
        shape_error("position_mask", mask(m, n));
    }
    assert_eq!(mask(0, 5)?.dims(), [0, 5]);
    let (row, column) = (nothing_of(&[1, 1 << 40]), nothing_of(&[1 << 40, 1]));
    let keep = |x: &Tensor| x.to_dtype(DType::U8);
    let one = keep(&nothing_of(&[1, 1]))?;
    shape_error("restrict_mask", restrict_mask(&row, &one.broadcast_as((1 << 40, 1))?));
    shape_error("restrict_mask", restrict_mask(&column, &one.broadcast_as((1, 1 << 40))?));
    let (q, mask) = (nothing_of(&[1, 1, 3, 4]), nothing_of(&[1 << 61, 1, 1, 3]));
    let call = AttnMask::Mask(mask);
    shape_in_candle("flash", flash_attn::<f32>(&q, &q, &q, 1.0, call, Some(8.0), None));
    Ok(())
}

#[test]
fn heads_of_keys_and_values_that_overflow_when_repeated_are_an_error() {
    let (k, v) = (nothing_of(&[1, 1 << 40, 1, 4]), nothing_of(&[1, 1 << 40, 1 << 23, 4]));
    let q = nothing_of(&[1, 1, 1 << 23, 4]);
    shape_in_candle("flash", flash_attn::<f32>(&q, &k, &v, 1.0, AttnMask::None, None, None));
    let lens = Tensor::new(&[1u32], &Device::Cpu).unwrap();
    let (q, k, v) =
        (nothing_of(&[1, 1 << 20, 4]), nothing_of(&[1, 1, 4]), nothing_of(&[1, 1 << 20, 1 << 50]));
    let out = flash_attn_varlen_cpu(&q, &k, &v, None, &lens, &lens, 1, 1, 1.0, false, None, None);
    shape_in_candle("varlen", out);
}

#[test]
fn a_product_of_codes_that_overflows_is_an_error() -> TestResult {
    let zero = ZeroPoints::Zero;
    for dims in [(1 << 61, 0, 0), (0, 1 << 61, 0), (1 << 40, 1 << 40, 0), (usize::MAX, 1, 0)] {
        shape_error("matmul_nt", matmul_nt(Lhs::I8(&[]), zero, &[], zero, dims));
        shape_error("matmul_nt", matmul_nt(Lhs::U8(&[]), ZeroPoints::Uniform(3), &[], zero, dims));
    }
    // Nothing to compute takes no memory, however many rows of nothing there are.
    assert!(matmul_nt(Lhs::I8(&[]), zero, &[], zero, (1 << 50, 0, 0))?.is_empty());
    assert_eq!(matmul_nt(Lhs::I8(&[]), zero, &[], zero, (2, 3, 0))?, [0; 6]);
    Ok(())
}

#[test]
fn a_quantized_tensor_that_overflows_is_an_error() {
    for shape in [vec![1 << 32, 1 << 32], vec![1 << 62, 4, 0, 1], vec![usize::MAX, 2]] {
        let parts =
            QuantizedTensor::from_parts(vec![], shape.clone(), Granularity::PerToken, vec![]);
        shape_error("from_parts", parts);
        let config = QuantConfig::default();
        shape_error("slice", QuantizedTensor::quantize_slice(&[], &shape, &config));
        shape_error("tensor", QuantizedTensor::quantize(&nothing_of(&shape), &config));
    }
    for granularity in [Granularity::PerToken, Granularity::PerBlock(1)] {
        let groups = granularity.groups(1 << 40, 1 << 40);
        assert!(matches!(groups, Err(Error::InvalidArgument(_))), "{groups:?}");
    }
}

#[test]
fn a_cache_refuses_what_overflows_and_stays_as_it_was() -> TestResult {
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    for (k, v) in [([1, 1, 1, 4], [1, 1, 1, 1 << 60]), ([1, 1 << 61, 1, 4], [1, 1 << 61, 1, 4])] {
        shape_error("append", cache.append(&nothing_of(&k), &nothing_of(&v)));
        assert_eq!((cache.len(), cache.memory_bytes()), (0, 0));
    }
    let few = nothing_of(&[1, 1, 3, 4]);
    cache.append(&few, &few)?;
    for shape in [[1, 1, 1 << 61, 4], [1, usize::MAX, 1, 4]] {
        let call = AttentionCall::causal();
        shape_error("attention", cache.attention(&nothing_of(&shape), call, &backends()[0].1));
    }
    // Tokens without heads take no memory, but their number has an end.
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    let many = nothing_of(&[1, 0, 1 << 53, 4]);
    let full = (0..=1 << 11).find_map(|_| cache.append(&many, &many).err());
    assert!(matches!(full, Some(Error::Capacity { .. })), "{full:?}");
    Ok(())
}

#[test]
fn batches_of_a_model_that_overflow_are_an_error() -> TestResult {
    let ids = |shape: &[usize]| nothing_of(shape).to_dtype(DType::U32);
    let one = ids(&[1, 1])?;
    let (_folder, files) = tiny_bert::tiny_folder("", DType::F32, |_| {})?;
    let bert = BertModel::load(&files, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    let path = Tiny::new(true)?.gguf(GgmlDType::F32)?.write(folder.path())?;
    let llama = LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu)?;
    for batch in [1 << 61, usize::MAX] {
        let ids = one.broadcast_as((batch, 1))?;
        shape_error("BERT", bert.forward(&ids, None));
        shape_error("Llama", llama.embed(&ids));
        let hidden = nothing_of(&[1, batch, HIDDEN]);
        shape_error("layer_with", llama.layer_with(0, &hidden, |q, _, _| Ok(q.clone())));
        let mut calibrator = Calibrator::new(CalibrationConfig::default())?;
        let (q, k) = (nothing_of(&[1, 1, 2, 4]), nothing_of(&[1, 1, batch, 4]));
        shape_error("observe", calibrator.observe(0, &q, &k));
        assert!(calibrator.finish().is_err(), "nothing was counted");
    }
    for shape in [vec![HIDDEN], vec![1, HIDDEN], vec![1, 2, HIDDEN + 1], vec![1, 1, 2, HIDDEN]] {
        let hidden = nothing_of(&shape);
        shape_error("layer_with", llama.layer_with(0, &hidden, |q, _, _| Ok(q.clone())));
    }
    Ok(())
}

#[test]
fn hidden_states_that_overflow_are_not_pooled() {
    for hidden in [[1, 1 << 61, 4], [1 << 61, 1, 4], [2, 3, 1 << 61]] {
        let (states, mask) = (nothing_of(&hidden), nothing_of(&hidden[..2]));
        shape_error("mean_pool", mean_pool(&states, &mask));
        for pooling in [Pooling::Cls, Pooling::Max, Pooling::Mean, Pooling::LastToken] {
            shape_error("Pooling", pooling.forward(&states, &mask));
        }
    }
    shape_error("padding_mask", padding_mask(&nothing_of(&[1 << 61, 4])));
}

#[test]
fn layers_that_overflow_are_an_error() -> TestResult {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    for precision in [Precision::F32, Precision::Int16, Precision::Int8] {
        for shape in [[1 << 61, 0], [0, 1 << 61], [1 << 61, 1], [1 << 32, 1 << 32], [1 << 62, 4]] {
            shape_error("weight", Linear::new(&nothing_of(&shape), None, precision));
        }
        let layer = Linear::new(&zeros(&[3, 4])?, None, precision)?;
        let norm = LayerNorm::new(zeros(&[3])?, zeros(&[3])?, 1e-5)?;
        // The last has twice 2^63 + 2 elements a row: 4 of them behind 2^64.
        for leading in [&[1 << 61][..], &[1 << 60, 1 << 4], &[1 << 61, 0], &[1, 1, (1 << 63) + 2]] {
            let last = if leading.len() == 3 { 2 } else { 4 };
            let x = nothing_of(&[leading, &[last]].concat());
            let residual = nothing_of(&[&leading[..leading.len().min(2)], &[3]].concat());
            shape_error("forward", layer.forward(&x));
            shape_error("activated", layer.forward_activated(&x, Activation::Gelu));
            shape_error("norm", layer.forward_add_norm(&x, &residual, &norm));
            let half = Tensor::zeros(vec![1; x.rank()], DType::F16, &Device::Cpu)?;
            shape_error("in f16", layer.forward(&half.broadcast_as(x.shape())?));
        }
        // No outputs, and a norm of them.
        let (layer, norm) = (
            Linear::new(&zeros(&[0, 4])?, None, precision)?,
            LayerNorm::new(zeros(&[0])?, zeros(&[0])?, 1e-5)?,
        );
        assert_eq!(layer.forward(&zeros(&[5, 4])?)?.dims(), [5, 0]);
        let normed = layer.forward_add_norm(&zeros(&[5, 4])?, &zeros(&[5, 0])?, &norm)?;
        assert_eq!(normed.dims(), [5, 0]);
    }
    shape_error("norm", LayerNorm::new(nothing_of(&[1 << 61]), nothing_of(&[1 << 61]), 1e-5));
    let norm = LayerNorm::new(zeros(&[4])?, zeros(&[4])?, 1e-5)?;
    for leading in [&[1 << 61][..], &[1 << 60, 1 << 4]] {
        shape_error("norm", norm.forward(&nothing_of(&[leading, &[4]].concat())));
    }
    for depth in [1 << 59, 1 << 60, usize::MAX] {
        Rotation::new(depth).apply(&mut [])?;
    }
    Ok(())
}

#[test]
fn a_cache_of_keys_without_depth_works_as_any_other() -> TestResult {
    let folder = tempfile::tempdir()?;
    for (smoothing, dv) in [
        (KeySmoothing::Groups, 4),
        (KeySmoothing::FirstTokens(10), 16),
        (KeySmoothing::None, 0),
        (KeySmoothing::Given(vec![vec![]; 2]), 5),
    ] {
        let config = KvCacheConfig {
            key_smoothing: smoothing,
            values: CacheValues::Bf16,
            sinks: 2,
            recent: 3,
            ..KvCacheConfig::default()
        };
        let mut cache = Int8KvCache::new(config);
        let (k, v) = (common::randn((1, 2, 300, 0)), common::randn((1, 2, 300, dv)));
        for start in (0..300).step_by(20) {
            cache.append(&k.narrow(2, start, 20)?, &v.narrow(2, start, 20)?)?;
            assert_eq!(cache.len(), start + 20);
        }
        let path = folder.path().join("cache.safetensors");
        cache.save(&path)?;
        let restored = Int8KvCache::load(&path)?;
        // All scores are 0: the mean of all values.
        let q = common::randn((1, 4, 3, 0));
        let config = AttentionConfig::int8();
        let expected = attention(&q, &k, &v, &AttnMask::None, &AttentionConfig::fp32())?;
        for cache in [&cache, &restored] {
            let out = cache.attention(&q, &AttnMask::None, &config)?;
            assert!(common::largest_difference(&out, &expected) < 1e-2, "{dv}");
        }
        cache.truncate(100)?;
        cache.append(&k, &v)?;
        assert_eq!(cache.len(), 400);
    }
    Ok(())
}
