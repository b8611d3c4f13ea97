//! Logits of one format of weights against those of the other, and of int8 attention against fp32.

use super::tiny::{KV_HEADS, LAYERS, Tiny, VOCAB};
use super::{batch, relative_difference};
use anyhow::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::llama::{LlamaModel, WeightFormat};
use candle_int8_attention::{AttentionConfig, Backend};
use std::path::Path;

/// Both compute the same in f32, and round it differently.
const ROUNDING: f32 = 2e-5;
/// Activations in f32 against those that Candle rounds to 8 bits.
const ACTIVATIONS_ROUNDED: f32 = 0.05;
/// What int8 attention moves, in a model of random weights.
const INT8: f32 = 0.05;

fn prompt() -> Vec<u32> {
    (0..37).map(|i| (i * 71 + 11) % VOCAB as u32).collect()
}

/// Many tokens are multiplied with a dequantized copy, few are not: near, and not the same.
#[test]
fn many_tokens_are_multiplied_in_f32() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = Tiny::new(false)?.gguf(GgmlDType::Q8_0)?.write(folder.path())?;
    let logits = |format, len: u32| -> Result<Tensor> {
        let model = LlamaModel::load(&path, format, &Device::Cpu)?;
        let ids: Vec<u32> = (0..len).map(|i| (i * 7) % VOCAB as u32).collect();
        Ok(model.forward(&batch(&ids)?, &mut model.new_cache(1, 100)?)?)
    };
    for (len, same_as) in [(100, WeightFormat::Dense), (63, WeightFormat::Quantized)] {
        let auto = logits(WeightFormat::Auto, len)?;
        for format in [WeightFormat::Dense, WeightFormat::Quantized] {
            let difference = relative_difference(&auto, &logits(format, len)?)?;
            // The last token alone goes through the output matrix, quantized in both.
            assert!(difference <= ACTIVATIONS_ROUNDED, "{len} {format:?}: {difference}");
            if format == same_as && format == WeightFormat::Quantized {
                assert_eq!(difference, 0.0);
            }
        }
    }
    Ok(())
}

fn folder_model(tiny: &Tiny, folder: &Path) -> Result<LlamaModel> {
    tiny.write_folder(folder)?;
    Ok(LlamaModel::load(folder, WeightFormat::Auto, &Device::Cpu)?)
}

fn logits_of(model: &LlamaModel) -> Result<Tensor> {
    let mut cache = model.new_cache(1, 64)?;
    let hidden = model.hidden_states(&batch(&prompt())?, &mut cache)?;
    Ok(model.logits(&hidden)?)
}

/// The same weights in both formats: rows of queries and keys are in another order, and pairs are
/// made by another convention.
#[test]
fn safetensors_equal_gguf() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for tiny in [Tiny::new(false)?, Tiny::new(true)?, Tiny::new(false)?.with_biases()?] {
        let path = tiny.gguf(GgmlDType::F32)?.write(folder.path())?;
        let gguf = LlamaModel::load(&path, WeightFormat::Auto, &Device::Cpu)?;
        let folder = folder_model(&tiny, folder.path())?;
        assert_eq!(gguf.config().num_key_value_heads, KV_HEADS);
        let difference = relative_difference(&logits_of(&folder)?, &logits_of(&gguf)?)?;
        assert!(difference <= ROUNDING, "{difference}");
    }
    Ok(())
}

#[test]
fn biases_count() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let without = logits_of(&folder_model(&Tiny::new(false)?, folder.path())?)?;
    let with = logits_of(&folder_model(&Tiny::new(false)?.with_biases()?, folder.path())?)?;
    assert!(relative_difference(&with, &without)? > 0.01);
    Ok(())
}

#[test]
fn shards_equal_one_file() -> Result<()> {
    let (one, many) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let tiny = Tiny::new(false)?;
    let expected = logits_of(&folder_model(&tiny, one.path())?)?;
    let mut shards = [std::collections::HashMap::new(), std::collections::HashMap::new()];
    let mut map = serde_json::Map::new();
    for (number, (name, tensor)) in tiny.hugging_face().into_iter().enumerate() {
        map.insert(name.clone(), format!("shard-{}.safetensors", number % 2).into());
        shards[number % 2].insert(name, tensor);
    }
    for (number, shard) in shards.iter().enumerate() {
        let file = many.path().join(format!("shard-{number}.safetensors"));
        candle_core::safetensors::save(shard, file)?;
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(many.path().join("model.safetensors.index.json"), index.to_string())?;
    std::fs::copy(one.path().join("config.json"), many.path().join("config.json"))?;
    let model = LlamaModel::load(many.path(), WeightFormat::Auto, &Device::Cpu)?;
    assert_eq!(relative_difference(&logits_of(&model)?, &expected)?, 0.0);
    Ok(())
}

/// Llama 3.1 files have the divisors as a tensor; `config.json` has the rule. Both give the same.
#[test]
fn scaled_frequencies_are_the_same_in_both_formats() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tiny = Tiny::new(false)?;
    tiny.write_folder(folder.path())?;
    let plain = logits_of(&LlamaModel::from_folder(folder.path(), &Device::Cpu)?)?;
    let mut config = super::tiny::config(false);
    config["rope_scaling"] = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string())?;
    let scaled = logits_of(&LlamaModel::from_folder(folder.path(), &Device::Cpu)?)?;

    let divisor = |pair: i32| {
        let wave = 2.0 * std::f32::consts::PI * 1000f32.powf(pair as f32 / 8.0);
        let smooth = ((64.0 / wave - 1.0) / 3.0).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / 8.0 + smooth)
    };
    let divisors: Vec<f32> = (0..8).map(divisor).collect();
    let mut file = tiny.gguf(GgmlDType::F32)?;
    let divisors = Tensor::new(divisors, &Device::Cpu)?;
    let divisors = QTensor::quantize(&divisors, GgmlDType::F32)?;
    file.tensors.insert("rope_freqs.weight".into(), divisors);
    let path = file.write(folder.path())?;
    let gguf = logits_of(&LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu)?)?;
    assert!(relative_difference(&gguf, &scaled)? <= ROUNDING);
    assert!(relative_difference(&plain, &scaled)? > 0.001);
    Ok(())
}

/// Int8 attention changes little, and only in the layers that have it.
#[test]
fn attention_is_chosen_per_layer() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut model = folder_model(&Tiny::new(false)?, folder.path())?;
    let fp32 = logits_of(&model)?;
    let mut drift = Vec::new();
    for layer in 0..LAYERS {
        model.set_attention(&AttentionConfig::fp32());
        model.layers_mut()[layer].attention.set_config(AttentionConfig::int8());
        assert!(matches!(model.layers()[layer].attention.config().backend, Backend::Int8(_)));
        drift.push(relative_difference(&logits_of(&model)?, &fp32)?);
    }
    model.set_attention(&AttentionConfig::int8());
    let both = relative_difference(&logits_of(&model)?, &fp32)?;
    assert!(drift.iter().all(|&x| x > 0.0 && x < INT8 && x != both), "{drift:?} {both}");
    assert!(both > 0.0 && both < INT8, "{both}");
    Ok(())
}
