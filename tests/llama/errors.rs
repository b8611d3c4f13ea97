//! Files that are wrong: each error names what was found and what was expected.

use super::tiny::{self, GgufFile, Tiny, VOCAB, strings};
use anyhow::Result;
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_int8_attention::Error;
use candle_int8_attention::models::LayeredModel;
use candle_int8_attention::models::llama::{
    LlamaConfig, LlamaModel, LlamaTokenizer, RopeScaling, WeightFormat,
};
use std::path::Path;

fn load(path: &Path) -> Error {
    match LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu) {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(error) => error,
    }
}

fn expect(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn file() -> Result<GgufFile> {
    Tiny::new(false)?.gguf(GgmlDType::F32)
}

/// The error of the model in this file.
fn error_of(file: &GgufFile) -> Result<Error> {
    let folder = tempfile::tempdir()?;
    Ok(load(&file.write(folder.path())?))
}

/// The error of the tokenizer in this file.
fn tokenizer_error_of(file: &GgufFile) -> Result<Error> {
    let folder = tempfile::tempdir()?;
    Ok(LlamaTokenizer::load(file.write(folder.path())?).unwrap_err())
}

fn text(value: &str) -> Value {
    Value::String(value.to_string())
}

#[test]
fn a_file_that_is_not_there() {
    let error = load(Path::new("no/such/model.gguf"));
    assert!(matches!(error, Error::MissingFile { .. }), "{error:?}");
    expect(&error, &["GGUF file not found", "no/such/model.gguf"]);
}

#[test]
fn a_file_that_is_no_gguf() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    for (content, message) in [
        ("", "starts with \"\""),
        ("PK\u{3}\u{4} and so on", "not a GGUF file: it starts with \"PK"),
        ("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("GGUF", "cannot be read as GGUF (4 bytes)"),
    ] {
        std::fs::write(&path, content)?;
        expect(&load(&path), &["model.gguf", message]);
    }
    Ok(())
}

/// Cut anywhere: in the header, in the metadata, in the tensors.
#[test]
fn a_truncated_gguf() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file()?.write(folder.path())?;
    let bytes = std::fs::read(&path)?;
    for part in 1..40 {
        std::fs::write(&path, &bytes[..bytes.len() * part / 40])?;
        let error = load(&path);
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        expect(&error, &["tiny.gguf", "bytes"]);
        LlamaTokenizer::load(&path).unwrap_err();
    }
    Ok(())
}

#[test]
fn another_architecture() -> Result<()> {
    let error = error_of(&file()?.set("general.architecture", text("qwen2")))?;
    expect(&error, &["general.architecture \"qwen2\"", "expected \"llama\""]);
    let error = error_of(&file()?.set("llama.expert_count", Value::U32(8)))?;
    expect(&error, &["llama.expert_count 8", "expected 0"]);
    let error = error_of(&file()?.set("llama.rope.scaling.type", text("yarn")))?;
    expect(&error, &["yarn", "\"linear\""]);
    let error = error_of(&file()?.set("llama.rope.dimension_count", Value::U32(8)))?;
    expect(&error, &["dimension_count 8", "head dim 16"]);
    Ok(())
}

#[test]
fn metadata_that_is_missing_or_of_another_type() -> Result<()> {
    for key in [
        "general.architecture",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        expect(&error_of(&file()?.without(key))?, &["no metadata key", key, "expected"]);
        let error = error_of(&file()?.set(key, Value::Bool(true)))?;
        expect(&error, &[key, "is Bool(true), expected"]);
    }
    for key in ["tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        expect(&tokenizer_error_of(&file()?.without(key))?, &["no metadata key", key]);
        let error = tokenizer_error_of(&file()?.set(key, Value::U32(1)))?;
        expect(&error, &[key, "is U32(1), expected"]);
    }
    Ok(())
}

