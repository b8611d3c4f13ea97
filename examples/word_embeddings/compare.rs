//! The same text through every int8 configuration worth choosing from.

use crate::common::config::describe;
use crate::common::extremes::largest;
use crate::common::print::{decibel, scientific, table};
use crate::common::windows::Window;
use crate::heads::{HeadDrift, Path, Qkv, drift_per_head};
use crate::report::Subject;
use anyhow::Result;
use candle_int8_attention::ScoreConfig;
use candle_int8_attention::drift::Candidate;
use candle_int8_attention::drift::metrics::lowest;
use candle_int8_attention::models::{EncoderModel, LayeredModel};
use serde::Serialize;

/// The drift of one configuration over all layers, heads and windows of the text.
#[derive(Debug, Serialize)]
pub struct Row {
    /// A short name.
    pub name: String,
    /// All of the configuration in words.
    pub config: String,
    pub is_default: bool,
    /// Signal-to-noise ratio of the attention output, mean over everything.
    pub mean_sqnr_db: f64,
    /// The layer with the lowest mean.
    pub lowest_layer_sqnr_db: f64,
    /// The layer with the highest mean.
    pub highest_layer_sqnr_db: f64,
    /// The lowest of any head in any layer and window.
    pub worst_head_sqnr_db: f64,
    /// The lowest cosine of any head in any layer and window.
    pub worst_cosine: f64,
    pub mean_kl: f64,
    pub top1_agreement: f64,
}

/// The configurations, coarse scales first, then the requantized variants of the default. P·V is in
/// f32, so that only the scores differ, and equally on every machine.
fn candidates() -> Vec<Candidate> {
    let named = [
        ("tensor", "tensor"),
        ("head", "head"),
        ("block of 64", "block:64"),
        ("block of 128/64, smooth-K", "sage"),
        ("token", "token"),
        ("token, smooth-K", "token+smooth-k"),
        ("token, smooth-K, smooth-Q", "token+smooth-k+smooth-q"),
        ("token, local means", "token+local-k+local-q"),
        ("token, local means, rotated", "token+local-k+local-q+rotate"),
        ("token, local means, rotated, outliers", "token+local-k+local-q+rotate+outliers"),
        ("token, affine", "affine+token"),
        ("the same, affine", "affine+token+local-k+local-q+rotate+outliers"),
        (
            "default, requantized per tensor",
            "token+local-k+local-q+rotate+outliers+requantized:tensor",
        ),
        ("default, requantized per head", "token+local-k+local-q+rotate+outliers+requantized:head"),
        (
            "default, requantized per token",
            "token+local-k+local-q+rotate+outliers+requantized:token",
        ),
    ];
    let candidate = |(name, words): (&str, &str)| Candidate {
        name: name.into(),
        ..words.parse().expect("a list of known words")
    };
    named.map(candidate).into()
}

/// What `--compare` prints.
#[derive(Debug, Serialize)]
pub struct Comparison {
    #[serde(flatten)]
    pub subject: Subject,
    pub comparison: Vec<Row>,
}

impl Comparison {
    /// Runs every attention block of `model`, which computes in fp32, over every window. Each layer
    /// gets fp32 input, so that its own error is seen and not that of the layers before.
    pub fn of(model: &EncoderModel, windows: &[Window], subject: Subject) -> Result<Self> {
        let layers = model.config().num_hidden_layers;
        let mut drifts = Drifts::new(layers);
        for window in windows {
            let mut hidden = model.embed(&window.ids)?;
            for layer in 0..layers {
                let (block, output) = Qkv::of(model, layer, &hidden)?;
                drifts.add(layer, &block)?;
                hidden = output;
            }
        }
        Ok(Self { subject, comparison: drifts.rows() })
    }
}

/// Gathers the drift of every configuration, block by block.
struct Drifts {
    candidates: Vec<Candidate>,
    /// `[candidate][layer]`, all heads of all windows.
    heads: Vec<Vec<Vec<HeadDrift>>>,
}

