//! The examples `calibrate` and `search`, run as a user runs them.

use super::start;
use super::start::{assert_narrow, fail};
use crate::common::tiny_encoders::TinyEncoder;
use serde_json::Value;
use std::path::Path;

/// What it prints; the exit status is `status`, and nothing is on stderr.
fn report(name: &str, args: &[&str], status: i32) -> String {
    let report = start::report(name, args, status);
    assert_narrow(&report);
    report
}

fn json(name: &str, args: &[&str]) -> Value {
    serde_json::from_str(&report(name, &[args, &["--json"]].concat(), 0)).unwrap()
}

#[test]
fn ranges_are_collected_compared_saved_and_loaded() {
    let report = json("calibrate", &[]);
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["scales"].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["dynamic, per-token", "dynamic, per-head", "static, min-max"]);
    assert_eq!(names.len(), 6);
    let lowest = |row: &Value| {
        let layers = row["layer_sqnr_db"].as_array().unwrap().iter();
        layers.map(|x| x.as_f64().unwrap()).fold(f64::INFINITY, f64::min)
    };
    assert!(rows.iter().all(|row| lowest(row) > 35.0), "{report}");
    assert!(lowest(&rows[0]) > lowest(&rows[1]) && lowest(&rows[1]) > lowest(&rows[2]));
    assert!(rows[2]["clipped"].as_f64().unwrap() < 1e-3, "{report}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ranges.json");
    let file = file.to_str().unwrap();
    let saved = json("calibrate", &["--observer", "percentile:99.9", "--output", file]);
    let loaded = json("calibrate", &["--ranges", file]);
    assert_eq!(saved["rows"], loaded["rows"]);
    assert_eq!(saved["rows"][2]["scales"], "static, percentile:99.9");
    assert!(saved["rows"][2]["clipped"].as_f64().unwrap() > 5e-4, "{saved}");

    // Ranges of a model with other heads.
    let ranges: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for (layer, side, what) in [(0, "q", "query"), (1, "k", "key")] {
        for change in [-1, 1] {
            let mut ranges = ranges.clone();
            let heads = &mut ranges["calibration"]["layers"][layer][side];
            let heads = heads.as_array_mut().unwrap();
            match change {
                1 => heads.push(heads[0].clone()),
                _ => drop(heads.pop()),
            }
            let expected = format!(
                "ranges of {} {what} heads in layer {layer} for a model of 12",
                heads.len()
            );
            std::fs::write(file, ranges.to_string()).unwrap();
            for scales in ["head", "tensor"] {
                fail("calibrate", &["--ranges", file, "--scales", scales], &expected);
            }
        }
    }
}

/// In a window of one token there is nothing to weigh, so that scores in int8 change nothing.
#[test]
fn layers_keep_their_windows_in_every_row() {
    let folder = tempfile::tempdir().unwrap();
    let mut tiny = TinyEncoder::new("modernbert", "");
    tiny.config["local_attention"] = 0.into();
    tiny.write(folder.path()).unwrap();
    let file = folder.path().join("words.txt");
    std::fs::write(&file, "the sea is wide and a ship sails far ".repeat(12)).unwrap();
    let [model, file] = [folder.path(), &file].map(|path| path.to_str().unwrap());
    let report = json("calibrate", &["--model", model, "--file", file]);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    for row in rows {
        // What is left is the rounding of the values, 80 dB and more.
        let layers = row["layer_sqnr_db"].as_array().unwrap().iter();
        let differs: Vec<bool> = layers.map(|layer| layer.as_f64().unwrap() < 70.0).collect();
        assert_eq!(differs, [true, false, false, true], "{row}");
    }
}

#[test]
fn a_budget_is_kept_and_written_or_neither() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layers.json");
    let args = ["--attention", "40", "--rounds", "1", "--output", file.to_str().unwrap()];
    let found = json("search", &args);
    assert_eq!(found["holds"], true);
    for figures in ["promised", "verified"] {
        let layers = found[figures]["layer_sqnr_db"].as_array().unwrap();
        // A layer in fp32 differs in nothing, which is null.
        let kept = |x: &Value| x.is_null() || x.as_f64().unwrap() >= 40.0;
        assert!(layers.iter().all(kept), "{found}");
    }
    let written: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(written["layers"].as_array().unwrap().len(), 3);
    assert_eq!(written["about"]["budget"]["attention-output"], 40.0);
    let similarity = json("sentence_similarity", &["--layers", file.to_str().unwrap()]);
    assert!(similarity["min_cosine"].as_f64().unwrap() > 0.999, "{similarity}");
    assert_eq!(similarity["config"], format!("layers as in {}", file.display()));
    let other = ["--layers", file.to_str().unwrap(), "--scheme", "affine"];
    fail("sentence_similarity", &other, "cannot be used with");
    std::fs::remove_file(&file).unwrap();

    // A margin below zero promises what the text cannot keep: cheapest settings, whatever comes. With
    // the linear layers, because f32 keeps every budget: that of attention alone is at times the
    // cheapest, that of all twelve products never is.
    let args = ["--embedding", "250", "--margin=-249", "--linear", "--rounds", "1", "--output"];
    let report = report("search", &[&args[..], &[file.to_str().unwrap()]].concat(), 2);
    assert!(report.contains("NOT KEPT"), "{report}");
    assert!(!file.exists());
}

