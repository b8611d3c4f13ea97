//! `tokenizer.json`: cut anywhere, and with contents on which the tokenizers crate panics.

use super::corrupt;
use anyhow::Result;
use candle_core::Device;
use candle_int8_attention::models::llama::LlamaTokenizer;
use candle_int8_attention::models::{ModelFiles, TextEncoder};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

pub fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paraphrase-MiniLM-L3-v2/tokenizer.json")
}

/// The error of this content as the tokenizer of a folder.
fn error_of(content: &[u8]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, content)?;
    Ok(corrupt(&path, LlamaTokenizer::load(folder.path())))
}

/// A tokenizer of byte pairs that works.
pub fn byte_pairs() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "vocab": {"<s>": 0, "a": 1, "##b": 2, "ab": 3, "é": 4},
            "merges": ["a ##b"],
            "continuing_subword_prefix": "##",
        },
    })
}

/// One of word pieces, with every other part that encoders have.
pub fn word_pieces() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [
            {"id": 0, "content": "[PAD]", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true},
            {"id": 1, "content": "[CLS]", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true},
        ],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": ["[CLS]"]}},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[PAD]": 0, "[CLS]": 1, "[UNK]": 2, "a": 3, "##b": 4, "hello": 5}},
    })
}

#[test]
fn a_tokenizer_that_is_whole_loads() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("tokenizer.json"), byte_pairs().to_string())?;
    assert_eq!(LlamaTokenizer::load(folder.path())?.encode("ab", true)?, [0, 3]);
    Ok(())
}

/// Among the first 6,000 cuts of the bundled file, those inside of its decoder made its reader
/// panic.
#[test]
fn every_cut_of_a_tokenizer_is_an_error_of_its_file() -> Result<()> {
    let whole = std::fs::read(bundled())?;
    let small = byte_pairs().to_string().into_bytes();
    let cuts = (0..6000).map(|len| &whole[..len]);
    let near_the_end = (whole.len() - 200..whole.len()).step_by(10).map(|len| &whole[..len]);
    let of_small = (0..small.len()).map(|len| &small[..len]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    for cut in cuts.chain(near_the_end).chain(of_small) {
        std::fs::write(&path, cut)?;
        let problem = corrupt(&path, LlamaTokenizer::load(folder.path()));
        assert!(problem.contains("not a tokenizer"), "{problem}");
    }
    Ok(())
}

#[test]
fn a_cut_tokenizer_of_an_encoder_is_an_error_of_its_file() -> Result<()> {
    let whole = std::fs::read(bundled())?;
    let decoder = whole.windows(9).position(|w| w == b"\"decoder\"").expect("it has a decoder");
    let folder = tempfile::tempdir()?;
    let files = ModelFiles::from_dir(bundled().parent().expect("a folder"))?;
    let files = ModelFiles { tokenizer: folder.path().join("tokenizer.json"), ..files };
    for len in [0, 1, decoder + 12, decoder + 30, whole.len() - 1] {
        std::fs::write(&files.tokenizer, &whole[..len])?;
        corrupt(&files.tokenizer, TextEncoder::load(&files, &Device::Cpu));
    }
    Ok(())
}

#[test]
fn a_decoder_that_is_no_json_value_is_an_error() -> Result<()> {
    let text =
        byte_pairs().to_string().replace(r#""decoder":{"type":"Fuse"}"#, r#""decoder":1e999"#);
    assert!(text.contains("1e999"));
    assert!(error_of(text.as_bytes())?.contains("number out of range"));
    Ok(())
}

#[test]
fn a_prefix_that_a_merged_token_does_not_have_is_an_error() -> Result<()> {
    let longer = "##########";
    for (prefix, merges) in [
        (longer, json!(["a ##b"])),
        (longer, json!([["a", "##b"]])),
        // It would cut a character in two.
        ("#", json!([["a", "é"]])),
        ("##", json!(["a a"])),
    ] {
        let mut file = byte_pairs();
        file["model"]["continuing_subword_prefix"] = prefix.into();
        file["model"]["merges"] = merges;
        let problem = error_of(file.to_string().as_bytes())?;
        assert!(problem.contains("continuing_subword_prefix"), "{problem}");
    }
    Ok(())
}

#[test]
fn a_merge_to_a_token_longer_than_all_others_is_an_error() -> Result<()> {
    for merge in [json!("a é"), json!(["a", "é"])] {
        let mut file = byte_pairs();
        file["model"]["continuing_subword_prefix"] = Value::Null;
        file["model"]["vocab"] = json!({"<s>": 0, "a": 1, "é": 2});
        file["model"]["merges"] = json!([merge]);
        // As long as another, it has room, and is no token.
        let problem = error_of(file.to_string().as_bytes())?;
        assert!(problem.contains("aé") && !problem.contains("panicked"), "{problem}");
        file["model"]["vocab"] = json!({"a": 1, "é": 2});
        let problem = error_of(file.to_string().as_bytes())?;
        let says = "a token of 3 bytes, but the longest of the vocabulary has 2";
        assert!(problem.contains(says), "{problem}");
    }
    Ok(())
}

#[test]
fn a_template_with_what_it_does_not_define_is_an_error() -> Result<()> {
    let token = json!({"SpecialToken": {"id": "[NONE]", "type_id": 0}});
    let second = json!({"Sequence": {"id": "B", "type_id": 0}});
    for (template, piece, says) in [
        ("single", &token, "names \"[NONE]\""),
        ("pair", &token, "names \"[NONE]\""),
        // A text alone has no second one.
        ("single", &second, "names text \"B\""),
    ] {
        let mut file = byte_pairs();
        file["post_processor"][template] = json!([piece]);
        let problem = error_of(file.to_string().as_bytes())?;
        assert!(problem.contains(says), "{problem}");
        // Also inside of others.
        let inner = file["post_processor"].take();
        file["post_processor"] = json!({"type": "Sequence", "processors": [inner]});
        let problem = error_of(file.to_string().as_bytes())?;
        assert!(problem.contains(says), "{problem}");
    }
    let mut file = byte_pairs();
    file["post_processor"]["special_tokens"]["<s>"]["ids"] = json!([0, 0, 0]);
    let problem = error_of(file.to_string().as_bytes())?;
    assert!(problem.contains("another number of ids and tokens"), "{problem}");
    Ok(())
}