impl Drifts {
    fn new(layers: usize) -> Self {
        let candidates = candidates();
        let heads = vec![vec![Vec::new(); layers]; candidates.len()];
        Self { candidates, heads }
    }

    /// Runs one block in fp32 and in every configuration.
    fn add(&mut self, layer: usize, block: &Qkv) -> Result<()> {
        let fp32 = Path::fp32(block)?;
        for (candidate, heads) in self.candidates.iter().zip(&mut self.heads) {
            let int8 = Path::int8(block, candidate)?;
            heads[layer].extend(drift_per_head(&fp32, &int8)?);
        }
        Ok(())
    }

    /// One row a configuration.
    fn rows(&self) -> Vec<Row> {
        let all = self.candidates.iter().zip(&self.heads);
        all.map(|(candidate, layers)| row(candidate, layers)).collect()
    }
}

fn row(candidate: &Candidate, layers: &[Vec<HeadDrift>]) -> Row {
    let (scores, requant) = (&candidate.config.scores, candidate.requant.as_ref());
    let all: Vec<&HeadDrift> = layers.iter().flatten().collect();
    let layer_means: Vec<f64> =
        layers.iter().map(|heads| mean(heads.iter().map(|h| h.output.sqnr_db))).collect();
    Row {
        name: candidate.name.clone(),
        config: describe(scores, requant),
        is_default: *scores == ScoreConfig::default() && requant.is_none(),
        mean_sqnr_db: mean(all.iter().map(|h| h.output.sqnr_db)),
        lowest_layer_sqnr_db: lowest(layer_means.iter().copied()),
        highest_layer_sqnr_db: largest(layer_means.iter().copied()),
        worst_head_sqnr_db: lowest(all.iter().map(|h| h.output.sqnr_db)),
        worst_cosine: lowest(all.iter().map(|h| h.output.cosine)),
        mean_kl: mean(all.iter().map(|h| h.probabilities.mean_kl)),
        top1_agreement: mean(all.iter().map(|h| h.probabilities.top1_agreement)),
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

impl Comparison {
    pub fn render(&self) -> String {
        format!(
            "{}\n\
             Each line is one way to compute attention scores in int8, measured against f32 on every\n\
             head of every layer (each layer gets the input of the f32 run).\n\
             Only the scores differ. `*` is the default.\n\n\
             - Scales: shared by the whole tensor, a head, a block of tokens (of queries/of keys), or\n  \
             for one token alone. Symmetric unless it says affine (zero may lie anywhere).\n\
             - Smooth-K, smooth-Q: the mean over tokens is taken off before rounding and put back after;\n  \
             local means are those of 64 keys, of 48 queries. Rotated: by a Hadamard matrix. Outliers:\n  \
             keys that stand out have scores in f32.\n\
             - Requantized: the scores become int8 and f32 again; otherwise int32 becomes f32 at once.\n\
             - SQNR: signal to error of the attention output. 20 dB is an error of 10 %, 40 dB of 1 %;\n  \
             6 dB more halve it. Mean, mean of the lowest layer, and lowest head.\n\
             - KL: distance of the attention probabilities in nats, 0 is equal. Top-1: share of tokens\n  \
             that attend most to the same token as in f32.\n\n{}\n",
            self.subject.render(),
            rows_table(&self.comparison)
        )
    }
}

fn rows_table(rows: &[Row]) -> String {
    let mut out = table(&[
        "one scale for each",
        "SQNR dB\nmean",
        "lowest\nlayer",
        "worst\nhead",
        "worst\ncosine",
        "KL\nmean",
        "top-1\nagrees",
    ]);
    for row in rows {
        let mark = if row.is_default { "* " } else { "" };
        out.add_row([
            format!("{mark}{}", row.name),
            decibel(row.mean_sqnr_db),
            decibel(row.lowest_layer_sqnr_db),
            decibel(row.worst_head_sqnr_db),
            format!("{:.5}", row.worst_cosine),
            scientific(row.mean_kl),
            format!("{:.3}", row.top1_agreement),
        ]);
    }
    out.to_string()
}