/// What is searched is written, and does in other programs what it says.
#[test]
fn precisions_of_linear_layers_are_searched_written_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (file, vectors, lines) = (path("layers.json"), path("vectors.jsonl"), path("lines.txt"));
    let args = ["--embedding", "30", "--linear", "--rounds", "1", "--output", &file];
    let text = report("search", &args, 0);
    for part in
        ["Cheapest attention and linear layers with 30 dB", "Products of a passage:", "Kept"]
    {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let written: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let linear = written["linear"].as_array().unwrap();
    assert_eq!(linear.len(), 12);
    assert!(linear.iter().any(|product| product["precision"] == "int8"), "{written}");
    for (product, found) in linear.iter().zip(written["about"]["linear"].as_array().unwrap()) {
        assert_eq!((&product["layer"], &product["product"]), (&found["layer"], &found["product"]));
        assert_eq!(product["precision"], found["precision"]);
        assert!(found["seconds"].as_f64() > Some(0.0), "{found}");
    }

    let similarity = json("sentence_similarity", &["--layers", &file]);
    let cosine = similarity["min_cosine"].as_f64().unwrap();
    assert!((0.99..0.99999).contains(&cosine), "{similarity}");
    std::fs::write(&lines, "A cat sleeps.\nIt rains.\n").unwrap();
    let embedded = json("embed", &[&lines, "-o", &vectors, "--layers", &file]);
    assert_eq!(embedded["texts"], 2);
    assert!(embedded["precision"].as_str().unwrap().starts_with("layers as in"), "{embedded}");

    let twice = ["--layers", &file, "--precision", "int16"];
    fail("sentence_similarity", &twice, "cannot be used with");
    let swapped = std::fs::read_to_string(&file).unwrap().replacen("\"qkv\"", "\"up\"", 1);
    std::fs::write(&file, swapped).unwrap();
    let args = [lines.as_str(), "-o", &vectors, "--layers", &file];
    fail("embed", &args, "with up of layer 0, expected qkv of layer 0");

    fail("search", &["--attention", "40", "--linear"], "cannot be used with");
    let both = ["--embedding", "40", "--linear", "--precision", "int8"];
    fail("search", &both, "expected one of the two");
}

#[test]
fn bad_arguments_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, content: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (blank, word) = (put("blank.txt", b" \n"), put("word.txt", b"word"));
    let not_utf8 = put("not-utf8.txt", b"a \xff b");
    for (name, flags) in [("calibrate", &[][..]), ("search", &["--embedding", "40"][..])] {
        let cases: [(&[&str], &str); 8] = [
            (&["--file", &blank], "no word"),
            (&["--file", &word], "makes two passages"),
            (&["--file", &not_utf8], "not UTF-8"),
            (&["--file", "no/such/file.txt"], "no/such/file.txt"),
            (&["--unseen", &blank], "blank.txt"),
            (&["--passages", "0"], "at least 1"),
            (&["--model", "no/such/folder"], "no/such/folder"),
            (&["--frobnicate"], "--frobnicate"),
        ];
        for (args, expected) in cases {
            fail(name, &[flags, args].concat(), expected);
        }
    }
    let ranges = put("ranges.json", b"{}");
    let cases: [(&[&str], &str); 6] = [
        (&["--observer", "best"], "expected min-max"),
        (&["--observer", "percentile:0"], "percentile 0"),
        (&["--output", "ranges.json"], "--observer"),
        (&["--ranges", &ranges], "not a calibration"),
        (&["--ranges", &ranges, "--observer", "mse"], "cannot be used with"),
        (&["--observer", "mse", "--output", "no/such/folder/x.json"], "no/such/folder"),
    ];
    for (args, expected) in cases {
        fail("calibrate", args, expected);
    }
    let cases: [(&[&str], &str); 5] = [
        (&[], "--embedding"),
        (&["--embedding", "40", "--attention", "40"], "cannot be used with"),
        (&["--embedding", "nan"], "budget NaN"),
        (&["--attention", "40", "--rounds", "0"], "0 rounds"),
        (&["--attention", "20", "--rounds", "1", "--output", "no/such/x.json"], "no/such/x.json"),
    ];
    for (args, expected) in cases {
        fail("search", args, expected);
    }
    assert!(!Path::new("ranges.json").exists());

    let observer = ["--observer", "mse"];
    for (name, flags) in [("calibrate", &observer), ("search", &["--attention", "20"])] {
        for (input, output, expected) in [
            ("--file", &word, "it is the input"),
            ("--unseen", &word, "it is the input"),
            ("--file", &folder.path().join("new/").to_str().unwrap().to_string(), "name of a file"),
        ] {
            fail(name, &[flags, &[input, &word][..], &["--output", output]].concat(), expected);
        }
        #[cfg(unix)]
        fail(name, &[&flags[..], &["--output", "/dev/null"]].concat(), "a regular file");
    }
    assert_eq!(std::fs::read(&word).unwrap(), b"word");
}
