//! The models beside those of candle-transformers, on the same weights.

// Of the tests of the library, with which this package shares no crate.
#[path = "../../tests/common/numbers.rs"]
mod numbers;
#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code, reason = "its other users need the rest of it")]
mod tiny;
#[path = "../../tests/common/tiny_bert.rs"]
#[allow(dead_code, reason = "its other users need the rest of it")]
mod tiny_bert;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::models::llama::{LlamaModel, LlamaTokenizer, WeightFormat};
use candle_int8_attention::models::{BertModel, ModelFiles, TextEncoder};
use candle_int8_attention::nn::Precision;
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use candle_transformers::models::quantized_llama::ModelWeights;
use numbers::{largest, largest_difference};
use std::path::{Path, PathBuf};
use tiny::{Tiny, VOCAB};
use tiny_bert::{TINY_CONFIG, tiny_folder};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Both compute the same in f32, and round it differently.
const ROUNDING: f64 = 2e-5;
/// Int8 products of the same integers, scaled and summed in another order on the way.
const QUANTIZED: f64 = 2e-5;
/// Activations in f32 against those that Candle rounds to 8 bits.
const ACTIVATIONS_ROUNDED: f64 = 0.05;

/// The encoder of this repository, and any other that `CANDLE_INT8_TEST_MODEL` names.
fn encoder_folders() -> Vec<PathBuf> {
    let mut folders = vec![benches::project().join("models/paraphrase-MiniLM-L3-v2")];
    match std::env::var_os("CANDLE_INT8_TEST_MODEL") {
        Some(folder) => folders.push(folder.into()),
        None => eprintln!("NOT RUN: a second encoder (CANDLE_INT8_TEST_MODEL names no folder)"),
    }
    folders
}

fn reference_encoder(files: &ModelFiles) -> Result<bert::BertModel> {
    let config = serde_json::from_str(&std::fs::read_to_string(&files.config)?)?;
    let bytes = std::fs::read(&files.weights)?;
    let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?;
    Ok(bert::BertModel::load(vb, &config)?)
}

#[test]
fn an_encoder_s_states_are_those_of_candle_transformers_padded_batches_included() -> Result<()> {
    let texts = [
        "It is a truth universally acknowledged.",
        "You want to tell me, and I have no objection to hearing it. This was invitation enough.",
        "Bingley.",
    ];
    for folder in encoder_folders() {
        let files = ModelFiles::from_dir(&folder)?;
        let (encoder, reference) = (
            TextEncoder::load_in(&files, &Device::Cpu, Precision::F32)?,
            reference_encoder(&files)?,
        );
        let batch = encoder.tokenize(&texts)?;
        let types = batch.input_ids.zeros_like()?;
        let ours = encoder.model.forward(&batch.input_ids, None, Some(&batch.attention_mask))?;
        let theirs = reference.forward(&batch.input_ids, &types, Some(&batch.attention_mask))?;
        let tokens = batch.attention_mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let (ours, theirs) = (ours.broadcast_mul(&tokens)?, theirs.broadcast_mul(&tokens)?);
        let difference = largest_difference(&ours, &theirs);
        eprintln!("{}: largest difference {difference:e}", folder.display());
        assert!(difference < 1e-4, "{difference}");
        assert!(largest(&ours) > 0.5, "not all zeros");
    }
    Ok(())
}

