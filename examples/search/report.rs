//! What was found, for people.

use crate::common::passages::Summary;
use crate::common::print::{decibel, table, wrapped};
use anyhow::Result;
use candle_int8_attention::drift::metrics::lowest;
use candle_int8_attention::drift::search::{Budget, Found, FoundLinear};
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;

#[derive(Debug, Serialize)]
pub struct Report {
    model: String,
    #[serde(flatten)]
    text: Summary,
    #[serde(flatten)]
    found: Found,
    holds: bool,
    /// What was saved, as it was named.
    pub written: Option<String>,
}

impl Report {
    pub fn new(model: String, text: Summary, found: Found) -> Self {
        Self { model, text, holds: found.holds(), found, written: None }
    }

    pub fn holds(&self) -> bool {
        self.holds
    }

    pub fn save(&self, path: &Path) -> Result<()> {
        Ok(self.found.settings()?.save(path)?)
    }

    pub fn render(&self) -> String {
        let Found { budget, margin_db, promised, verified, .. } = &self.found;
        let what = match budget {
            Budget::Embedding(_) => "embedding",
            Budget::AttentionOutput(_) => "attention output of every layer",
        };
        let mut text = format!(
            "Cheapest attention{} with {} dB for the {what}: {}\n{}\n{}\n\n",
            if self.found.linear.is_empty() { "" } else { " and linear layers" },
            budget.decibel(),
            self.model,
            self.text.render("searched:", "verified:"),
            self.layers()
        );
        let (seconds, fp32) = (self.found.seconds, self.found.fp32_seconds);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "Attention of a passage: {:.2} ms, {:.2} ms in fp32 ({:.1}x).\n",
            1e3 * seconds,
            1e3 * fp32,
            fp32 / seconds
        );
        if !self.found.linear.is_empty() {
            let sum = |of: fn(&FoundLinear) -> f64| self.found.linear.iter().map(of).sum::<f64>();
            let (seconds, own) = (sum(|of| of.seconds), sum(|of| of.own_seconds));
            let _ = writeln!(
                text,
                "{}\n\nProducts of a passage: {:.2} ms, {:.2} ms in f32 ({:.1}x).\n",
                self.linear(),
                1e3 * seconds,
                1e3 * own,
                own / seconds
            );
        }
        let mut figures = table(&["SQNR dB", "promised", "verified on unseen text"]);
        let rows = [
            ("embedding", promised.embedding_sqnr_db, verified.embedding_sqnr_db),
            (
                "lowest layer",
                promised.of(Budget::AttentionOutput(0.0)),
                verified.of(Budget::AttentionOutput(0.0)),
            ),
            (
                "worst head",
                lowest(promised.worst_head_db.iter().copied()),
                lowest(verified.worst_head_db.iter().copied()),
            ),
        ];
        for (name, promised, verified) in rows {
            figures.add_row([name.to_string(), decibel(promised), decibel(verified)]);
        }
        let _ = writeln!(text, "{figures}\n");
        let (found, asked) = (decibel(verified.of(*budget)), budget.decibel());
        let verdict = match self.holds {
            true => format!("Kept: {found} where {asked} dB were asked for."),
            false => format!(
                "NOT KEPT on unseen text: {found} where {asked} dB were asked for. Search with more \
                 passages or a larger --margin than {margin_db}."
            ),
        };
        let _ = writeln!(text, "{}", wrapped(&verdict));
        if let Some(path) = &self.written {
            let _ = writeln!(text, "Written: {}", path);
        }
        text
    }

    /// The precision of each linear layer.
    fn linear(&self) -> comfy_table::Table {
        let mut table = table(&["layer", "product", "ms", "f32 ms", "alone, dB", "precision"]);
        for product in &self.found.linear {
            table.add_row([
                product.setting.layer.to_string(),
                product.setting.product.clone(),
                format!("{:.2}", 1e3 * product.seconds),
                format!("{:.2}", 1e3 * product.own_seconds),
                decibel(product.alone_sqnr_db),
                product.setting.precision.to_string(),
            ]);
        }
        table
    }

    fn layers(&self) -> comfy_table::Table {
        let mut table = table(&["layer", "ms", "fp32 ms", "SQNR dB", "worst head", "setting"]);
        if let Some(column) = table.column_mut(5) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        for (index, layer) in self.found.layers.iter().enumerate() {
            table.add_row([
                index.to_string(),
                format!("{:.2}", 1e3 * layer.seconds),
                format!("{:.2}", 1e3 * layer.fp32_seconds),
                decibel(self.found.promised.layer_sqnr_db[index]),
                decibel(self.found.promised.worst_head_db[index]),
                layer.setting.to_string(),
            ]);
        }
        table
    }
}
