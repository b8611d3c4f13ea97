//! The models: what int8 changes in them, and every way in which files can be wrong.

mod common;

use candle_core::{DType, Device, Tensor, Var};
use candle_int8_attention::models::{
    BertConfig, BertModel, LayeredModel, ModelFiles, TextEncoder, Weights, WordEmbeddings,
    mean_pool, run_layers,
};
use candle_int8_attention::{AttentionConfig, AttnMask, Error};
use common::randn;
use common::tiny_bert::{TINY_CONFIG, tiny_folder};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

type TestResult = Result<(), Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(name)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    common::largest_difference(a, b) as f32
}

#[test]
fn int8_layers_stay_close_and_switch_one_by_one() -> TestResult {
    let files = ModelFiles::from_dir(shipped("paraphrase-MiniLM-L3-v2"))?;
    let mut encoder = TextEncoder::load(&files, &CPU)?;
    let texts = ["It is a truth universally acknowledged.", "Short."];
    let exact = encoder.embed_sentences(&texts)?;
    encoder.model.attention_mut()[1].set_config(AttentionConfig::int8());
    let one = largest_difference(&exact, &encoder.embed_sentences(&texts)?);
    encoder.model.set_attention(&AttentionConfig::int8());
    let all = largest_difference(&exact, &encoder.embed_sentences(&texts)?);
    assert!(one > 0.0 && all > 0.0 && one < 0.01 && all < 0.02, "{one} {all}");
    Ok(())
}

/// With a variable in the input, a layer is made of Candle's operations: the same numbers, and a
/// gradient.
#[test]
fn gradients_pass_through_a_layer() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    let mut model = BertModel::load(&files, &CPU)?;
    for attention in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        model.set_attention(&attention);
        let layer = &model.layers()[0];
        let hidden = Var::from_tensor(&randn((2, 5, 6)))?;
        let out = layer.forward(&hidden, &AttnMask::None)?;
        let plain = layer.forward(&hidden.detach(), &AttnMask::None)?;
        assert!(largest_difference(&out, &plain) < 1e-4);
        let grads = out.sqr()?.sum_all()?.backward()?;
        let gradient = grads.get(&hidden).ok_or("no gradient")?;
        assert!(largest_difference(gradient, &gradient.zeros_like()?) > 1e-3);
    }
    Ok(())
}

#[test]
fn tensorflow_names_of_layer_norm_load() -> TestResult {
    let ids = Tensor::new(&[[1u32, 5, 10, 0]], &CPU)?;
    let (_folder, files) = tiny_folder("bert.", DType::F32, |_| {})?;
    let (_old_folder, old) = tiny_folder("bert.", DType::F32, |_| {})?;
    let tensors = candle_core::safetensors::load(&files.weights, &CPU)?;
    let rename = |name: String| match name.contains("LayerNorm") {
        true => name.replace(".weight", ".gamma").replace(".bias", ".beta"),
        false => name,
    };
    let renamed: HashMap<_, _> = tensors.into_iter().map(|(name, x)| (rename(name), x)).collect();
    candle_core::safetensors::save(&renamed, &old.weights)?;
    let (new, old) = (BertModel::load(&files, &CPU)?, BertModel::load(&old, &CPU)?);
    assert_eq!(largest_difference(&new.forward(&ids, None)?, &old.forward(&ids, None)?), 0.0);
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_named() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    let model = BertModel::load(&files, &CPU)?;
    let message =
        |ids: &Tensor, mask: Option<&Tensor>| model.forward(ids, mask).unwrap_err().to_string();
    let ids = Tensor::zeros((1, 8), DType::U32, &CPU)?;
    assert!(message(&ids, None).contains("[1, 8]") && message(&ids, None).contains("N <= 7"));
    let ids = Tensor::new(&[[1u32, 11]], &CPU)?;
    assert!(message(&ids, None).contains("input_ids holds 11, expected less than 11"));
    let ids = Tensor::new(&[1u32, 1], &CPU)?;
    assert!(message(&ids, None).contains("[2]"));
    let ids = Tensor::new(&[[1i64, 1]], &CPU)?;
    assert!(message(&ids, None).contains("I64"));
    let ids = Tensor::new(&[[1u32, 1]], &CPU)?;
    let mask = Tensor::new(&[[1u32, 1, 1]], &CPU)?;
    assert!(message(&ids, Some(&mask)).contains("[1, 3]"));
    Ok(())
}

