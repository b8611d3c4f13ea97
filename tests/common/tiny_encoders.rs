//! Small encoders of each family with random weights, as folders that Hugging Face might have written.

use super::numbers::randn;
use candle_core::Tensor;
use candle_int8_attention::models::ModelFiles;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

pub const FAMILIES: [&str; 4] = ["bert", "roberta", "distilbert", "modernbert"];
pub const VOCAB: usize = 20;
pub const HIDDEN: usize = 16;
pub const INNER: usize = 24;
/// Of ModernBERT, layers 0 and 3 are global.
pub const LAYERS: usize = 4;
/// The most tokens of an input in every family.
pub const TOKENS: usize = 24;

/// Words that the tokenizers know, besides four special tokens.
pub const WORDS: [&str; 16] = [
    "the", "sea", "Sea", "is", "wide", "a", "ship", "sails", "query", "passage", ":", "far", "and",
    "calm", "storm", "comes",
];

pub struct TinyEncoder {
    pub config: Value,
    pub tensors: HashMap<String, Tensor>,
    family: &'static str,
    prefix: String,
}

impl TinyEncoder {
    /// Of this family; the names of tensors stand behind `prefix`.
    pub fn new(family: &'static str, prefix: &str) -> Self {
        let config = config(family);
        let mut this = Self { config, tensors: HashMap::new(), family, prefix: prefix.into() };
        match family {
            "distilbert" => this.add_distilbert(),
            "modernbert" => this.add_modernbert(),
            _ => this.add_bert(),
        }
        this
    }

    /// What the family's own classes put before its names.
    pub fn own_prefix(family: &str) -> &'static str {
        match family {
            "bert" => "bert.",
            "roberta" => "roberta.",
            "distilbert" => "distilbert.",
            _ => "model.",
        }
    }

    /// The same with a head for this many labels.
    pub fn with_head(mut self, labels: usize) -> Self {
        let names = (0..labels).map(|i| (i.to_string(), json!(format!("label {i}"))));
        self.config["id2label"] = Value::Object(names.collect());
        let numbers = (0..labels).map(|i| (format!("label {i}"), json!(i.to_string())));
        self.config["label2id"] = Value::Object(numbers.collect());
        let prefix = self.prefix.clone();
        if self.family == "bert" {
            self.linear("pooler.dense", HIDDEN, HIDDEN, true);
        }
        self.prefix = String::new();
        match self.family {
            "roberta" => {
                self.linear("classifier.dense", HIDDEN, HIDDEN, true);
                self.linear("classifier.out_proj", labels, HIDDEN, true);
            }
            family => {
                if family == "distilbert" {
                    self.linear("pre_classifier", HIDDEN, HIDDEN, true);
                }
                if family == "modernbert" {
                    self.linear("head.dense", HIDDEN, HIDDEN, false);
                    self.norm("head.norm", false);
                }
                self.linear("classifier", labels, HIDDEN, true);
            }
        }
        self.prefix = prefix;
        self
    }

    pub fn write(&self, folder: &Path) -> Result<ModelFiles, Box<dyn std::error::Error>> {
        candle_core::safetensors::save(&self.tensors, folder.join("model.safetensors"))?;
        std::fs::write(folder.join("config.json"), self.config.to_string())?;
        std::fs::write(folder.join("tokenizer.json"), tokenizer(self.family).to_string())?;
        Ok(ModelFiles::from_dir(folder)?)
    }

    /// The same weights in two files with an index.
    pub fn write_shards(&self, folder: &Path) -> Result<ModelFiles, Box<dyn std::error::Error>> {
        std::fs::remove_file(folder.join("model.safetensors")).ok();
        let mut map = serde_json::Map::new();
        let mut shards = [HashMap::new(), HashMap::new()];
        let mut names: Vec<&String> = self.tensors.keys().collect();
        names.sort();
        for (i, name) in names.into_iter().enumerate() {
            shards[i % 2].insert(name.clone(), self.tensors[name].clone());
            map.insert(name.clone(), json!(format!("part-{}.safetensors", i % 2)));
        }
        for (i, shard) in shards.iter().enumerate() {
            let path = folder.join(format!("part-{i}.safetensors"));
            candle_core::safetensors::save(shard, path)?;
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
        Ok(ModelFiles::from_dir(folder)?)
    }

    fn add(&mut self, name: &str, shape: &[usize], around: f64) {
        let tensor = (randn(shape) * 0.3).and_then(|x| x + around).unwrap();
        self.tensors.insert(format!("{}{name}", self.prefix), tensor);
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize, bias: bool) {
        self.add(&format!("{name}.weight"), &[rows, columns], 0.0);
        if bias {
            self.add(&format!("{name}.bias"), &[rows], 0.0);
        }
    }

    fn norm(&mut self, name: &str, bias: bool) {
        self.add(&format!("{name}.weight"), &[HIDDEN], 1.0);
        if bias {
            self.add(&format!("{name}.bias"), &[HIDDEN], 0.0);
        }
    }

    fn add_bert(&mut self) {
        let size = |name: &str| self.config[name].as_u64().unwrap() as usize;
        let [positions, types] = ["max_position_embeddings", "type_vocab_size"].map(size);
        self.add("embeddings.word_embeddings.weight", &[VOCAB, HIDDEN], 0.0);
        self.add("embeddings.position_embeddings.weight", &[positions, HIDDEN], 0.0);
        self.add("embeddings.token_type_embeddings.weight", &[types, HIDDEN], 0.0);
        self.norm("embeddings.LayerNorm", true);
        for layer in 0..LAYERS {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            for part in ["self.query", "self.key", "self.value", "output.dense"] {
                self.linear(&name(&format!("attention.{part}")), HIDDEN, HIDDEN, true);
            }
            self.norm(&name("attention.output.LayerNorm"), true);
            self.linear(&name("intermediate.dense"), INNER, HIDDEN, true);
            self.linear(&name("output.dense"), HIDDEN, INNER, true);
            self.norm(&name("output.LayerNorm"), true);
        }
    }

    fn add_distilbert(&mut self) {
        self.add("embeddings.word_embeddings.weight", &[VOCAB, HIDDEN], 0.0);
        self.add("embeddings.position_embeddings.weight", &[TOKENS, HIDDEN], 0.0);
        self.norm("embeddings.LayerNorm", true);
        for layer in 0..LAYERS {
            let name = |part: &str| format!("transformer.layer.{layer}.{part}");
            for part in ["q_lin", "k_lin", "v_lin", "out_lin"] {
                self.linear(&name(&format!("attention.{part}")), HIDDEN, HIDDEN, true);
            }
            self.norm(&name("sa_layer_norm"), true);
            self.linear(&name("ffn.lin1"), INNER, HIDDEN, true);
            self.linear(&name("ffn.lin2"), HIDDEN, INNER, true);
            self.norm(&name("output_layer_norm"), true);
        }
    }

    fn add_modernbert(&mut self) {
        self.add("embeddings.tok_embeddings.weight", &[VOCAB, HIDDEN], 0.0);
        self.norm("embeddings.norm", false);
        for layer in 0..LAYERS {
            let name = |part: &str| format!("layers.{layer}.{part}");
            if layer > 0 {
                self.norm(&name("attn_norm"), false);
            }
            self.linear(&name("attn.Wqkv"), 3 * HIDDEN, HIDDEN, false);
            self.linear(&name("attn.Wo"), HIDDEN, HIDDEN, false);
            self.norm(&name("mlp_norm"), false);
            self.linear(&name("mlp.Wi"), 2 * INNER, HIDDEN, false);
            self.linear(&name("mlp.Wo"), HIDDEN, INNER, false);
        }
        self.norm("final_norm", false);
    }
}