#[test]
fn numbers_that_cannot_work() -> Result<()> {
    for (key, value, message) in [
        ("llama.block_count", Value::U32(0), "number of layers 0"),
        ("llama.attention.head_count", Value::U32(0), "number of heads 0"),
        ("llama.attention.head_count_kv", Value::U32(3), "4 query heads for 3"),
        ("llama.attention.head_count_kv", Value::I32(-1), "I32(-1), expected an unsigned"),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "epsilon NaN"),
        ("llama.rope.freq_base", Value::F32(0.0), "rope theta 0"),
        ("llama.context_length", Value::U32(0), "context length 0"),
    ] {
        expect(&error_of(&file()?.set(key, value))?, &[message]);
    }
    Ok(())
}

#[test]
fn layers_that_do_not_fit_their_number() -> Result<()> {
    let error = error_of(&file()?.set("llama.block_count", Value::U32(1)))?;
    expect(&error, &["1 layers", "hold more"]);
    let error = error_of(&file()?.set("llama.block_count", Value::U32(3)))?;
    assert!(matches!(error, Error::MissingTensor { .. }), "{error:?}");
    expect(&error, &["blk.2.attn_norm.weight"]);
    Ok(())
}

#[test]
fn a_tensor_of_another_shape_or_none() -> Result<()> {
    let mut wrong = file()?;
    let tensor = Tensor::zeros((32, 64), candle_core::DType::F32, &Device::Cpu)?;
    let tensor = QTensor::quantize(&tensor, GgmlDType::F32)?;
    wrong.tensors.insert("blk.1.attn_q.weight".into(), tensor);
    let error = error_of(&wrong)?;
    assert!(matches!(error, Error::ModelShape { .. }), "{error:?}");
    expect(&error, &["blk.1.attn_q.weight", "[32, 64]", "[64, 64]"]);
    wrong.tensors.remove("blk.1.attn_q.weight");
    expect(&error_of(&wrong)?, &["no tensor named \"blk.1.attn_q.weight\""]);
    wrong.tensors.remove("token_embd.weight");
    expect(&error_of(&wrong)?, &["no tensor named \"token_embd.weight\""]);
    Ok(())
}

#[test]
fn vocabularies_that_contradict_each_other() -> Result<()> {
    let error = error_of(&file()?.set("llama.vocab_size", Value::U32(300)))?;
    expect(&error, &["vocabulary size 300 by llama.vocab_size", "261 rows"]);
    let few = strings(&tiny::tokens()[..200]);
    let error = error_of(&file()?.set("tokenizer.ggml.tokens", few))?;
    expect(&error, &["vocabulary size 200 by tokenizer.ggml.tokens", "261 rows"]);
    Ok(())
}

#[test]
fn tokenizers_that_are_wrong() -> Result<()> {
    let types = Value::Array(vec![Value::I32(1); 5]);
    for (key, value, parts) in [
        ("tokenizer.ggml.model", text("bert"), &["\"bert\"", "\"gpt2\" or \"llama\""][..]),
        ("tokenizer.ggml.pre", text("falcon"), &["\"falcon\"", "smollm", "llama-bpe"]),
        ("tokenizer.ggml.merges", strings(&["he"]), &["\"he\"", "two tokens"]),
        ("tokenizer.ggml.merges", strings(&["he he"]), &["\"he he\"", "two tokens"]),
        ("tokenizer.ggml.merges", strings(&["nowhere h"]), &["\"nowhere h\""]),
        ("tokenizer.ggml.token_type", types, &["holds 5 numbers", "261"]),
        ("tokenizer.ggml.model", text("llama"), &["tokenizer.ggml.scores"]),
    ] {
        expect(&tokenizer_error_of(&file()?.set(key, value))?, parts);
    }
    let beyond = file()?
        .set("tokenizer.ggml.add_bos_token", Value::Bool(true))
        .set("tokenizer.ggml.bos_token_id", Value::U32(VOCAB as u32));
    expect(&tokenizer_error_of(&beyond)?, &["bos_token_id is 261", "less than 261"]);
    Ok(())
}