#[test]
fn prefixes_poolers_and_half_precision_load() -> Result<()> {
    let ids = Tensor::new(&[[1u32, 5, 10, 0], [2, 2, 3, 4]], &Device::Cpu)?;
    for prefix in ["", "bert."] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let (_folder, files) = tiny_folder(prefix, dtype, |_| {})?;
            let ours = BertModel::load(&files, &Device::Cpu)?.forward(&ids, None)?;
            let theirs = reference_encoder(&files)?.forward(&ids, &ids.zeros_like()?, None)?;
            let difference = largest_difference(&ours, &theirs);
            assert!(difference < 1e-4, "{prefix:?} {dtype:?}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn every_activation_agrees() -> Result<()> {
    let ids = Tensor::new(&[[1u32, 5, 10, 0], [2, 2, 3, 4]], &Device::Cpu)?;
    for (ours, theirs) in [
        ("gelu", "gelu"),
        ("gelu_new", "geluapproximate"),
        ("gelu_pytorch_tanh", "geluapproximate"),
        ("relu", "relu"),
    ] {
        let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
        let config = |act| TINY_CONFIG.replace("\"gelu\"", &format!("\"{act}\""));
        std::fs::write(&files.config, config(ours))?;
        let found = BertModel::load(&files, &Device::Cpu)?.forward(&ids, None)?;
        std::fs::write(&files.config, config(theirs))?;
        let expected = reference_encoder(&files)?.forward(&ids, &ids.zeros_like()?, None)?;
        let difference = largest_difference(&found, &expected);
        assert!(difference < 1e-4, "{ours}: {difference}");
    }
    Ok(())
}

fn reference_decoder(path: &Path) -> Result<ModelWeights> {
    let mut file = std::fs::File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    Ok(ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
}

fn prompt() -> Vec<u32> {
    (0..37).map(|i| (i * 71 + 11) % VOCAB as u32).collect()
}

/// A prefill, another chunk, and single tokens, through both; the largest relative difference.
fn disagreement(path: &Path, format: WeightFormat, prompt: &[u32]) -> Result<f64> {
    let mut reference = reference_decoder(path)?;
    let model = LlamaModel::load(path, format, &Device::Cpu)?;
    let mut cache = model.new_cache(1, prompt.len())?;
    let (mut start, mut differences) = (0, Vec::new());
    for len in [prompt.len() - 7, 4, 1, 1, 1] {
        let ids = Tensor::new(&prompt[start..start + len], &Device::Cpu)?.unsqueeze(0)?;
        let expected = reference.forward(&ids, start)?;
        let found = model.forward(&ids, &mut cache)?;
        differences.push(largest_difference(&found, &expected) / largest(&expected));
        start += len;
    }
    assert_eq!(cache.len(), prompt.len());
    // NaN comes after all numbers.
    Ok(differences.into_iter().max_by(f64::total_cmp).unwrap_or(f64::NAN))
}

#[test]
fn a_decoder_s_logits_are_those_of_candle_transformers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for tied in [false, true] {
        for (dtype, tolerance) in [
            (GgmlDType::F32, ROUNDING),
            (GgmlDType::F16, ROUNDING),
            (GgmlDType::Q8_0, QUANTIZED),
            (GgmlDType::Q4_1, QUANTIZED),
            (GgmlDType::Q5_0, QUANTIZED),
        ] {
            let path = Tiny::new(tied)?.gguf(dtype)?.write(folder.path())?;
            let worst = disagreement(&path, WeightFormat::Quantized, &prompt())?;
            assert!(worst <= tolerance, "{dtype:?}, tied {tied}: {worst}");
        }
    }
    Ok(())
}

/// The weights are the same; `quantized_llama` rounds activations, the dense product does not.
#[test]
fn dense_weights_differ_by_rounded_activations_only() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = Tiny::new(false)?.gguf(GgmlDType::Q4_1)?.write(folder.path())?;
    for format in [WeightFormat::Auto, WeightFormat::Dense] {
        let worst = disagreement(&path, format, &prompt())?;
        assert!(worst > 0.0 && worst <= ACTIVATIONS_ROUNDED, "{format:?}: {worst}");
    }
    Ok(())
}

/// The real model, where `CANDLE_INT8_TEST_LLAMA` names its GGUF file: with f32 weights, because
/// with quantized ones a difference in the last bit becomes one of 8 bits wherever it moves an
/// activation to the next integer, in each of many layers.
#[test]
fn a_real_decoder_s_logits_are_those_of_candle_transformers() -> Result<()> {
    let Some(path) = std::env::var_os("CANDLE_INT8_TEST_LLAMA") else {
        eprintln!("NOT RUN: a real model (CANDLE_INT8_TEST_LLAMA names no GGUF file)");
        return Ok(());
    };
    let tokenizer = LlamaTokenizer::load(&path)?;
    let text = "It is a truth universally acknowledged, that a single man in possession of a good \
                fortune, must be in want of a wife.";
    let ids = tokenizer.encode(text, true)?;
    assert_eq!(tokenizer.decode(&ids)?, text);
    let folder = tempfile::tempdir()?;
    let dense = folder.path().join("f32.gguf");
    write_dense(Path::new(&path), &dense)?;
    let worst = disagreement(&dense, WeightFormat::Quantized, &ids)?;
    eprintln!("RUN: a real model: relative difference of logits {worst:.1e}");
    assert!(worst <= ROUNDING, "{worst}");
    Ok(())
}

/// A copy with f32 weights.
fn write_dense(from: &Path, to: &Path) -> Result<()> {
    let mut file = std::fs::File::open(from)?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut tensors = Vec::new();
    for name in content.tensor_infos.keys() {
        let tensor = content.tensor(&mut file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        tensors.push((name.as_str(), QTensor::quantize(&tensor, GgmlDType::F32)?));
    }
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let metadata: Vec<_> = content.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    Ok(gguf_file::write(&mut std::fs::File::create(to)?, &metadata, &tensors)?)
}
