//! The example `affine_walkthrough`: its figures, its errors, a closed pipe.

use super::start::{self, assert_narrow};
use serde_json::Value;

const NAME: &str = "affine_walkthrough";

fn succeed(args: &[&str]) -> String {
    start::succeed(NAME, args)
}

fn json(args: &[&str]) -> Value {
    start::json(NAME, args)
}

/// The dB of the stages of a list.
fn decibels(stages: &Value) -> Vec<f64> {
    stages.as_array().unwrap().iter().map(|stage| stage["sqnr_db"].as_f64().unwrap()).collect()
}

/// The figures of one normal `[1024, 256]` head. Independent draws agree within 1 dB, because the
/// largest of 262,144 numbers decides about the scale.
#[test]
fn one_random_head_has_the_known_errors() {
    let report = json(&["--heads", "1"]);
    let (int32, int8) = (&report["right_way"]["from_int32"], &report["right_way"]["through_int8"]);
    let (int32, int8) = (decibels(int32), decibels(int8));
    // One scale; then symmetric, affine, affine in fixed point, and symmetric rows through int8.
    let found = [int32[0], int8[0], int8[1], int8[2], int8[3]];
    for (found, known) in found.iter().zip([37.2, 27.1, 30.7, 30.7, 29.0]) {
        assert!((found - known).abs() < 1.0, "{found} dB, expected about {known}: {report}");
    }
    assert!(int32[3] > int32[0], "the default is better than one scale: {report}");
    // Every mistake but the last line, which is another way to write the right thing.
    let tried = decibels(&report["first_tried"]["attempts"]);
    assert!(tried[..4].iter().all(|&db| db < 6.0), "{tried:?}");
    assert!((tried[4] - int8[1]).abs() < 1.0, "{tried:?}");
}

#[test]
fn word_embeddings_are_followed_by_name() {
    let report = json(&["--data", "glove"]);
    assert_eq!(report["shape"], serde_json::json!([1, 4, 1024, 50]));
    assert_eq!(report["samples"][1]["name"], "man·woman");
    assert!(decibels(&report["right_way"]["from_int32"]).iter().all(|&db| db > 30.0), "{report}");
}

#[test]
fn the_embeddings_of_a_bert_model() {
    let report = json(&["--data", "bert", "--heads", "2", "--tokens", "512"]);
    assert_eq!(report["shape"], serde_json::json!([1, 2, 512, 384]));
    assert!(report["data"].as_str().unwrap().contains("MiniLM-L3"), "{report}");
    assert!(decibels(&report["right_way"]["from_int32"]).iter().all(|&db| db > 30.0), "{report}");
}

#[test]
fn the_report_is_narrow_and_depends_on_the_seed_alone() {
    for args in [&["--data", "glove", "--heads", "2"][..], &["--heads", "1", "--seed", "7"]] {
        let report = succeed(args);
        assert_eq!(report, succeed(args));
        assert_narrow(&report);
        for part in ["FIRST TRIED", "Stage 4", "Offset?", "Scale?", "Dequantize?"] {
            assert!(report.contains(part), "{part}: {report}");
        }
    }
}

#[test]
fn the_smallest_inputs_work() {
    for depth in ["1", "2", "33025"] {
        for tokens in ["1", "2"] {
            let sizes = ["--heads", "1", "--tokens", tokens, "--depth", depth];
            let report = succeed(&sizes);
            assert!(!report.contains("NaN"), "{report}");
        }
    }
}

#[test]
fn bad_values_are_errors_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().to_str().unwrap();
    let weights = tempfile::tempdir().unwrap();
    std::fs::write(weights.path().join("model-f16.safetensors"), b"not safetensors").unwrap();
    let corrupt = weights.path().to_str().unwrap();
    let cases: [(&[&str], &str); 15] = [
        (&["--heads", "0"], "--heads is 0"),
        (&["--tokens", "0"], "--tokens is 0"),
        (&["--depth", "0"], "--depth is 0"),
        (&["--heads", "many"], "--heads"),
        (&["--data", "music"], "random"),
        (&["--heads", "1", "--tokens", "2", "--depth", "33026"], "more than 33025"),
        (&["--tokens", "18446744073709551615"], "scores"),
        (&["--heads", "2000000", "--tokens", "1"], "larger than"),
        (&["--data", "glove", "--heads", "10", "--tokens", "2001"], "the vocabulary has 20000"),
        (&["--data", "glove", "--depth", "64"], "these embeddings have 50"),
        (&["--data", "glove", "--model", empty], "model-f16.safetensors"),
        (&["--data", "bert", "--model", empty], "model.safetensors"),
        (&["--model", empty], "not with random data"),
        (&["--data", "glove", "--model-id", "a/b"], "goes with --data bert"),
        (&["--data", "glove", "--model", corrupt], "model-f16.safetensors"),
    ];
    for (args, expected) in cases {
        start::fail(NAME, args, expected);
    }
    let missing = ["--data", "glove", "--model", "no/such/folder"];
    start::fail(NAME, &missing, "no folder no/such/folder");
}

#[test]
fn a_closed_pipe_is_no_error() {
    start::leave_early(NAME, &["--heads", "1", "--tokens", "64"]);
}