#[test]
fn missing_files_are_named() -> TestResult {
    let folder = tempfile::tempdir()?;
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let error = ModelFiles::from_dir(folder.path()).unwrap_err();
        assert!(matches!(error, Error::MissingFile { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
        std::fs::write(folder.path().join(name), "")?;
    }
    let error = ModelFiles::from_dir(folder.path().join("nowhere")).unwrap_err();
    assert!(error.to_string().contains("model folder not found"), "{error}");
    Ok(())
}

#[test]
fn truncated_and_corrupt_weights_are_told_apart_from_missing_tensors() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    let bytes = std::fs::read(&files.weights)?;
    for len in [0, 4, 100, bytes.len() - 1] {
        std::fs::write(&files.weights, &bytes[..len])?;
        let error = BertModel::load(&files, &CPU).err().unwrap();
        assert!(matches!(error, Error::Corrupt { .. }), "{len}: {error}");
        assert!(error.to_string().contains(&format!("({len} bytes)")), "{error}");
    }
    std::fs::write(&files.weights, "version https://git-lfs.github.com/spec/v1\noid sha256:0")?;
    assert!(BertModel::load(&files, &CPU).err().unwrap().to_string().contains("Git LFS pointer"));
    let mut garbage = bytes.clone();
    garbage[8..40].fill(b'x');
    std::fs::write(&files.weights, garbage)?;
    assert!(matches!(BertModel::load(&files, &CPU), Err(Error::Corrupt { .. })));

    let name = "encoder.layer.0.output.dense.bias";
    let (_folder, files) = tiny_folder("", DType::F32, |tensors| drop(tensors.remove(name)))?;
    let error = BertModel::load(&files, &CPU).err().unwrap();
    assert!(matches!(error, Error::MissingTensor { .. }), "{error}");
    assert!(error.to_string().contains(name), "{error}");

    let (_folder, files) = tiny_folder("", DType::F32, |tensors| {
        tensors.insert(name.into(), Tensor::zeros(6, DType::U32, &CPU).unwrap());
    })?;
    let error = BertModel::load(&files, &CPU).err().unwrap();
    assert!(error.to_string().contains("U32, expected F32, F16, BF16 or F64"), "{error}");
    Ok(())
}

#[test]
fn a_config_that_does_not_fit_the_weights_names_the_tensor() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    std::fs::write(&files.config, TINY_CONFIG.replace("\"vocab_size\": 11", "\"vocab_size\": 12"))?;
    let error = BertModel::load(&files, &CPU).err().unwrap();
    let text = error.to_string();
    assert!(matches!(error, Error::ModelShape { .. }), "{text}");
    assert!(
        text.contains("word_embeddings") && text.contains("[11, 6]") && text.contains("[12, 6]")
    );
    for (from, to, message) in [
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 4", "num_attention_heads 4"),
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 0", "num_attention_heads 0"),
        ("\"gelu\"", "\"swish\"", "swish"),
        ("\"vocab_size\": 11,", "", "vocab_size"),
        ("{", "", "not the configuration of BERT"),
        (
            "\"type_vocab_size\"",
            "\"position_embedding_type\": \"rotary\", \"type_vocab_size\"",
            "rotary",
        ),
    ] {
        std::fs::write(&files.config, TINY_CONFIG.replacen(from, to, 1))?;
        let text = BertConfig::load(&files.config).unwrap_err().to_string();
        assert!(text.contains(message), "{text}");
    }
    for (from, to, message) in [
        ("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 0", "num_hidden_layers 0"),
        ("\"model_type\": \"bert\"", "\"model_type\": \"t5\"", "model_type \"t5\""),
    ] {
        std::fs::write(&files.config, TINY_CONFIG.replacen(from, to, 1))?;
        let text = BertModel::load(&files, &CPU).err().unwrap().to_string();
        assert!(text.contains(message), "{text}");
    }
    std::fs::write(&files.config, [0xff, 0xfe])?;
    assert!(BertConfig::load(&files.config).unwrap_err().to_string().contains("UTF-8"));
    Ok(())
}

#[test]
fn tokenizers_that_do_not_fit_are_named() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    let error = TextEncoder::load(&files, &CPU).err().unwrap().to_string();
    assert!(error.contains("30522 words, but the model embeds 11"), "{error}");
    std::fs::write(&files.tokenizer, "{}")?;
    let error = TextEncoder::load(&files, &CPU).err().unwrap().to_string();
    assert!(error.contains("not a tokenizer"), "{error}");
    Ok(())
}

#[test]
fn long_and_empty_texts() -> TestResult {
    let files = ModelFiles::from_dir(shipped("paraphrase-MiniLM-L3-v2"))?;
    let encoder = TextEncoder::load(&files, &CPU)?;
    let batch = encoder.tokenize(&["word ".repeat(600), String::new()])?;
    assert_eq!(batch.input_ids.dims(), [2, 512]);
    assert_eq!(batch.truncated, [90, 0]);
    assert_eq!((batch.tokens[0].len(), batch.tokens[1].len()), (512, 2));
    assert_eq!(batch.tokens[0].last().map(String::as_str), Some("[SEP]"));
    assert!(encoder.tokenize(&[] as &[&str]).unwrap_err().to_string().contains("no text"));
    Ok(())
}

