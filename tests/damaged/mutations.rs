//! Files with random damage: each either is an error, or loads into something that works.
//!
//! The damage is the same with every run. `CANDLE_INT8_FUZZ_SEED` chooses another, and
//! `CANDLE_INT8_FUZZ_ROUNDS` how many times as many files are tried.

use super::results::{recorder, sound, state, words};
use super::tiny::{self, Tiny};
use super::tiny_encoders::{FAMILIES, HIDDEN, TinyEncoder};
use super::{caches, numbers, tokenizer_files};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::attention::{AttentionCall, Backend};
use candle_int8_attention::drift::{Gate, Recorder};
use candle_int8_attention::models::llama::{LlamaModel, LlamaTokenizer, WeightFormat};
use candle_int8_attention::models::{
    BertConfig, Calibration, CalibrationConfig, Calibrator, LayerSettings, SequenceClassifier,
    StaticScales, TextEncoder, Weights,
};
use candle_int8_attention::nn::{Linear, Precision, load_linear, save_linear};
use candle_int8_attention::quant::{CodeStorage, QuantConfig, QuantizedTensor};
use candle_int8_attention::{AttentionConfig, Int8KvCache, KeySmoothing, KvCacheConfig};
use serde_json::json;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// No file of these sizes takes as long, whatever is in it.
const SLOW: Duration = Duration::from_secs(10);

/// A number of the environment.
fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

const BYTES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'-', b'"', b'{', b'[', b' '];
const WORDS: [u64; 10] = [
    0,
    1,
    255,
    1 << 16,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
    u64::MAX - 15,
];
const TEXTS: [&str; 16] = [
    "0",
    "-1",
    "1",
    "2",
    "65536",
    "4294967296",
    "9223372036854775807",
    "18446744073709551600",
    "1e308",
    "1e999",
    "-1e-320",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
];

/// Damages a file in one to four places.
fn damage(bytes: &mut Vec<u8>, random: &mut Random, text: std::ops::Range<usize>) {
    for _ in 0..1 + random.below(4) {
        if bytes.is_empty() {
            return;
        }
        // Half of the damage goes to the part that says what the rest is.
        let part = match random.below(2) {
            0 => text.start.min(bytes.len() - 1)..text.end.clamp(1, bytes.len()),
            _ => 0..bytes.len(),
        };
        let at = part.start + random.below(part.len());
        let len = 1 + random.below(16.min(bytes.len() - at));
        match random.below(9) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.of(&BYTES),
            2 => drop(bytes.drain(at..at + len)),
            3 => bytes.truncate(at),
            4 => {
                let copy = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let word = random.of(&WORDS).to_le_bytes();
                let width = random.of(&[1, 2, 4, 8]).min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&word[..width]);
            }
            6 => {
                let to = part.start + random.below(part.len());
                let copy = bytes[at..at + len].to_vec();
                let end = (to + len).min(bytes.len());
                bytes[to..end].copy_from_slice(&copy[..end - to]);
            }
            _ => replace_number(bytes, random, at),
        }
    }
}

/// Writes something else in the place of the number in a text that follows `at`.
fn replace_number(bytes: &mut Vec<u8>, random: &mut Random, at: usize) {
    let is_part = |b: &u8| b.is_ascii_digit() || b".-+eE".contains(b);
    let Some(start) = bytes[at..].iter().position(u8::is_ascii_digit).map(|i| at + i) else {
        return;
    };
    let end = bytes[start..].iter().position(|b| !is_part(b)).map_or(bytes.len(), |i| start + i);
    bytes.splice(start..end, random.of(&TEXTS).bytes());
}

