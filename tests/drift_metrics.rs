//! The metrics against NumPy and SciPy: `drift_data/make_metrics.py` made the inputs and computed
//! the expected values, and says how.

use candle_int8_attention::drift::metrics::{
    cosine, entropy, kl_divergence, max_abs, relative_l1, rmse, same_top1, sqnr_db, topk_agreement,
    total_variation,
};
use candle_int8_attention::drift::{Drift, ErrorSums, ProbabilityDrift, Summary};
use serde_json::Value;

fn data(kind: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("drift_data/metrics.json")).unwrap();
    all[kind].as_array().unwrap().clone()
}

fn floats(value: &Value) -> Vec<f32> {
    numbers(value).iter().map(|&x| x as f32).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Relative, to 1e-9. What is not a ratio of sums but a small difference of large ones (an entropy
/// change) is held to 1e-9 of those.
fn agrees(name: &str, found: f64, expected: &Value, scale: f64) {
    let expected = expected.as_f64().unwrap();
    let error = (found - expected).abs();
    assert!(error <= 1e-9 * expected.abs().max(scale), "{name}: {found}, NumPy says {expected}");
}

#[test]
fn distances_agree_with_numpy() {
    let cases = data("reals");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let (a, b) = (floats(&case["reference"]), floats(&case["candidate"]));
        let drift = Drift::of_outputs(&a, &b).unwrap();
        // In pieces and merged it must be the same.
        let mut pieces = ErrorSums::default();
        for (a, b) in a.chunks(7).zip(b.chunks(7)).rev() {
            let piece = ErrorSums::of(a, b).unwrap();
            pieces.merge(&piece);
        }
        let pieces = Drift::from(&pieces);
        for (name, values) in [
            ("cosine", [cosine(&a, &b).unwrap(), drift.cosine, pieces.cosine]),
            ("relative_l1", [relative_l1(&a, &b).unwrap(), drift.relative_l1, pieces.relative_l1]),
            ("rmse", [rmse(&a, &b).unwrap(), drift.rmse, pieces.rmse]),
            ("max_abs", [max_abs(&a, &b).unwrap(), drift.max_abs, pieces.max_abs]),
            ("sqnr_db", [sqnr_db(&a, &b).unwrap(), drift.sqnr_db, pieces.sqnr_db]),
        ] {
            values.iter().for_each(|&value| agrees(name, value, &case[name], 0.0));
        }
    }
}

#[test]
fn divergences_agree_with_scipy() {
    let cases = data("probabilities");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let (p, q) = (floats(&case["reference"]), floats(&case["candidate"]));
        agrees("kl", kl_divergence(&p, &q).unwrap(), &case["kl"], 0.0);
        agrees("total_variation", total_variation(&p, &q).unwrap(), &case["total_variation"], 0.0);
        agrees("top1", f64::from(u8::from(same_top1(&p, &q).unwrap())), &case["top1"], 0.0);
        agrees("top5", topk_agreement(&p, &q, 5).unwrap(), &case["top5"], 0.0);
        agrees("entropy", entropy(&q) - entropy(&p), &case["entropy_change"], entropy(&p));
        let rows = ProbabilityDrift::of_rows(&p, &q, p.len()).unwrap();
        agrees("mean_kl", rows.mean_kl, &case["kl"], 0.0);
    }
}

#[test]
fn summaries_agree_with_numpy_and_scipy() {
    let cases = data("streams");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let values = numbers(&case["values"]);
        let mut parts = [Summary::default(); 3];
        values.iter().zip((0..3).cycle()).for_each(|(&x, part)| parts[part].push(x));
        let mut merged = parts[2];
        merged.merge(&parts[0]);
        merged.merge(&parts[1]);
        agrees("mean", merged.mean(), &case["mean"], 0.0);
        agrees("standard_error", merged.standard_error(), &case["standard_error"], 0.0);
        agrees("min", merged.min(), &case["min"], 0.0);
        agrees("max", merged.max(), &case["max"], 0.0);
    }
}

#[cfg(feature = "drift")]
#[test]
fn percentiles_are_within_one_percent_of_numpy() {
    for case in data("streams") {
        let mut all = candle_int8_attention::drift::Distribution::default();
        numbers(&case["values"]).into_iter().for_each(|x| all.push(x));
        for pair in case["quantiles"].as_array().unwrap() {
            let (share, expected) = (pair[0].as_f64().unwrap(), pair[1].as_f64().unwrap());
            let found = all.quantile(share);
            assert!((found / expected - 1.0).abs() <= 0.0101, "{share}: {found}, not {expected}");
        }
    }
}
