//! How the comparison reads in a terminal.

use crate::common::print::{count, table};
use candle_int8_attention::drift::tokens::{Estimate, Percentiles, TextDrift};
use serde::Serialize;
use std::fmt::Write;

/// Everything this example prints.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub text: String,
    pub config: String,
    pub context: usize,
    pub windows: usize,
    pub seconds_fp32: f64,
    pub seconds_int8: f64,
    #[serde(flatten)]
    pub drift: TextDrift,
}

impl Report {
    pub fn render(&self) -> String {
        let mut out = String::new();
        let drift = &self.drift;
        let _ = writeln!(out, "{}\n{}", self.model, self.text);
        let _ = writeln!(out, "int8: {}", self.config);
        let _ = writeln!(
            out,
            "{} of {} tokens, {}; all layers: fp32 {:.1} s, int8 {:.1} s\n",
            count(self.windows, "window"),
            self.context,
            count(drift.tokens, "prediction"),
            self.seconds_fp32,
            self.seconds_int8
        );
        let mut figures = table(&["", "value", "standard error"]);
        let plain = |x: Estimate| [format!("{:.4}", x.value), format!("{:.4}", x.error)];
        let fine = |x: Estimate| [format!("{:.6}", x.value), format!("{:.6}", x.error)];
        let percent = |x: Estimate| {
            [format!("{:.3} %", 100.0 * x.value), format!("{:.3} %", 100.0 * x.error)]
        };
        for (name, [value, error]) in [
            ("perplexity, fp32", plain(drift.perplexity_reference)),
            ("perplexity, int8", plain(drift.perplexity_candidate)),
            ("perplexity, int8 / fp32", fine(drift.perplexity_ratio)),
            ("mean KL divergence (nats)", fine(drift.mean_kl)),
            ("same top token", percent(drift.same_top)),
            ("mean change of the token's probability", percent(drift.mean_probability_change)),
            ("RMS change of the token's probability", percent(drift.rms_probability_change)),
        ] {
            figures.add_row([name.to_string(), value, error]);
        }
        let _ = writeln!(out, "{figures}\n\n{}", spread(&drift.kl, &drift.probability_change));
        out
    }
}

/// The table of percentiles.
fn spread(kl: &Percentiles, change: &Percentiles) -> comfy_table::Table {
    let mut table = table(&["", "KL divergence", "change of the token's probability"]);
    let of = |p: &Percentiles| {
        [p.max, p.p999, p.p99, p.p95, p.p90, p.median, p.p10, p.p05, p.p01, p.min]
    };
    let names =
        ["largest", "99.9 %", "99 %", "95 %", "90 %", "median", "10 %", "5 %", "1 %", "smallest"];
    for ((name, kl), change) in names.iter().zip(of(kl)).zip(of(change)) {
        table.add_row([name.to_string(), format!("{kl:.6}"), format!("{:+.3} %", 100.0 * change)]);
    }
    table
}
