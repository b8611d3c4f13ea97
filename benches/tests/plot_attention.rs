//! The program `plot_attention`: a figure from the results of benches/peers, and its errors.

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn plot(results: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plot_attention")).arg(results).output().unwrap()
}

/// Results as compare.py writes them; the peer stops before this crate does, and is off any scale.
fn results(table: &str) -> Value {
    let row = |tokens: u64, ours: f64, peer: Value| {
        json!({
            "shape": [1, 12, tokens, 64],
            "entries": [
                { "id": "ours", "title": "this crate", "median": ours },
                { "id": "peer", "title": "Peer & Co", "median": peer },
            ],
            "limit": { "seconds": ours / 2.0, "pv": "bf16" },
        })
    };
    json!({
        "date": "2026-01-31",
        "threads": 3,
        "machine": { "processor": "Abacus", "level": "portable" },
        "tables": [{
            "name": table,
            "rows": [row(16, 1e-7, json!(50.0)), row(64, 2e-3, json!(1e-4)), row(256, 0.3, json!(null))],
        }],
    })
}

#[test]
fn draws_every_contender_with_legend_and_units() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.json");
    std::fs::write(&path, results("sweep").to_string()).unwrap();
    let output = plot(&path);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let svg = std::fs::read_to_string(folder.path().join("results.svg")).unwrap();
    for text in [
        "Attention of [1, 12, N, 64]",
        "Abacus, 3 threads, level portable, 2026-01-31",
        "this crate",
        "Peer &amp; Co",
        "limit of the instructions (int8, bf16)",
        "tokens N",
        "256",
        "10 ns",
        "100 ms",
        "100 s",
        "1x",
    ] {
        assert!(svg.contains(text), "no {text:?} in the figure");
    }
    assert!(!svg.contains("NaN"));
}

#[test]
fn says_what_is_wrong_with_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results.json");
    let fails = |expected: &str| {
        let output = plot(&path);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        assert!(stderr.contains(expected), "no {expected:?} in {stderr:?}");
        assert!(!stderr.contains("panicked"), "{stderr}");
        assert!(!folder.path().join("results.svg").exists());
    };
    fails("cannot read");
    std::fs::write(&path, "{}").unwrap();
    fails("is not what compare.py --json writes");
    std::fs::write(&path, results("scores").to_string()).unwrap();
    fails("no table `sweep`");
    let mut nobody = results("sweep");
    for row in nobody["tables"][0]["rows"].as_array_mut().unwrap() {
        row["entries"] = json!([]);
    }
    std::fs::write(&path, nobody.to_string()).unwrap();
    fails("nothing was measured");
}
