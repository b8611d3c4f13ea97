//! Ranked passages, and how that reads in a terminal.

use crate::common::extremes::{ascending, largest};
use crate::common::print::{count, signed, table, wrapped};
use serde::Serialize;
use std::fmt::Write;

/// A passage and what the model says of it.
#[derive(Debug, Clone, Serialize)]
pub struct Passage {
    /// Its place by the fp32 score, from 1.
    pub rank: usize,
    /// Its place by the int8 score.
    pub rank_int8: usize,
    pub fp32: f32,
    pub int8: f32,
    /// Where it is in the file, from 1.
    pub line: usize,
    pub text: String,
}

impl Passage {
    /// Without a place yet.
    pub fn new(line: usize, text: String, fp32: f32, int8: f32) -> Self {
        Self { rank: 0, rank_int8: 0, fp32, int8, line, text }
    }

    fn change(&self) -> f64 {
        f64::from(self.int8) - f64::from(self.fp32)
    }
}

/// Everything this example prints.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    /// Of the int8 attention.
    pub config: String,
    pub query: String,
    /// How many passages were longer than the model reads.
    pub passages_cut: usize,
    /// How many passages have another place by int8.
    pub passages_moved: usize,
    pub max_score_change: f64,
    /// Best first.
    pub passages: Vec<Passage>,
}

impl Report {
    pub fn new(
        model: String,
        config: String,
        query: String,
        passages_cut: usize,
        mut passages: Vec<Passage>,
    ) -> Self {
        let best_first = |a: f32, b: f32| ascending(b.into(), a.into());
        // Equal scores stay in the order of the file.
        passages.sort_by(|a, b| best_first(a.int8, b.int8).then(a.line.cmp(&b.line)));
        (1..).zip(&mut passages).for_each(|(rank, passage)| passage.rank_int8 = rank);
        passages.sort_by(|a, b| best_first(a.fp32, b.fp32).then(a.line.cmp(&b.line)));
        (1..).zip(&mut passages).for_each(|(rank, passage)| passage.rank = rank);
        Self {
            model,
            config,
            query,
            passages_cut,
            passages_moved: passages.iter().filter(|p| p.rank != p.rank_int8).count(),
            max_score_change: largest(passages.iter().map(|p| p.change().abs())),
            passages,
        }
    }

    pub fn render(&self, top: usize) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}", wrapped(&format!("Query  {}", self.query)));
        let _ = writeln!(out, "Text   {}", count(self.passages.len(), "passage"));
        if self.passages_cut > 0 {
            let _ = writeln!(out, "       The model's limit cut {} of them.", self.passages_cut);
        }
        let _ = writeln!(out, "Model  {}", self.model);
        let _ = writeln!(out, "Int8   {}\n", self.config);
        let mut rows = table(&["passage", "line", "f32", "int8", "change", "place by int8"]);
        for passage in self.passages.iter().take(top) {
            rows.add_row([
                passage.text.clone(),
                passage.line.to_string(),
                format!("{:.5}", passage.fp32),
                format!("{:.5}", passage.int8),
                signed(passage.change()),
                passage.rank_int8.to_string(),
            ]);
        }
        let _ = write!(
            out,
            "{rows}\n\nLargest change of any score: {:.6}; passages at another place: {}\n",
            self.max_score_change, self.passages_moved
        );
        out
    }
}
