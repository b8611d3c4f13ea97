//! GGUF files: sizes that no weights bear out, tokens that take for ever, and one file for several
//! threads.

use super::corrupt;
use super::tiny::{GgufFile, Tiny, VOCAB, strings, tokens};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};
use candle_int8_attention::Error;
use candle_int8_attention::models::llama::{
    Gguf, LlamaModel, LlamaTokenizer, RopeScaling, WeightFormat,
};
use std::path::Path;
use std::time::{Duration, Instant};

fn file() -> Result<GgufFile> {
    Tiny::new(false)?.gguf(GgmlDType::F32)
}

fn load(path: &Path) -> Result<LlamaModel, Error> {
    LlamaModel::load(path, WeightFormat::Auto, &Device::Cpu)
}

fn logits(model: &LlamaModel) -> Result<Vec<f32>> {
    let mut cache = model.new_cache(1, 16)?;
    let ids = Tensor::new(&[[3u32, 1, 4, 1, 5, 9, 2, 6]], &Device::Cpu)?;
    Ok(model.forward(&ids, &mut cache)?.flatten_all()?.to_vec1()?)
}

#[test]
fn an_alignment_at_which_nothing_can_lie_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (value, says) in [
        (Value::U32(0), "general.alignment 0, expected a power of two"),
        (Value::U8(0), "general.alignment 0"),
        (Value::I32(0), "general.alignment 0"),
        (Value::U32(33), "general.alignment 33"),
        (Value::I32(-32), "general.alignment 4294967264"),
        (Value::U64(0), "of type 10, expected U32"),
        (Value::Bool(false), "of type 7, expected U32"),
        (strings(&["32"]), "of type 9, expected U32"),
    ] {
        let path = file()?.set("general.alignment", value).write(folder.path())?;
        let problem = corrupt(&path, Gguf::open(&path));
        assert!(problem.contains(says), "{problem}");
    }
    let path = file()?.set("general.alignment", Value::U32(32)).write(folder.path())?;
    load(&path)?;
    Ok(())
}

/// Terabytes were allocated for the frequencies of rotary embeddings before any weight was looked
/// at, and a product of sizes that wraps around to that of a weight would have passed.
#[test]
fn sizes_that_the_weights_do_not_have_are_errors_before_anything_is_allocated() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let keys = [
        "llama.attention.key_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
    ];
    for key in keys {
        for power in [20, 40, 60, 61, 62, 63] {
            let mut file = file()?.set(key, Value::U64(1 << power));
            file.metadata.remove("llama.rope.dimension_count");
            let path = file.write(folder.path())?;
            let start = Instant::now();
            let error = match load(&path) {
                Ok(_) => panic!("{key} of 2^{power} was loaded"),
                Err(error) => error.to_string(),
            };
            assert!(start.elapsed() < Duration::from_secs(2), "{key} of 2^{power}: {error}");
        }
    }
    // Two sizes whose product is that of the weights, but for a factor of 2^64.
    let mut file = file()?.set("llama.attention.key_length", Value::U64((1 << 62) + 16));
    file.metadata.remove("llama.rope.dimension_count");
    assert!(load(&file.write(folder.path())?).is_err());
    Ok(())
}

#[test]
fn a_context_of_any_length_takes_no_memory_before_its_tokens() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for context in [1 << 40, u64::MAX] {
        let path = file()?.set("llama.context_length", Value::U64(context)).write(folder.path())?;
        let model = load(&path)?;
        let context = model.config().max_position_embeddings;
        model.new_cache(1, context)?;
    }
    Ok(())
}

/// A SentencePiece token of 320 kB took 15 s.
#[test]
fn a_token_longer_than_any_is_an_error_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for model in ["gpt2", "llama"] {
        let mut words = tokens();
        words[7] = "a".repeat(320_000);
        let scores = Value::Array(vec![Value::F32(0.0); VOCAB]);
        let path = file()?
            .set("tokenizer.ggml.model", Value::String(model.into()))
            .set("tokenizer.ggml.tokens", strings(&words))
            .set("tokenizer.ggml.scores", scores)
            .write(folder.path())?;
        let start = Instant::now();
        let problem = corrupt(&path, LlamaTokenizer::load(&path));
        assert!(problem.contains("token 7 of 320000 bytes, expected at most 512"), "{problem}");
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    Ok(())
}