/// With what candle-transformers asks for besides.
fn config(family: &str) -> Value {
    match family {
        "distilbert" => json!({
            "model_type": family, "vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": INNER,
            "n_layers": LAYERS, "n_heads": 2, "activation": "gelu",
            "max_position_embeddings": TOKENS, "pad_token_id": 0, "initializer_range": 0.02,
        }),
        "modernbert" => json!({
            "model_type": family, "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
            "max_position_embeddings": TOKENS, "norm_eps": 1e-5, "layer_norm_eps": 1e-5,
            "pad_token_id": 0, "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
            "local_attention": 6, "local_rope_theta": 10000.0, "hidden_activation": "gelu",
            "classifier_pooling": "cls",
        }),
        _ => {
            // Of RoBERTa's positions the first two are those of padding and of what is before it.
            let (extra, types) = if family == "roberta" { (2, 1) } else { (0, 2) };
            json!({
                "model_type": family, "vocab_size": VOCAB, "hidden_size": HIDDEN,
                "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
                "hidden_act": "gelu", "max_position_embeddings": TOKENS + extra,
                "type_vocab_size": types, "layer_norm_eps": 1e-5,
                "pad_token_id": if family == "roberta" { 1 } else { 0 },
                "position_embedding_type": "absolute", "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
            })
        }
    }
}

/// The special tokens of a family in the order of their ids, and which of them are the first and the
/// last of a text, padding, and unknown words.
fn specials(family: &str) -> [&'static str; 4] {
    match family {
        "roberta" => ["<s>", "<pad>", "</s>", "<unk>"],
        _ => ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
    }
}

/// Whole words; a pair is `[CLS] A [SEP] B [SEP]`, or `<s> A </s> </s> B </s>`.
fn tokenizer(family: &str) -> Value {
    let special = specials(family);
    let words = special.iter().chain(&WORDS).enumerate();
    let vocab: serde_json::Map<String, Value> =
        words.map(|(id, word)| (word.to_string(), json!(id))).collect();
    let roberta = family == "roberta";
    let (first, last) = if roberta { ("<s>", "</s>") } else { ("[CLS]", "[SEP]") };
    let token = |name: &str, kind: u32| json!({"SpecialToken": {"id": name, "type_id": kind}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    let b = u32::from(!roberta);
    let mut pair = vec![token(first, 0), text("A", 0), token(last, 0)];
    pair.extend(roberta.then(|| token(last, 0)));
    pair.extend([text("B", b), token(last, b)]);
    let defined = |name: &str| json!({"id": name, "ids": [vocab[name]], "tokens": [name]});
    let added = special.iter().map(|name| {
        json!({"id": vocab[*name], "content": name, "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    });
    json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        // As some files have it, which the library turns off.
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "normalizer": null, "pre_tokenizer": {"type": "Whitespace"}, "decoder": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token(first, 0), text("A", 0), token(last, 0)],
            "pair": pair,
            "special_tokens": {first: defined(first), last: defined(last)},
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": special[if roberta { 3 } else { 1 }]},
    })
}
