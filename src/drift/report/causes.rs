//! What explains the error of a layer, over its heads: one row for the terminal and for the page.

use super::{ConfigReport, LayerFacts, LayerReport, Report, Shares};
use crate::drift::{HeadFacts, Peak, SideShape};
use serde::Serialize;

/// The row of a layer, ready to be shown.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LayerCauses {
    pub layer: usize,
    /// Smallest and largest query element.
    pub q_range: String,
    /// Smallest and largest key element.
    pub k_range: String,
    /// What smooth-Q and smooth-K win, mean over heads, in dB.
    pub smoothing: String,
    /// The most biased key channel, as a multiple of the usual spread, and its head.
    pub bias: String,
    /// The largest outlier among the keys, as a multiple of the usual size, and its head.
    pub outlier: String,
    /// Share of the codes that are clipped, of queries and keys.
    pub clipped: String,
    /// Shares of the error from Q, K, requantization and P·V, mean over heads.
    pub shares: String,
}

/// The columns, in the order of [`LayerCauses::cells`].
pub(super) const HEADER: [&str; 8] = [
    "layer",
    "Q from\nto",
    "K from\nto",
    "smoothing\nQ / K dB",
    "K channel\nbias (head)",
    "K outlier\n(head)",
    "clipped\nQ / K",
    "% of error from\nQ / K / requant / P·V",
];

impl LayerCauses {
    pub fn cells(&self) -> [String; 8] {
        let Self { layer, q_range, k_range, smoothing, bias, outlier, clipped, shares } =
            self.clone();
        [layer.to_string(), q_range, k_range, smoothing, bias, outlier, clipped, shares]
    }

    fn of(facts: &LayerFacts, layer: &LayerReport) -> Self {
        let mean = |value: &dyn Fn(&HeadFacts) -> f64| {
            facts.heads.iter().map(value).sum::<f64>() / facts.heads.len().max(1) as f64
        };
        let range = |side: fn(&HeadFacts) -> &SideShape| {
            let sides = || facts.heads.iter().map(side);
            let low = sides().map(|s| s.min).fold(f64::INFINITY, f64::min);
            let high = sides().map(|s| s.max).fold(f64::NEG_INFINITY, f64::max);
            format!("{low:.1}\n{high:.1}")
        };
        let peak = |of: fn(&SideShape) -> &Option<Peak>| {
            let peaks = facts.heads.iter().filter_map(|h| Some((h.head, of(&h.k).as_ref()?.value)));
            match peaks.max_by(|a, b| a.1.total_cmp(&b.1)) {
                Some((head, value)) => format!("{value:.1}x ({head})"),
                None => "-".to_string(),
            }
        };
        let clipped = |of: fn(&super::HeadReport) -> f64| {
            let share = layer.heads.iter().map(of).sum::<f64>() / layer.heads.len().max(1) as f64;
            if share == 0.0 { "0".to_string() } else { format!("{:.2} %", 100.0 * share) }
        };
        Self {
            layer: facts.layer,
            q_range: range(|h| &h.q),
            k_range: range(|h| &h.k),
            smoothing: format!(
                "{:.1} / {:.1}",
                mean(&|h| h.q.smoothing_gain_db),
                mean(&|h| h.k.smoothing_gain_db)
            ),
            bias: peak(|side| &side.channel_bias),
            outlier: peak(|side| &side.token_outlier),
            clipped: format!("{} / {}", clipped(|h| h.q_clipped), clipped(|h| h.k_clipped)),
            shares: shares(layer),
        }
    }
}

/// Mean over the heads that have shares.
fn shares(layer: &LayerReport) -> String {
    let all: Vec<Shares> = layer.heads.iter().filter_map(|head| head.shares).collect();
    if all.is_empty() {
        return "-".to_string();
    }
    let mean = |of: fn(&Shares) -> f64| {
        format!("{:.0}", 100.0 * all.iter().map(of).sum::<f64>() / all.len() as f64)
    };
    [mean(|s| s.q), mean(|s| s.k), mean(|s| s.requantization), mean(|s| s.pv)].join(" / ")
}

impl Report {
    /// One row a layer, of the main configuration.
    pub(super) fn causes(&self, main: &ConfigReport) -> Vec<LayerCauses> {
        let layers = self.layers.iter().zip(&main.layers);
        layers.map(|(facts, layer)| LayerCauses::of(facts, layer)).collect()
    }
}
