//! The comparison, for people.

use crate::common::passages::Summary;
use crate::common::print::{decibel, table};
use crate::measure::Row;
use candle_int8_attention::drift::metrics::lowest;
use serde::Serialize;
use std::fmt::Write;

#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    /// Where the ranges are from.
    pub source: String,
    #[serde(flatten)]
    pub text: Summary,
    pub rows: Vec<Row>,
    pub written: Option<String>,
}

impl Report {
    pub fn render(&self) -> String {
        let mut text = format!(
            "Static scales in {}\n{}\nSQNR in dB on the text that was not seen: attention output \
             of each layer with fp32 input,\nand embedding of a passage with all layers switched\n{}\n",
            self.model,
            self.text.render("collected:", "judged:   "),
            self.table()
        );
        if let Some(path) = &self.written {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "\nWritten: {}", path);
        }
        text
    }

    fn table(&self) -> comfy_table::Table {
        let mut table =
            table(&["scales", "mean", "lowest layer", "worst head", "embedding", "clipped"]);
        for row in &self.rows {
            let lowest = lowest(row.layer_sqnr_db.iter().copied());
            let clipped = row.clipped.map(|share| format!("{:.3} %", 100.0 * share));
            table.add_row([
                row.scales.clone(),
                decibel(row.mean_sqnr_db()),
                decibel(lowest),
                decibel(row.worst_head_db),
                decibel(row.embedding_sqnr_db),
                clipped.unwrap_or_default(),
            ]);
        }
        table
    }
}
