//! What is printed.

use crate::args::{Args, BackendName};
use crate::common::config::describe;
use crate::common::extremes::ascending;
use crate::common::print::{count, decibel, indented, scientific, table, wrapped};
use crate::input::Inputs;
use crate::masking::Masking;
use crate::measure::{HeadDrift, MAX_PROBABILITIES, Results};
use anyhow::Result;
use candle_int8_attention::drift::{Drift, ProbabilityDrift};
use serde::Serialize;
use std::fmt::Write;

/// Heads that the table shows.
const WORST: usize = 5;

#[derive(Debug, Serialize)]
pub struct Report {
    input: String,
    backend: BackendName,
    /// The int8 configuration in words.
    config: String,
    scale: f32,
    /// What hides keys, in words.
    masks: String,
    /// `[B, H, M, D]`
    q: Vec<usize>,
    /// `[B, H_kv, N, D]`, the past included.
    k: Vec<usize>,
    /// `[B, H_kv, N, Dv]`
    v: Vec<usize>,
    past: usize,
    output: Option<String>,
    drift: Drift,
    heads: Vec<HeadDrift>,
    probabilities: Option<ProbabilityDrift>,
    notes: Vec<String>,
}

impl Report {
    pub fn new(args: &Args, inputs: &Inputs, masking: &Masking, results: &Results) -> Result<Self> {
        let mut notes = inputs.notes.clone();
        let bad = results.out.flatten_all()?.to_vec1::<f32>()?;
        let bad = bad.iter().filter(|x| !x.is_finite()).count();
        if bad > 0 {
            let bad = count(bad, "element");
            notes.push(format!("numbers overflow: {bad} of the output not finite"));
        }
        if results.probabilities.is_none() {
            notes.push(format!(
                "probabilities are not compared: more than {MAX_PROBABILITIES} of them"
            ));
        }
        let config = match args.backend {
            BackendName::Int8 => format!("{}, P·V {}", describe(&args.scores(), None), args.pv),
            BackendName::Fp32 => "fp32".to_string(),
        };
        Ok(Self {
            input: args.input.display().to_string(),
            backend: args.backend,
            config,
            scale: args.scale(inputs)?,
            masks: masking.describe(),
            q: inputs.q.dims().to_vec(),
            k: inputs.k.dims().to_vec(),
            v: inputs.v.dims().to_vec(),
            past: inputs.past,
            output: args.output.as_ref().map(|path| path.display().to_string()),
            drift: results.drift,
            heads: results.heads.clone(),
            probabilities: results.probabilities,
            notes,
        })
    }

    pub fn render(&self) -> String {
        let Self { q, k, v, scale, masks, config, .. } = self;
        let mut text = format!("Attention on {}\n\n", self.input);
        let past = if self.past > 0 { format!(" ({} past)", self.past) } else { String::new() };
        // Writing to a String cannot fail.
        let shapes = format!("q {q:?}  k {k:?}{past}  v {v:?}");
        let _ = writeln!(text, "{}", indented(&shapes));
        let _ = writeln!(text, "{}", indented(&format!("scale {scale}, masks: {masks}")));
        let _ = writeln!(text, "{}\n", indented(config));
        let _ = writeln!(text, "Output against fp32\n{}\n", self.output_table());
        if let Some(probabilities) = &self.probabilities {
            let _ = writeln!(text, "{}\n", wrapped(&in_words(probabilities)));
        }
        for note in &self.notes {
            let _ = writeln!(text, "{}", wrapped(&format!("Note: {note}.")));
        }
        if let Some(path) = &self.output {
            let _ = writeln!(text, "Written: {}", path);
        }
        text
    }

    fn output_table(&self) -> comfy_table::Table {
        let mut table = table(&["", "SQNR dB", "cosine", "relative L1", "RMSE", "max abs"]);
        let mut row = |name: String, drift: &Drift| {
            table.add_row([
                name,
                decibel(drift.sqnr_db),
                format!("{:.6}", drift.cosine),
                scientific(drift.relative_l1),
                scientific(drift.rmse),
                scientific(drift.max_abs),
            ]);
        };
        row("all heads".to_string(), &self.drift);
        let mut worst: Vec<&HeadDrift> = self.heads.iter().collect();
        worst.sort_by(|a, b| ascending(a.drift.sqnr_db, b.drift.sqnr_db));
        if self.backend == BackendName::Int8 && worst.len() > 1 {
            for head in worst.iter().take(WORST) {
                row(format!("sequence {}, head {}", head.batch, head.head), &head.drift);
            }
        }
        table
    }
}

fn in_words(drift: &ProbabilityDrift) -> String {
    format!(
        "Probabilities: mean KL {} nats, largest {}; {} of the weight moved; the most attended \
         key is the same for {:.2} % of {}.",
        scientific(drift.mean_kl),
        scientific(drift.max_kl),
        scientific(drift.mean_total_variation),
        100.0 * drift.top1_agreement,
        match drift.rows {
            1 => "1 query".to_string(),
            rows => format!("{rows} queries"),
        }
    )
}
