//! A small BERT with random weights, as a folder with safetensors.

use super::numbers::randn;
use candle_core::{DType, Tensor};
use candle_int8_attention::models::ModelFiles;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The folder with the models: that of this package, or the one above.
fn project() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = package.ancestors().find(|folder| folder.join("models").exists());
    found.unwrap_or(package).to_path_buf()
}

/// A BERT of one layer with random weights, as named tensors.
fn tiny(prefix: &str, dtype: DType) -> HashMap<String, Tensor> {
    let (hidden, inner) = (6, 8);
    let mut tensors = HashMap::new();
    let mut add = |name: String, shape: &[usize]| {
        let tensor = (randn(shape) * 0.5).unwrap().to_dtype(dtype).unwrap();
        tensors.insert(format!("{prefix}{name}"), tensor);
    };
    add("embeddings.word_embeddings.weight".into(), &[11, hidden]);
    add("embeddings.position_embeddings.weight".into(), &[7, hidden]);
    add("embeddings.token_type_embeddings.weight".into(), &[2, hidden]);
    let norm = ["embeddings", "encoder.layer.0.attention.output", "encoder.layer.0.output"];
    for name in norm {
        add(format!("{name}.LayerNorm.weight"), &[hidden]);
        add(format!("{name}.LayerNorm.bias"), &[hidden]);
    }
    for (name, rows, columns) in [
        ("attention.self.query", hidden, hidden),
        ("attention.self.key", hidden, hidden),
        ("attention.self.value", hidden, hidden),
        ("attention.output.dense", hidden, hidden),
        ("intermediate.dense", inner, hidden),
        ("output.dense", hidden, inner),
    ] {
        add(format!("encoder.layer.0.{name}.weight"), &[rows, columns]);
        add(format!("encoder.layer.0.{name}.bias"), &[rows]);
    }
    add("pooler.dense.weight".into(), &[hidden, hidden]);
    tensors
}

pub const TINY_CONFIG: &str = r#"{
    "vocab_size": 11, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 8, "hidden_act": "gelu", "max_position_embeddings": 7,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.1,
    "initializer_range": 0.02, "pad_token_id": 0, "model_type": "bert"
}"#;

/// A folder with the tiny model; `change` may spoil it first.
pub fn tiny_folder(
    prefix: &str,
    dtype: DType,
    change: impl Fn(&mut HashMap<String, Tensor>),
) -> Result<(tempfile::TempDir, ModelFiles), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let mut tensors = tiny(prefix, dtype);
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    std::fs::write(folder.path().join("config.json"), TINY_CONFIG)?;
    let tokenizer = project().join("models/paraphrase-MiniLM-L3-v2/tokenizer.json");
    std::fs::copy(tokenizer, folder.path().join("tokenizer.json"))?;
    let files = ModelFiles::from_dir(folder.path())?;
    Ok((folder, files))
}
