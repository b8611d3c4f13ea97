//! The examples `word_embeddings` and `sentence_similarity`, and flags that all examples have.

use super::start::{assert_narrow, fail, json, leave_early, succeed};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;

/// A file in a folder of its own, which goes away with the first of the pair.
fn file(content: &[u8]) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("input.txt");
    std::fs::File::create(&path).unwrap().write_all(content).unwrap();
    let path = path.to_str().unwrap().to_string();
    (folder, path)
}

/// Enough tokens to tell configurations apart, few enough for a build without optimization.
const SENTENCE: &str = "It is a truth universally acknowledged, that a single man in possession of \
    a good fortune, must be in want of a wife. However little known the feelings or views of such \
    a man may be on his first entering a neighbourhood, this truth is so well fixed in the minds.";

const SIMILARITY: &str = "sentence_similarity";
const WORDS: &str = "word_embeddings";

/// 2 would say that a gate or a budget does not hold.
#[test]
fn wrong_flags_are_errors_like_any_other() {
    let names = [
        "affine_walkthrough",
        "attend",
        "calibrate",
        "generate",
        "perplexity",
        "rerank",
        "search",
        SIMILARITY,
        WORDS,
        "embed",
        #[cfg(feature = "drift")]
        "drift",
    ];
    for name in names {
        fail(name, &["--frobnicate"], "--frobnicate");
        assert!(succeed(name, &["--help"]).contains("Usage"), "{name}");
    }
}

#[test]
fn similarity_of_the_built_in_pairs() {
    let report = json(SIMILARITY, &[]);
    assert!(report["min_cosine"].as_f64().unwrap() >= 0.9999, "{report}");
    assert!(report["spearman_fp32"].as_f64().unwrap() > 0.8, "{report}");
    assert!(report["spearman_change"].as_f64().unwrap().abs() < 0.01, "{report}");
    assert!(report["pearson_int8"].as_f64().unwrap() > 0.8, "{report}");
    assert_eq!(report["similarities"].as_array().unwrap().len(), 10);
    assert_narrow(&succeed(SIMILARITY, &[]));
}

#[test]
fn linear_layers_in_int8_change_little() {
    let report = json(SIMILARITY, &["--precision", "int8"]);
    assert!(report["config"].as_str().unwrap().ends_with(", linear layers in int8"), "{report}");
    let cosine = report["min_cosine"].as_f64().unwrap();
    let f32 = json(SIMILARITY, &[])["min_cosine"].as_f64().unwrap();
    assert!(cosine >= 0.9993 && cosine < f32, "{cosine}, linear layers in f32 {f32}");
}

/// Tools of attention keep the precision that they are told on both sides, and say so.
#[test]
fn every_tool_of_encoders_has_linear_layers_in_the_precision_that_is_named() {
    let short = file(SENTENCE.as_bytes());
    let tools: &[(&str, &[&str])] = &[
        (WORDS, &["--file", &short.1]),
        ("calibrate", &["--observer", "min-max"]),
        #[cfg(feature = "drift")]
        ("drift", &["--file", &short.1]),
    ];
    for (name, args) in tools {
        let report = json(name, &[*args, &["--precision", "int16"]].concat());
        let text = report.to_string();
        assert!(text.contains("MiniLM-L3-v2, linear layers in int16"), "{name}: {text}");
    }
    let rows = |precision| {
        json("calibrate", &["--observer", "min-max", "--precision", precision])["rows"].clone()
    };
    let db = |rows: Value| rows[0]["layer_sqnr_db"][2].as_f64().unwrap();
    assert_ne!(db(rows("int8")), db(rows("f32")));
}