#[test]
fn a_layer_that_is_not_there_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file()?.write(folder.path())?;
    let model = LlamaModel::load(&path, WeightFormat::Auto, &Device::Cpu)?;
    let hidden = model.embed(&Tensor::new(&[[1u32, 2]], &Device::Cpu)?)?;
    for index in [tiny::LAYERS, usize::MAX] {
        let error = model.layer_with(index, &hidden, |q, _, _| Ok(q.clone())).unwrap_err();
        expect(&error, &[&format!("layer {index}"), "less than 2"]);
        let mut attend = |q: &Tensor, _: &Tensor, _: &Tensor, _: &_| Ok(q.clone());
        let error = LayeredModel::layer(&model, index, &hidden, &mut attend).unwrap_err();
        expect(&error, &[&format!("layer {index}"), "less than 2"]);
    }
    Ok(())
}

#[test]
fn folders_that_are_wrong() -> Result<()> {
    let folder = tempfile::tempdir()?;
    expect(&load(folder.path()), &["config not found", "config.json"]);
    let config = folder.path().join("config.json");
    std::fs::write(&config, tiny::config(false).to_string())?;
    expect(&load(folder.path()), &["weights not found", "model.safetensors"]);
    expect(&LlamaTokenizer::load(folder.path()).unwrap_err(), &["tokenizer.json"]);
    Tiny::new(false)?.write_folder(folder.path())?;

    let change = |key: &str, value: serde_json::Value, parts: &[&str]| -> Result<()> {
        let mut json = tiny::config(false);
        json[key] = value;
        std::fs::write(&config, json.to_string())?;
        expect(&load(folder.path()), parts);
        Ok(())
    };
    change("model_type", "mixtral".into(), &["\"mixtral\"", "\"llama\""])?;
    change("hidden_act", "gelu".into(), &["\"gelu\"", "\"silu\""])?;
    change("num_attention_heads", 3.into(), &["hidden_size 64", "num_attention_heads 3"])?;
    change("vocab_size", 300.into(), &["model.embed_tokens.weight", "[261, 64]", "[300, 64]"])?;
    change("num_hidden_layers", 1.into(), &["1 layers", "hold more"])?;
    change("rope_scaling", serde_json::json!({"type": "yarn"}), &["\"yarn\""])?;
    let unfinished = serde_json::json!({"rope_type": "llama3", "factor": 8.0});
    change("rope_scaling", unfinished, &["\"llama3\" without low_freq_factor"])?;
    change("partial_rotary_factor", 0.5.into(), &["partial_rotary_factor 0.5, expected 1"])?;
    let part = serde_json::json!({"rope_type": "default", "partial_rotary_factor": 0.25});
    change("rope_parameters", part, &["partial_rotary_factor 0.25, expected 1"])?;
    change("rms_norm_eps", "small".into(), &["config.json", "not a Llama configuration"])?;
    Ok(())
}

/// What is larger than any f32 may become infinite when it is read.
#[test]
fn factors_of_positions_have_to_be_finite() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("config.json");
    std::fs::write(&path, tiny::config(false).to_string())?;
    let config = LlamaConfig::load(&path)?;
    let endless = f32::INFINITY;
    let llama3 = |factor, low_freq_factor, high_freq_factor| {
        let original_context = 64;
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context }
    };
    for (scaling, name) in [
        (llama3(endless, 1.0, 4.0), "rope scaling factor"),
        (llama3(8.0, endless, 4.0), "low_freq_factor"),
        (llama3(8.0, 1.0, endless), "high_freq_factor"),
        (RopeScaling::Linear { factor: endless }, "rope scaling factor"),
        (RopeScaling::Divisors(vec![endless; tiny::HEAD_DIM / 2]), "rope divisor"),
    ] {
        let mut config = config.clone();
        config.rope.scaling = scaling;
        expect(&config.check().unwrap_err(), &[name, "inf, expected a positive number"]);
    }
    Ok(())
}

#[test]
fn indexes_of_shards_that_are_wrong() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("config.json"), tiny::config(false).to_string())?;
    for (content, parts) in [
        ("{", &["not an index"][..]),
        (r#"{"weight_map": {}}"#, &["names no tensor"]),
        (r#"{"weight_map": {"a": "../other"}}"#, &["\"../other\"", "beside it"]),
        (r#"{"weight_map": {"a": "shard-1"}}"#, &["weights not found", "shard-1"]),
    ] {
        std::fs::write(folder.path().join("model.safetensors.index.json"), content)?;
        expect(&load(folder.path()), parts);
    }
    Ok(())
}
