//! Safetensors models whose numbers would be taken for something else, or whose parts for nothing.

use super::corrupt;
use super::tiny::{self, Tiny};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::Error;
use candle_int8_attention::models::llama::{LlamaConfig, LlamaModel};
use candle_int8_attention::models::{BertConfig, ModelFiles, TextEncoder, Weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

fn bundled() -> Result<ModelFiles> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paraphrase-MiniLM-L3-v2");
    Ok(ModelFiles::from_dir(folder)?)
}

fn load(folder: &Path) -> Result<LlamaModel, Error> {
    LlamaModel::from_folder(folder, &Device::Cpu)
}

/// Floats of 8 bits were loaded as if their scale were 1.
#[test]
fn weights_in_a_dtype_that_needs_a_scale_are_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("weights");
    let scale = 0.5f32.to_le_bytes();
    for (dtype, size, name) in [
        (Dtype::F8_E4M3, 1, "F8_E4M3"),
        (Dtype::F8_E5M2, 1, "F8_E5M2"),
        (Dtype::F8_E8M0, 1, "F8_E8M0"),
        (Dtype::I8, 1, "I8"),
        (Dtype::U8, 1, "U8"),
        (Dtype::I32, 4, "I32"),
        (Dtype::I64, 8, "I64"),
    ] {
        let data = vec![0x38; 6 * size];
        let weight = || TensorView::new(dtype, vec![2, 3], &data);
        std::fs::write(&path, safetensors::serialize([("w.weight", weight()?)], None)?)?;
        let get = || Weights::open(&path)?.get("w.weight", &[2, 3], &Device::Cpu);
        let problem = corrupt(&path, get());
        assert!(problem.contains(&format!("is {name}, expected F32, F16")), "{problem}");
        for beside in ["w.weight_scale", "w.weight_scale_inv"] {
            let scale = TensorView::new(Dtype::F32, vec![1], &scale)?;
            let both = [("w.weight", weight()?), (beside, scale)];
            std::fs::write(&path, safetensors::serialize(both, None)?)?;
            let problem = corrupt(&path, get());
            assert!(problem.contains(name) && problem.contains(beside), "{problem}");
        }
    }
    Ok(())
}

#[test]
fn a_quantization_that_is_not_implemented_is_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("config.json");
    let bert: Value = serde_json::from_slice(&std::fs::read(bundled()?.config)?)?;
    for (key, config, name) in [
        ("quantization_config", json!({"quant_method": "fp8"}), "\"fp8\""),
        ("quantization_config", json!({"quant_method": "bitsandbytes"}), "\"bitsandbytes\""),
        ("quantization_config", json!({"quant_algo": "FP8"}), "\"FP8\""),
        ("quantization_config", json!({"bits": 4}), "bits"),
        ("compression_config", json!({"quant_method": "compressed-tensors"}), "compressed"),
    ] {
        let mut llama = tiny::config(true);
        llama[key] = config.clone();
        std::fs::write(&path, llama.to_string())?;
        let errors = [LlamaConfig::load(&path).err().map(|e| e.to_string())];
        let mut bert = bert.clone();
        bert[key] = config;
        std::fs::write(&path, bert.to_string())?;
        let all = errors.into_iter().chain([BertConfig::load(&path).err().map(|e| e.to_string())]);
        for error in all {
            let error = error.expect("a quantized model was loaded");
            assert!(error.contains("quantization_config") && error.contains(name), "{error}");
        }
    }
    // None is what many files say.
    let mut llama = tiny::config(true);
    llama["quantization_config"] = Value::Null;
    std::fs::write(&path, llama.to_string())?;
    LlamaConfig::load(&path)?;
    Ok(())
}

#[test]
fn without_an_output_matrix_it_is_said_what_to_set() -> Result<()> {
    let folder = tempfile::tempdir()?;
    Tiny::new(true)?.write_folder(folder.path())?;
    let config = folder.path().join("config.json");
    let mut untied = tiny::config(true);
    untied.as_object_mut().expect("an object").remove("tie_word_embeddings");
    for config_json in [untied, tiny::config(false)] {
        std::fs::write(&config, config_json.to_string())?;
        let error = load(folder.path()).err().expect("an error");
        assert!(matches!(error, Error::MissingTensor { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.contains("\"lm_head.weight\""), "{error}");
        assert!(error.contains("set \"tie_word_embeddings\": true in config.json"), "{error}");
    }
    std::fs::write(&config, tiny::config(true).to_string())?;
    assert!(load(folder.path())?.warnings().is_empty());
    Ok(())
}

#[test]
fn a_head_that_is_ignored_is_said() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tiny = Tiny::new(true)?;
    tiny.write_folder(folder.path())?;
    let mut tensors = tiny.hugging_face();
    let head = candle_core::Tensor::zeros((2, 64), candle_core::DType::F32, &Device::Cpu)?;
    tensors.insert("score.weight".into(), head.clone());
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    let warnings = load(folder.path())?.warnings().to_vec();
    assert!(warnings.len() == 1 && warnings[0].contains("score."), "{warnings:?}");

    let mut tensors = candle_core::safetensors::load(bundled()?.weights, &Device::Cpu)?;
    for (name, said) in [("classifier.weight", true), ("qa_outputs.bias", true), ("cls.x", false)] {
        tensors.insert(name.into(), head.clone());
        let weights = folder.path().join("encoder");
        candle_core::safetensors::save(&tensors, &weights)?;
        let encoder = TextEncoder::load(&ModelFiles { weights, ..bundled()? }, &Device::Cpu)?;
        let warnings = encoder.warnings();
        let found = warnings.iter().any(|warning| warning.contains("a head"));
        assert_eq!(found, said, "{name}: {warnings:?}");
        tensors.remove(name);
    }
    Ok(())
}

/// The last of them would have been taken, whatever the index says.
#[test]
fn a_tensor_that_two_files_of_an_index_hold_is_refused_by_name() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let tensor = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let save = |names: &[&str], file: &str| {
        let tensors: HashMap<&str, Tensor> =
            names.iter().map(|name| (*name, tensor.clone())).collect();
        candle_core::safetensors::save(&tensors, path(file))
    };
    let map = json!({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"});
    let index = path("model.safetensors.index.json");
    std::fs::write(&index, json!({"weight_map": map}).to_string())?;
    save(&["a", "b"], "1.safetensors")?;
    save(&["c"], "2.safetensors")?;
    assert_eq!(Weights::open(&index)?.shape("b")?, [3]);
    save(&["b", "c"], "2.safetensors")?;
    let problem = corrupt(&index, Weights::open(&index));
    assert!(problem.contains("tensor \"b\" is in"), "{problem}");
    Ok(())
}