#[test]
fn correlations_that_are_undefined_are_null() {
    let unscored = "A cat sleeps.\tA dog sleeps.\nIt rains.\tThe sun shines.\n";
    let constant = "3\tA cat sleeps.\tA dog sleeps.\n3\tIt rains.\tThe sun shines.\n";
    let single = "3\tA cat sleeps.\tA dog sleeps.\n";
    for content in [unscored, constant, single] {
        let (_folder, path) = file(content.as_bytes());
        let report = json(SIMILARITY, &["--pairs", &path]);
        assert_eq!(report["spearman_fp32"], Value::Null, "{content}");
        assert_eq!(report["pearson_change"], Value::Null, "{content}");
        assert!(report["min_cosine"].as_f64().unwrap() >= 0.9999);
    }
}

#[test]
fn pairs_may_have_windows_line_ends_a_bom_and_empty_lines() {
    let content = "\u{feff}1.5\tA cat sleeps.\tA dog sleeps.\r\n\r\nIt rains.\tThe sun shines.\r\n";
    let (_folder, path) = file(content.as_bytes());
    let report = json(SIMILARITY, &["--pairs", &path]);
    assert_eq!((report["pairs"].as_u64(), report["scored_pairs"].as_u64()), (Some(2), Some(1)));
    assert_eq!(report["similarities"][1]["b"], "The sun shines.");
}

#[test]
fn malformed_pairs_are_reported_with_their_line() {
    let cases: [(&[u8], &str); 10] = [
        (b"1\ta\tb\nonly one column\n", ":2: 1 column;"),
        (b"1\ta\tb\n1\ta\tb\tc\n", ":2: 4 columns"),
        (b"high\ta\tb\n", ":1: score \"high\""),
        (b"1\ta\tb\n2\tc\td\nNaN\te\tf\n", ":3: score \"NaN\""),
        (b"inf\ta\tb\n", ":1: score \"inf\""),
        (b"1\ta\t \n", ":1: an empty sentence"),
        (b"1\ta\tb\n\ta\n", ":2: an empty sentence"),
        (b"2.5\ta\n", ":1: a score and one sentence"),
        (b"1\ta\tb\n2\t\xff\tc\n", ":2: not UTF-8"),
        (b"", ": no pairs in it"),
    ];
    for (content, expected) in cases {
        let (_folder, path) = file(content);
        fail(SIMILARITY, &["--pairs", &path], &format!("input.txt{expected}"));
    }
    fail(SIMILARITY, &["--pairs", "no/such/file.tsv"], "no/such/file.tsv");
    fail(SIMILARITY, &["--model", "no/such/folder"], "no/such/folder");
}