/// Loads damaged copies of `whole`, whose `header` says what the rest is.
fn try_all(
    format: &str,
    rounds: u64,
    name: &str,
    (whole, header): (&[u8], std::ops::Range<usize>),
    use_it: impl Fn(&Path, &Path) -> Result<()>,
) -> Result<()> {
    let seed: u64 = setting("CANDLE_INT8_FUZZ_SEED", 1);
    let rounds = (rounds as f64 * setting("CANDLE_INT8_FUZZ_ROUNDS", 1.0)).ceil() as u64;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(name);
    std::fs::create_dir_all(path.parent().expect("a folder"))?;
    eprintln!("{format}: {rounds} files, CANDLE_INT8_FUZZ_SEED={seed}, in {}", path.display());
    std::fs::write(&path, whole)?;
    use_it(&path, folder.path())?;
    let mut loaded = 0;
    for round in 0..rounds {
        let mut random = Random(seed ^ round.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let mut bytes = whole.to_vec();
        damage(&mut bytes, &mut random, header.clone());
        std::fs::write(&path, &bytes)?;
        let start = Instant::now();
        let used = catch_unwind(AssertUnwindSafe(|| use_it(&path, folder.path())));
        let place = format!("{format}, seed {seed}, round {round}");
        assert!(start.elapsed() < SLOW, "{place} took {:?}", start.elapsed());
        match used {
            Ok(Ok(())) => loaded += 1,
            Ok(Err(_)) => {}
            Err(panic) => {
                let kept = folder.keep().join(name);
                eprintln!("{place} panicked; the file is {}", kept.display());
                std::panic::resume_unwind(panic);
            }
        }
    }
    eprintln!("{format}: {loaded} of {rounds} loaded");
    Ok(())
}

/// The header of a safetensors file: its length, and JSON.
fn header(bytes: &[u8]) -> std::ops::Range<usize> {
    let length = bytes[..8].try_into().map_or(0, u64::from_le_bytes);
    0..8 + length as usize
}

#[test]
fn caches_with_random_damage() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let configs = [
        KvCacheConfig::default(),
        KvCacheConfig { window: Some(40), sinks: 3, ..KvCacheConfig::int8_values() },
        KvCacheConfig {
            recent: 9,
            key_smoothing: KeySmoothing::FirstTokens(5),
            ..Default::default()
        },
    ];
    for config in configs {
        let whole = caches::bytes(config, folder.path())?;
        let q = Tensor::from_vec(numbers(4 * 3 * 16, 5), (1, 4, 3, 16), &Device::Cpu)?;
        let k = Tensor::from_vec(numbers(2 * 70 * 16, 6), (1, 2, 70, 16), &Device::Cpu)?;
        try_all("cache", 400, "cache", (&whole, header(&whole)), |path, folder| {
            let mut cache = Int8KvCache::load(path)?;
            // What loads is what is saved again.
            let again = folder.join("again");
            cache.save(&again)?;
            assert_eq!(Int8KvCache::load(&again)?.lens(), cache.lens());
            cache.attention(&q, AttentionCall::causal(), &AttentionConfig::int8()).ok();
            cache.append(&k, &k).ok();
            cache.attention(&q, AttentionCall::causal(), &AttentionConfig::int8()).ok();
            cache.truncate(100).ok();
            cache.memory_bytes();
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn gguf_files_with_random_damage() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for dtype in [GgmlDType::F32, GgmlDType::Q8_0, GgmlDType::Q4_1] {
        let whole = std::fs::read(Tiny::new(false)?.gguf(dtype)?.write(folder.path())?)?;
        // Metadata, and the names and shapes of tensors.
        let header = 0..12_000;
        try_all("GGUF", 150, "model.gguf", (&whole, header), |path, _| {
            if let Ok(tokenizer) = LlamaTokenizer::load(path) {
                let ids = tokenizer.encode("the <|start|> é", true)?;
                tokenizer.decode(&ids)?;
            }
            let model = LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu)?;
            let mut cache = model.new_cache(1, model.config().max_position_embeddings.min(8))?;
            model.forward(&Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?, &mut cache)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn folders_with_random_damage() -> Result<()> {
    let load = |path: &Path, folder: &Path| -> Result<()> {
        let tiny = Tiny::new(true)?;
        if path.ends_with("config.json") {
            candle_core::safetensors::save(&tiny.hugging_face(), folder.join("model.safetensors"))?;
        } else {
            std::fs::write(folder.join("config.json"), tiny::config(true).to_string())?;
        }
        let model = LlamaModel::load(folder, WeightFormat::Auto, &Device::Cpu)?;
        let mut cache = model.new_cache(1, model.config().max_position_embeddings.min(8))?;
        model.forward(&Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?, &mut cache)?;
        Ok(())
    };
    let config = tiny::config(true).to_string().into_bytes();
    try_all("config.json", 200, "config.json", (&config, 0..config.len()), load)?;
    let folder = tempfile::tempdir()?;
    Tiny::new(true)?.write_folder(folder.path())?;
    let weights = std::fs::read(folder.path().join("model.safetensors"))?;
    try_all("safetensors", 150, "model.safetensors", (&weights, header(&weights)), load)
}

#[test]
fn encoder_files_with_random_damage() -> Result<()> {
    let bundled = tokenizer_files::bundled();
    let config = std::fs::read(bundled.with_file_name("config.json"))?;
    try_all(
        "encoder's config.json",
        2000,
        "config.json",
        (&config, 0..config.len()),
        |path, _| {
            BertConfig::load(path)?;
            Ok(())
        },
    )?;
    let tensors = HashMap::from([
        ("a".to_string(), Tensor::ones((3, 4), DType::F32, &Device::Cpu)?),
        ("b".to_string(), Tensor::ones(7, DType::F16, &Device::Cpu)?),
    ]);
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("weights");
    candle_core::safetensors::save(&tensors, &file)?;
    let whole = std::fs::read(&file)?;
    try_all("weights", 2000, "weights", (&whole, header(&whole)), |path, _| {
        let weights = Weights::open(path)?;
        let shape = weights.shape("b")?;
        weights.get("b", &shape, &Device::Cpu)?;
        weights.get("a", &[3, 4], &Device::Cpu)?;
        Ok(())
    })?;
    let index = json!({"metadata": {}, "weight_map": {"a": "weights", "b": "weights"}});
    let (index, name) = (index.to_string().into_bytes(), "model.safetensors.index.json");
    try_all("weights index", 1000, name, (&index, 0..index.len()), |path, folder| {
        std::fs::write(folder.join("weights"), &whole)?;
        Weights::open(path)?.get("a", &[3, 4], &Device::Cpu)?;
        Ok(())
    })
}

/// What is beside an encoder, and its configuration and head, in a folder that is whole otherwise.
#[test]
fn folders_of_encoders_with_random_damage() -> Result<()> {
    let modules = json!([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]);
    let dense = json!({"in_features": HIDDEN, "out_features": 6, "bias": false,
        "activation_function": "torch.nn.modules.activation.Tanh"});
    let prompts = json!({"prompts": {"query": "query : "}, "default_prompt_name": "query"});
    let text = json!({"max_seq_length": 9, "do_lower_case": true});
    let files = [
        ("modules.json", modules),
        ("config_sentence_transformers.json", prompts),
        ("sentence_bert_config.json", text),
        ("1_Pooling/config.json", json!({"pooling_mode": "cls", "include_prompt": true})),
        ("2_Dense/config.json", dense),
    ];
    for family in FAMILIES {
        let tiny = TinyEncoder::new(family, TinyEncoder::own_prefix(family)).with_head(2);
        let config = ("config.json", tiny.config.clone());
        for (name, whole) in files.iter().chain([&config]) {
            if family != "bert" && *name != "config.json" {
                continue;
            }
            let whole = whole.to_string().into_bytes();
            let kind = format!("{family}'s {name}");
            try_all(&kind, 300, name, (&whole, 0..whole.len()), |path, folder| {
                let damaged = std::fs::read(path)?;
                for (name, whole) in &files {
                    let path = folder.join(name);
                    std::fs::create_dir_all(path.parent().expect("a folder"))?;
                    std::fs::write(path, whole.to_string())?;
                }
                let weight = Tensor::from_vec(numbers(6 * HIDDEN, 3), (6, HIDDEN), &Device::Cpu)?;
                let weights = HashMap::from([("linear.weight", weight)]);
                candle_core::safetensors::save(&weights, folder.join("2_Dense/model.safetensors"))?;
                let files = tiny.write(folder).map_err(|e| anyhow::anyhow!("{e}"))?;
                std::fs::write(path, damaged)?;
                let encoder = TextEncoder::load(&files, &Device::Cpu)?;
                encoder.embed_sentences(&["the sea is wide", "a storm"])?;
                let head = SequenceClassifier::load(&files, &Device::Cpu)?;
                head.scores(&head.tokenize_pairs(&[("the sea", "a storm")])?)?;
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn tokenizers_with_random_damage() -> Result<()> {
    for whole in [tokenizer_files::byte_pairs(), tokenizer_files::word_pieces()] {
        let whole = whole.to_string().into_bytes();
        let all = (&whole[..], 0..whole.len());
        try_all("tokenizer.json", 3000, "tokenizer.json", all, |_, folder| {
            let tokenizer = LlamaTokenizer::load(folder)?;
            let ids = tokenizer.encode("ab a é \u{1d11e} Hello", true)?;
            tokenizer.decode(&ids)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn settings_with_random_damage() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = LlamaModel::load(
        Tiny::new(true)?.gguf(GgmlDType::F32)?.write(folder.path())?,
        WeightFormat::Auto,
        &Device::Cpu,
    )?;
    let ids = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
    let run = |model: &LlamaModel| {
        let mut cache = model.new_cache(1, 8)?;
        model.forward(&ids, &mut cache)
    };

    let mut calibrator = Calibrator::new(CalibrationConfig::default())?;
    for layer in 0..tiny::LAYERS {
        let side = |heads: usize| {
            let (tokens, depth) = (9, tiny::HEAD_DIM);
            let data = numbers(heads * tokens * depth, layer);
            Tensor::from_vec(data, (1, heads, tokens, depth), &Device::Cpu)
        };
        calibrator.observe(layer, &side(tiny::HEADS)?, &side(tiny::KV_HEADS)?)?;
    }
    let file = folder.path().join("calibration");
    calibrator.finish()?.save(&file)?;
    let whole = std::fs::read(&file)?;
    try_all("calibration", 2000, "calibration", (&whole, 0..whole.len()), |path, _| {
        let calibration = Calibration::load(path)?;
        let mut model = model.clone();
        calibration.apply(&mut model, StaticScales::PerHead)?;
        run(&model)?;
        Ok(())
    })?;

    let settings = vec![Backend::default(); tiny::LAYERS];
    let file = folder.path().join("settings");
    LayerSettings::new(settings).save(&file)?;
    let whole = std::fs::read(&file)?;
    try_all("layer settings", 2000, "settings", (&whole, 0..whole.len()), |path, _| {
        let settings = LayerSettings::load(path)?;
        let mut model = model.clone();
        settings.apply(&mut model)?;
        run(&model)?;
        Ok(())
    })
}

#[test]
fn quantized_tensors_with_random_damage() -> Result<()> {
    let x = Tensor::from_vec(numbers(2 * 3 * 5 * 8, 1), (2, 3, 5, 8), &Device::Cpu)?;
    let quantized = QuantizedTensor::quantize(&x, &QuantConfig::default())?;
    for storage in [CodeStorage::I8, CodeStorage::U8] {
        let whole = quantized.to_safetensors(storage)?;
        try_all("quantized tensor", 3000, "tensor", (&whole, header(&whole)), |path, _| {
            let tensor = QuantizedTensor::load(path)?;
            tensor.dequantize(&Device::Cpu)?;
            tensor.to_u8_tensor(&Device::Cpu)?;
            tensor.to_safetensors(CodeStorage::I8)?;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn packed_layers_with_random_damage() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("layers");
    let layer = |precision, (outputs, inputs): (usize, usize)| -> Result<Linear> {
        let weights =
            Tensor::from_vec(numbers(outputs * inputs, 1), (outputs, inputs), &Device::Cpu)?;
        Ok(Linear::new(&weights, None, precision)?)
    };
    let layers = [
        ("int8", layer(Precision::Int8, (70, 33))?),
        ("int16", layer(Precision::Int16, (3, 65))?),
        ("f32", layer(Precision::F32, (3, 5))?),
    ];
    save_linear(&file, layers.iter().map(|(name, layer)| (*name, layer)))?;
    let whole = std::fs::read(&file)?;
    try_all("packed layers", 3000, "layers", (&whole, header(&whole)), |path, folder| {
        let layers = load_linear(path)?;
        // What loads is what is saved again.
        let again = folder.join("again");
        save_linear(&again, layers.iter().map(|(name, layer)| (name.as_str(), layer)))?;
        let others = load_linear(&again)?;
        for (name, layer) in &layers {
            let (outputs, inputs) = layer.shape();
            let x = Tensor::from_vec(numbers(3 * inputs, 2), (3, inputs), &Device::Cpu)?;
            let bits = |layer: &Linear| -> Result<Vec<u32>> {
                let y = layer.forward(&x)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(y.into_iter().map(f32::to_bits).collect())
            };
            let found = bits(layer)?;
            assert_eq!(found.len(), 3 * outputs, "{name}");
            // After another call, whose rows are longer.
            layers.values().for_each(|layer| drop(bits(layer)));
            assert_eq!(found, bits(layer)?, "{name}");
            assert_eq!(found, bits(&others[name])?, "{name}");
        }
        Ok(())
    })
}

#[test]
fn gates_with_random_damage() -> Result<()> {
    let report = serde_json::from_value::<Recorder>(state()?)?.report();
    let whole = b"min_layer_sqnr_db = 44.0\nmax_head_kl = 1e-3\nmin_embedding_cosine = 0.9\n";
    try_all("gate", 3000, "gate.toml", (whole, 0..whole.len()), |path, _| {
        for violation in Gate::load(path)?.violations(&report) {
            let _ = violation.to_string();
        }
        Ok(())
    })
}

#[test]
fn shard_results_with_random_damage() -> Result<()> {
    let whole = state()?.to_string().into_bytes();
    let mut other = recorder()?;
    other.record(&sound(), &9, &words(), 9)?;
    try_all("shard results", 400, "shard.json", (&whole, 0..whole.len()), |path, _| {
        let read: Recorder = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        for (a, b) in [(&other, &read), (&read, &other), (&read, &read)] {
            let mut merged = a.clone();
            if merged.merge(b).is_ok() {
                let report = merged.report();
                report.to_text();
                report.to_html()?;
            }
        }
        Ok(())
    })
}
