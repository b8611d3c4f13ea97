//! Small models with random weights, written as GGUF files and as folders with safetensors.

use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_int8_attention::models::llama::LlamaTokenizer;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub const HIDDEN: usize = 64;
pub const INNER: usize = 128;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 16;
pub const CONTEXT: usize = 640;
/// 256 bytes, three merges, two control tokens.
pub const VOCAB: usize = 261;

/// Reproducible numbers in `[-1, 1)`.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The weights of a model, by their names in GGUF. Rows of queries and keys are in the order of
/// Hugging Face: elements `i` and `i + HEAD_DIM / 2` make a pair.
pub struct Tiny {
    pub tensors: BTreeMap<String, Tensor>,
}

impl Tiny {
    /// With an output matrix of its own unless `tied`.
    pub fn new(tied: bool) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize], scale: f32, mean: f32| -> Result<()> {
            let len = shape.iter().product();
            let data = random(tensors.len() as u64 + 1, len);
            let data: Vec<f32> = data.into_iter().map(|x| mean + scale * x).collect();
            tensors.insert(name, Tensor::from_vec(data, shape, &Device::Cpu)?);
            Ok(())
        };
        add("token_embd.weight".into(), &[VOCAB, HIDDEN], 1.0, 0.0)?;
        add("output_norm.weight".into(), &[HIDDEN], 0.3, 1.0)?;
        if !tied {
            add("output.weight".into(), &[VOCAB, HIDDEN], 0.3, 0.0)?;
        }
        for layer in 0..LAYERS {
            let mut of = |part: &str, shape: &[usize], scale: f32, mean: f32| {
                add(format!("blk.{layer}.{part}.weight"), shape, scale, mean)
            };
            of("attn_norm", &[HIDDEN], 0.3, 1.0)?;
            of("attn_q", &[HEADS * HEAD_DIM, HIDDEN], 0.4, 0.0)?;
            of("attn_k", &[KV_HEADS * HEAD_DIM, HIDDEN], 0.4, 0.0)?;
            of("attn_v", &[KV_HEADS * HEAD_DIM, HIDDEN], 0.2, 0.0)?;
            of("attn_output", &[HIDDEN, HEADS * HEAD_DIM], 0.2, 0.0)?;
            of("ffn_norm", &[HIDDEN], 0.3, 1.0)?;
            of("ffn_gate", &[INNER, HIDDEN], 0.2, 0.0)?;
            of("ffn_up", &[INNER, HIDDEN], 0.2, 0.0)?;
            of("ffn_down", &[HIDDEN, INNER], 0.2, 0.0)?;
        }
        Ok(Self { tensors })
    }

    /// Adds biases to the projections of attention.
    pub fn with_biases(mut self) -> Result<Self> {
        for layer in 0..LAYERS {
            let width = [("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)];
            for (part, heads) in width {
                let data = random(self.tensors.len() as u64 + 1, heads * HEAD_DIM);
                let bias = Tensor::from_vec(data, heads * HEAD_DIM, &Device::Cpu)?;
                self.tensors.insert(format!("blk.{layer}.{part}.bias"), bias);
            }
        }
        Ok(self)
    }

    /// As a GGUF file, matrices in `dtype`, vectors in f32.
    pub fn gguf(&self, dtype: GgmlDType) -> Result<GgufFile> {
        let mut file = GgufFile { metadata: metadata(), tensors: BTreeMap::new() };
        for (name, tensor) in &self.tensors {
            let tensor = match name {
                _ if name.contains("attn_q.") => interleaved(tensor, HEADS)?,
                _ if name.contains("attn_k.") => interleaved(tensor, KV_HEADS)?,
                _ => tensor.clone(),
            };
            let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
            file.tensors.insert(name.clone(), QTensor::quantize(&tensor, dtype)?);
        }
        Ok(file)
    }

    /// The names and tensors of Hugging Face.
    pub fn hugging_face(&self) -> HashMap<String, Tensor> {
        self.tensors.iter().map(|(name, t)| (hugging_face_name(name), t.clone())).collect()
    }

    /// Writes `config.json` and `model.safetensors` into `folder`.
    pub fn write_folder(&self, folder: &Path) -> Result<()> {
        let tied = !self.tensors.contains_key("output.weight");
        std::fs::write(folder.join("config.json"), config(tied).to_string())?;
        let file = folder.join("model.safetensors");
        Ok(candle_core::safetensors::save(&self.hugging_face(), file)?)
    }
}

/// The rows `i` and `i + HEAD_DIM / 2` of each head side by side, as GGUF files have them.
fn interleaved(x: &Tensor, heads: usize) -> Result<Tensor> {
    let columns = x.elem_count() / (heads * HEAD_DIM);
    let halves = x.reshape((heads, 2, HEAD_DIM / 2, columns))?;
    Ok(halves.transpose(1, 2)?.reshape(x.shape())?)
}

fn hugging_face_name(name: &str) -> String {
    let parts = [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.", "model.layers."),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    match name {
        "output.weight" => "lm_head.weight".into(),
        _ => parts.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to)),
    }
}