#[test]
fn the_word_report_is_complete_and_narrow() {
    let report = json(WORDS, &[]);
    let heads = report["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 12);
    for head in heads {
        assert!(head["sqnr_db"].as_f64().unwrap() > 30.0, "{head}");
        assert!(head["cosine"].as_f64().unwrap() > 0.999, "{head}");
        assert!(head["probabilities"]["mean_kl"].as_f64().unwrap() < 1e-3, "{head}");
    }
    let stages = report["stages"].as_array().unwrap();
    for name in ["word embeddings", "Q as int8", "Q·K as int32 (exact)", "attention output"] {
        assert!(stages.iter().any(|stage| stage["name"] == name), "no stage {name:?}");
    }
    assert!(report["encoder"]["text"]["cosine"].as_f64().unwrap() > 0.9999);
    assert_eq!(report["static_words"]["heads"].as_array().unwrap().len(), 1);
    assert_eq!(report["attended"]["fp32"].as_array().unwrap().len(), 5);
    assert_narrow(&succeed(WORDS, &[]));
    assert_narrow(&succeed(
        WORDS,
        &[SENTENCE, "--scheme", "affine", "--output", "requantized:tensor"],
    ));
}

#[test]
fn the_word_report_follows_its_options() {
    let text = ["The", "river", "bank", "was", "flooded"];
    let args =
        [&text[..], &["--word", "bank", "--layer", "2", "--head", "7", "--top", "3"]].concat();
    let report = json(WORDS, &args);
    assert_eq!(report["attended"]["word"], "bank");
    assert_eq!(report["attended"]["head"], 7);
    assert_eq!(report["attended"]["int8"].as_array().unwrap().len(), 3);
    assert_eq!(report["layer"], 2);
    assert_eq!(report["tokens"], 7);

    let sqnr = |args: &[&str]| {
        let report = json(WORDS, args);
        let heads = report["heads"].as_array().unwrap().clone();
        heads.iter().map(|h| h["sqnr_db"].as_f64().unwrap()).sum::<f64>() / heads.len() as f64
    };
    let default = sqnr(&[SENTENCE]);
    assert!(
        sqnr(&[SENTENCE, "--granularity", "tensor", "--no-smooth-k", "--no-smooth-q"]) < default
    );
    assert!(sqnr(&[SENTENCE, "--output", "requantized:head"]) < default);
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text() {
    let (_one, plain) = file(SENTENCE.as_bytes());
    let (_two, marked) = file(("\u{feff}".to_string() + SENTENCE).as_bytes());
    let tokens = |path: &str| {
        let report = json("word_embeddings", &["--file", path]);
        report.to_string().replace(path, "FILE")
    };
    assert_eq!(tokens(&plain), tokens(&marked));
    let (_three, bad) = file(b"a man\nand \xff");
    fail("word_embeddings", &["--file", &bad], "input.txt:2: not UTF-8");
}

#[test]
fn long_texts_are_cut_and_said_so() {
    let (_folder, path) = file("many words ".repeat(600).as_bytes());
    let report = json(WORDS, &["--file", &path]);
    assert_eq!(report["tokens"], 512);
    assert_eq!(report["tokens_cut"], 1200 - 510);
    let text = succeed(WORDS, &["--file", &path]);
    assert!(text.contains("690 tokens are left out"), "{text}");
}

#[test]
fn the_comparison_ranks_the_configurations() {
    let rows = json(WORDS, &[SENTENCE, "--compare"])["comparison"].as_array().unwrap().clone();
    let row = |name: &str| {
        let found = rows.iter().find(|row| row["name"] == name);
        found.unwrap_or_else(|| panic!("no {name:?}"))["mean_sqnr_db"].as_f64().unwrap()
    };
    let default = row("token, smooth-K, smooth-Q");
    assert!(row("tensor") < row("head"));
    assert!(row("head") < default);
    assert_eq!(rows.iter().filter(|row| row["is_default"] == true).count(), 1);
    assert_narrow(&succeed(WORDS, &[SENTENCE, "--compare"]));
}

#[test]
fn bad_arguments_of_the_word_report_are_errors() {
    let (_folder, not_utf8) = file(b"a \xff b");
    let (_folder, blank) = file(b" \n\n");
    let cases: [(&[&str], &str); 14] = [
        (&[""], "the text is empty"),
        (&["--file", &blank], "the text is empty"),
        (&["--file", &not_utf8], "not UTF-8"),
        (&["--file", "no/such/file.txt"], "no/such/file.txt"),
        (&["--layer", "3"], "layer 3"),
        (&["--head", "12"], "head 12"),
        (&["--word", "aardvark"], "aardvark"),
        (&["--top", "0"], "0"),
        (&["\u{1f980}\u{1f980}"], "no word"),
        (&["--granularity", "block:0"], "block:0"),
        (&["--output", "requantized:block:4"], "expected dequantized"),
        (&["--compare", "--scheme", "affine"], "cannot be used with"),
        (&["--model", "no/such/folder"], "no/such/folder"),
        (&["--frobnicate"], "--frobnicate"),
    ];
    for (args, expected) in cases {
        fail(WORDS, args, expected);
    }
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    for name in [WORDS, SIMILARITY] {
        leave_early(name, &[]);
    }
}

#[cfg(not(feature = "hub"))]
#[test]
fn without_its_feature_the_hub_is_refused_with_what_to_do() {
    for name in [SIMILARITY, WORDS, "calibrate", "generate", "perplexity"] {
        fail(name, &["--model-id", "someone/some-model"], "--features hub --example");
        let help = succeed(name, &["--help"]);
        assert!(help.contains("--revision <REVISION>") && help.contains("--offline"), "{help}");
    }
}