#[test]
fn a_special_token_beyond_the_vocabulary_is_an_error_and_not_cut_to_32_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"] {
        let key = format!("tokenizer.ggml.{name}");
        for id in [VOCAB as u64, 1 << 32, (1 << 32) + 3, u64::MAX] {
            let path = file()?.set(&key, Value::U64(id)).write(folder.path())?;
            let problem = corrupt(&path, LlamaTokenizer::load(&path));
            assert!(
                problem.contains(&format!("{name} is {id}, expected less than 261")),
                "{problem}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_token_key_or_tensor_that_is_there_twice_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut words = tokens();
    words[9] = words[5].clone();
    let path = file()?.set("tokenizer.ggml.tokens", strings(&words)).write(folder.path())?;
    let problem = corrupt(&path, LlamaTokenizer::load(&path));
    assert!(problem.contains("tokens 5 and 9 are both"), "{problem}");

    // Names of one length, so that the file stays whole.
    let path = file()?.write(folder.path())?;
    let bytes = std::fs::read(&path)?;
    for (from, to, says) in [
        ("blk.1.ffn_up.weight", "blk.0.ffn_up.weight", "tensor \"blk.0.ffn_up.weight\""),
        ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "metadata key"),
    ] {
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        let twice = [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat();
        std::fs::write(&path, twice)?;
        let problem = corrupt(&path, Gguf::open(&path));
        assert!(problem.contains(says) && problem.contains("is there twice"), "{problem}");
    }
    Ok(())
}

/// Each byte of an array becomes a value of 24 bytes or more.
#[test]
fn an_array_of_more_elements_than_any_vocabulary_is_an_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("large.gguf");
    let mut bytes = b"GGUF\x02\0\0\0".to_vec();
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(5u64.to_le_bytes());
    bytes.extend(b"large");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    bytes.extend((20u64 << 20).to_le_bytes());
    bytes.resize(bytes.len() + (20 << 20), 0);
    std::fs::write(&path, bytes)?;
    let problem = corrupt(&path, Gguf::open(&path));
    assert!(problem.contains("arrays of more than 16777216 elements"), "{problem}");
    Ok(())
}

/// With one position for all readers of a file, threads got each other's weights, without an error.
#[test]
fn threads_that_load_from_one_file_get_its_weights() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file()?.write(folder.path())?;
    let file = Gguf::open(&path)?;
    let expected = logits(&load(&path)?)?;
    let load = || -> Result<Vec<f32>> {
        logits(&LlamaModel::from_gguf(&file, WeightFormat::Auto, &Device::Cpu)?)
    };
    for _ in 0..5 {
        let found: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().expect("a thread")).collect()
        });
        for found in found {
            assert!(found? == expected);
        }
    }
    Ok(())
}

#[test]
fn linear_scaling_is_applied_under_either_key_and_without_its_type() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let text = |kind: &str| Value::String(kind.into());
    let scaling = |file: GgufFile| -> Result<RopeScaling> {
        Ok(Gguf::open(file.write(folder.path())?)?.llama_config()?.rope.scaling)
    };
    let (kind, factor) = ("llama.rope.scaling.type", "llama.rope.scaling.factor");
    let old = "llama.rope.scale_linear";
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(scaling(file()?.set(factor, Value::F32(4.0)))?, linear);
    assert_eq!(scaling(file()?.set(old, Value::F32(4.0)))?, linear);
    assert_eq!(scaling(file()?.set(kind, text("linear")).set(old, Value::F32(4.0)))?, linear);
    let both = file()?.set(factor, Value::F32(4.0)).set(old, Value::F32(8.0));
    assert_eq!(scaling(both)?, linear);
    // What says that there is none.
    assert_eq!(scaling(file()?.set(factor, Value::F32(0.0)))?, RopeScaling::None);
    let none = file()?.set(kind, text("none")).set(factor, Value::F32(4.0));
    assert_eq!(scaling(none)?, RopeScaling::None);
    let path = file()?.set(kind, text("linear")).write(folder.path())?;
    let problem = corrupt(&path, Gguf::open(&path)?.llama_config());
    assert!(problem.contains(factor), "{problem}");
    // It is computed with.
    let (plain, scaled) = (file()?, file()?.set(factor, Value::F32(4.0)));
    let plain = logits(&load(&plain.write(folder.path())?)?)?;
    assert!(logits(&load(&scaled.write(folder.path())?)?)? != plain);
    Ok(())
}