/// The `config.json` of these models.
pub fn config(tied: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "rope_scaling": null,
        "hidden_act": "silu",
        "eos_token_id": VOCAB - 1,
        "tie_word_embeddings": tied,
    })
}

/// The tokens of byte-level BPE: a printable character for each byte, three merges, two control
/// tokens.
pub fn tokens() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let mut tokens: Vec<String> = (0u32..256)
        .map(|byte| if printable(byte) { byte } else { others.next().unwrap_or(byte) })
        .filter_map(char::from_u32)
        .map(String::from)
        .collect();
    tokens.extend(["he", "Ġt", "Ġthe", "<|start|>", "<|im_end|>"].map(String::from));
    tokens
}

pub fn strings<S: AsRef<str>>(values: &[S]) -> Value {
    Value::Array(values.iter().map(|s| Value::String(s.as_ref().to_string())).collect())
}

fn metadata() -> BTreeMap<String, Value> {
    let size = |x: usize| Value::U32(x as u32);
    let types = (0..VOCAB).map(|id| Value::I32(if id >= VOCAB - 2 { 3 } else { 1 }));
    let text = |s: &str| Value::String(s.to_string());
    [
        ("general.architecture", text("llama")),
        ("llama.context_length", size(CONTEXT)),
        ("llama.embedding_length", size(HIDDEN)),
        ("llama.feed_forward_length", size(INNER)),
        ("llama.block_count", size(LAYERS)),
        ("llama.attention.head_count", size(HEADS)),
        ("llama.attention.head_count_kv", size(KV_HEADS)),
        ("llama.rope.dimension_count", size(HEAD_DIM)),
        ("llama.rope.freq_base", Value::F32(1000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.vocab_size", size(VOCAB)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.tokens", strings(&tokens())),
        ("tokenizer.ggml.token_type", Value::Array(types.collect())),
        ("tokenizer.ggml.merges", strings(&["h e", "Ġ t", "Ġt he"])),
        ("tokenizer.ggml.bos_token_id", size(VOCAB - 2)),
        ("tokenizer.ggml.eos_token_id", size(VOCAB - 1)),
        (
            "tokenizer.chat_template",
            text("{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"),
        ),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_string(), value))
    .collect()
}

/// What goes into a GGUF file; change it before it is written.
pub struct GgufFile {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl GgufFile {
    pub fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.insert(key.to_string(), value);
        self
    }

    pub fn without(mut self, key: &str) -> Self {
        self.metadata.remove(key).unwrap_or_else(|| panic!("there is no {key} to remove"));
        self
    }

    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join("tiny.gguf");
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
        gguf_file::write(&mut std::fs::File::create(&path)?, &metadata, &tensors)?;
        Ok(path)
    }
}

/// SentencePiece: the best score first, unknown characters as bytes, spaces as `▁`.
pub fn sentence_piece() -> Result<LlamaTokenizer> {
    let mut words: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    words.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let text = ["▁", "a", "b", "c", "ab", "bc", "abc", "▁abc"];
    // "bc" is made before "ab", so "abc" is a + bc.
    let scores = [-20.0, -21.0, -22.0, -23.0, -2.0, -1.0, -3.0, -4.0];
    words.extend(text.map(String::from));
    let score = |id: usize| if id < 259 { 0.0 } else { scores[id - 259] };
    let kind = |id: usize| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    };
    let values = |f: &dyn Fn(usize) -> Value| Value::Array((0..words.len()).map(f).collect());
    let file = Tiny::new(true)?
        .gguf(GgmlDType::F32)?
        .set("tokenizer.ggml.model", Value::String("llama".into()))
        .set("tokenizer.ggml.tokens", strings(&words))
        .set("tokenizer.ggml.scores", values(&|id| Value::F32(score(id))))
        .set("tokenizer.ggml.token_type", values(&|id| Value::I32(kind(id))))
        .set("tokenizer.ggml.bos_token_id", Value::U32(1))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2));
    let folder = tempfile::tempdir()?;
    Ok(LlamaTokenizer::load(file.write(folder.path())?)?)
}