#[test]
fn mean_pool_leaves_padding_out() -> TestResult {
    let hidden = Tensor::new(&[[[1f32, 2.0], [3.0, 6.0], [100.0, 100.0]]; 2], &CPU)?;
    let mask = Tensor::new(&[[1u32, 1, 0], [0, 0, 0]], &CPU)?;
    assert_eq!(mean_pool(&hidden, &mask)?.to_vec2::<f32>()?, [[2.0, 4.0], [0.0, 0.0]]);
    Ok(())
}

#[test]
fn word_embeddings_look_up_and_attend() -> TestResult {
    let mut glove = WordEmbeddings::load(shipped("glove-6b-50d-top20k"), &CPU)?;
    assert_eq!((glove.len(), glove.dim()), (20_000, 50));
    let words =
        glove.tokenize("The Queen's daughters don't walk, \u{201c}Xyzzyq\u{201d} -- said he.");
    let texts: Vec<&str> = words.iter().map(|w| w.text.as_str()).collect();
    let expected = [
        "the",
        "queen",
        "'s",
        "daughters",
        "do",
        "n't",
        "walk",
        ",",
        "\u{201c}",
        "xyzzyq",
        "\u{201d}",
        "--",
        "said",
        "he",
        ".",
    ];
    assert_eq!(texts, expected);
    assert_eq!(glove.tokenize("Mr. Bennet")[0].text, "mr.");
    assert_eq!(words[0].id, Some(0));
    assert_eq!(words[9].id, None);
    let ids: Vec<u32> = words.iter().filter_map(|w| w.id).collect();
    let x = glove.lookup(&ids)?;
    assert_eq!(x.dims(), [ids.len(), 50]);
    let int8 = run_layers(&glove, &ids, &mut |_, _| Ok(()))?;
    glove.attention.set_config(AttentionConfig::fp32());
    let exact = run_layers(&glove, &ids, &mut |_, _| Ok(()))?;
    assert_eq!(exact.dims(), [1, ids.len(), 50]);
    let difference = largest_difference(&exact, &int8);
    assert!(difference > 0.0 && difference < 0.05, "{difference}");
    assert!(glove.lookup(&[20_000]).unwrap_err().to_string().contains("20000"));
    assert_eq!(glove.lookup(&[])?.dims(), [0, 50]);
    Ok(())
}

#[test]
fn word_embedding_files_that_do_not_fit_are_named() -> TestResult {
    let folder = tempfile::tempdir()?;
    let load = || WordEmbeddings::load(folder.path(), &CPU).err().unwrap().to_string();
    assert!(load().contains("vocabulary not found"), "{}", load());
    std::fs::write(folder.path().join("vocab.txt"), "a\nb\n")?;
    assert!(load().contains("weights not found"), "{}", load());
    let path = folder.path().join("model.safetensors");
    let save = |shape: &[usize]| {
        let table = Tensor::zeros(shape, DType::F32, &CPU).unwrap();
        candle_core::safetensors::save(&[("embedding.weight", table)].into(), &path).unwrap();
    };
    save(&[3, 4]);
    assert!(load().contains("2 lines for 3 word vectors"), "{}", load());
    save(&[2, 2, 2]);
    assert!(load().contains("[2, 2, 2]"), "{}", load());
    assert!(Weights::open(folder.path().join("vocab.txt")).is_err());
    Ok(())
}

#[test]
fn a_text_has_the_same_embedding_alone_and_beside_longer_ones() -> TestResult {
    let files = ModelFiles::from_dir(shipped("paraphrase-MiniLM-L3-v2"))?;
    let mut encoder = TextEncoder::load(&files, &CPU)?;
    let long = "It is a truth universally acknowledged, that a single man in possession of a good \
                fortune, must be in want of a wife. ";
    let texts = ["hello world", &long.repeat(4), "Short.", &long.repeat(2)];
    for config in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        encoder.model.set_attention(&config);
        let bits = |texts: &[&str]| -> Result<Vec<Vec<u32>>, Box<dyn std::error::Error>> {
            let rows = encoder.embed_sentences(texts)?.to_vec2::<f32>()?;
            Ok(rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect())
        };
        let together = bits(&texts)?;
        for (text, together) in texts.iter().zip(&together) {
            assert!(bits(&[text])?[0] == *together, "{:.20}: {:?}", text, config.backend);
        }
        let turned: Vec<&str> = texts.iter().rev().copied().collect();
        let reversed: Vec<_> = bits(&turned)?.into_iter().rev().collect();
        assert!(reversed == together, "{:?}", config.backend);
    }
    Ok(())
}
