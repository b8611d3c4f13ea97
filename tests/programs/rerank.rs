//! The example `rerank`, with a small cross-encoder of random weights.

use super::start::{assert_narrow, fail, json, succeed};
use crate::common::tiny_encoders::TinyEncoder;
use anyhow::Result;

const RERANK: &str = "rerank";

/// A folder with a model that has this many labels, and a file of passages.
fn folder(labels: usize, passages: &str) -> Result<(tempfile::TempDir, [String; 2])> {
    let folder = tempfile::tempdir()?;
    let tiny = TinyEncoder::new("bert", "bert.").with_head(labels);
    tiny.write(folder.path()).map_err(|error| anyhow::anyhow!("{error}"))?;
    let file = folder.path().join("passages.txt");
    std::fs::write(&file, passages)?;
    let paths = [folder.path(), &file].map(|path| path.to_string_lossy().into_owned());
    Ok((folder, paths))
}

#[test]
fn passages_come_best_first_with_both_scores() -> Result<()> {
    let lines =
        "\u{feff}the sea\r\n\na ship sails far\nthe storm comes and the sea is wide\nthe sea\n";
    let (_folder, [model, file]) = folder(1, lines)?;
    let args = ["--model", &model, "--passages", &file, "--query", "is the sea wide"];
    let report = json(RERANK, &args);
    let passages = report["passages"].as_array().expect("passages");
    let mut lines: Vec<u64> = passages.iter().map(|p| p["line"].as_u64().unwrap()).collect();
    let score = |i: usize, kind: &str| passages[i][kind].as_f64().unwrap();
    for (i, passage) in passages.iter().enumerate() {
        assert_eq!(passage["rank"], i + 1);
        assert!(i == 0 || score(i - 1, "fp32") >= score(i, "fp32"), "{report}");
        // Without anything said, one label goes through a sigmoid.
        assert!((0.0..=1.0).contains(&score(i, "fp32")), "{report}");
        let change = (score(i, "fp32") - score(i, "int8")).abs();
        assert!(change < 0.05, "{report}");
        // Numbers in JSON are rounded.
        let largest = report["max_score_change"].as_f64().unwrap();
        assert!(change <= largest + 1e-6, "{report}");
    }
    lines.sort_unstable();
    assert_eq!(passages.len(), 4);
    assert_eq!(lines, [1, 3, 4, 5], "an empty line is none, and a mark is no part of the first");
    let text = |i: usize| passages[i]["text"].as_str().unwrap();
    let same: Vec<usize> = (0..4).filter(|&i| text(i) == "the sea").collect();
    assert_eq!(score(same[0], "fp32"), score(same[1], "fp32"), "beside other passages, too");
    let text = succeed(RERANK, &[&args[..], &["--top", "2"]].concat());
    assert_narrow(&text);
    let rows = text.lines().filter(|line| line.starts_with('|')).count();
    assert_eq!(rows, 4, "a header, a line and two rows:\n{text}");
    Ok(())
}

#[test]
fn what_cannot_rank_is_told() -> Result<()> {
    let (_folder, [model, file]) = folder(2, "the sea\n")?;
    let query = ["--query", "sea", "--passages", &file];
    fail(RERANK, &query, "name a cross-encoder with --model or --model-id");
    let args = [&query[..], &["--model", &model]].concat();
    fail(RERANK, &args, "tells 2 labels apart (label 0, label 1)");
    fail(RERANK, &["--query", " ", "--passages", &file, "--model", &model], "the query is empty");
    std::fs::write(&file, "\n \n")?;
    fail(RERANK, &args, "no passage in it");
    Ok(())
}
