//! A report for the terminal, at most 100 columns wide.

use super::causes::HEADER;
use super::figures::by_value;
use super::{ConfigReport, Report, Shares, Similarity, Stat};
use crate::drift::linear::LinearErrors;
use crate::drift::{MovedWord, Target};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::fmt::Write;

const WIDTH: u16 = 100;
/// Findings, words and sentences shown; JSON and HTML hold more.
const SHOWN: usize = 5;
/// More heads than this do not fit a line.
const HEADS: usize = 16;

impl Report {
    /// The report as text with Markdown tables.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        self.write_subject(&mut out);
        self.write_configs(&mut out);
        if let Some(main) = self.main() {
            write_layers(&mut out, main);
            write_map(&mut out, main);
            self.write_causes(&mut out, main);
        }
        self.write_linear(&mut out);
        self.write_words(&mut out);
        self.write_similarity(&mut out);
        out
    }

    fn write_subject(&self, out: &mut String) {
        let heads = self.layers.first().map_or(0, |layer| layer.heads.len());
        let layers = self.layers.len();
        let (layers, heads) = (count(layers as u64, "layer"), count(heads as u64, "head"));
        let _ = writeln!(out, "Model  {}; {layers} of {heads}", self.subject.model);
        for note in &self.notes {
            let _ = writeln!(out, "Text   {}", note.replace(": ", ":\n       "));
        }
        let (passages, tokens) = (count(self.passages, "passage"), count(self.tokens, "token"));
        let _ = writeln!(out, "       {passages}, {tokens}");
    }

    fn write_configs(&self, out: &mut String) {
        out.push_str(
            "\n## Int8 and bf16 against fp32\n\n\
             SQNR: signal to error of the attention output in dB, each layer with fp32 input. 20 dB is\n\
             an error of 10 %, 40 dB of 1 %. Mean; mean of the lowest layer; mean of the worst head. KL:\n\
             distance of the probabilities in nats. Top-1: queries with the same most attended key.\n\
             Embedding: lowest cosine of a passage, int8 in every layer. Speed: of attention, to fp32.\n\
             bf16: Q, K, P and V rounded to it, sums in f32, not timed.\n\n",
        );
        let mut rows = table(&[
            "configuration",
            "SQNR\nmean",
            "lowest\nlayer",
            "worst\nhead",
            "KL\nmean",
            "top-1",
            "top-5",
            "embedding\ncosine",
            "speed",
        ]);
        for config in &self.configs {
            let mark = if config.main && self.configs.len() > 1 { "* " } else { "" };
            let o = &config.output;
            rows.add_row([
                format!("{mark}{}", config.name),
                decibel(o.mean_sqnr_db),
                decibel(o.lowest_layer_sqnr_db),
                decibel(o.worst_head.value),
                small(o.mean_kl),
                format!("{:.4}", o.top1),
                format!("{:.4}", o.top5),
                format!("{:.6}", config.embedding.cosine.min),
                config.timing.map_or("-".into(), |timing| format!("{:.1}x", timing.speedup)),
            ]);
        }
        let _ = writeln!(out, "{rows}");
        if self.configs.len() > 1 {
            out.push_str("\n`*` is the configuration of what follows.\n");
        }
        if let Some(main) = self.main() {
            let _ = writeln!(out, "\n{}: {}.", main.name, main.description);
        }
    }

    fn write_causes(&self, out: &mut String, main: &ConfigReport) {
        let worst = main.output.worst_head;
        out.push_str(
            "\n## Why\n\n\
             Queries and keys of each layer. Smoothing: what subtracting the mean wins. Bias: the largest\n\
             mean of a key channel, to the usual spread. Outlier: the largest key, to the usual size.\n\n",
        );
        let mut rows = table(&HEADER);
        for layer in self.causes(main) {
            rows.add_row(layer.cells());
        }
        let _ = writeln!(out, "{rows}\n");
        let head = main.layers.get(worst.layer).and_then(|layer| layer.heads.get(worst.head));
        if let Some(head) = head {
            let output = &head.alone.output.sqnr_db;
            let _ = writeln!(
                out,
                "The worst head is head {} of layer {}: {} dB, lowest passage {} dB.",
                worst.head,
                worst.layer,
                with_error(output),
                decibel(output.min)
            );
            if let Some(shares) = &head.shares {
                let _ = writeln!(out, "Each source alone: {}.", in_words(shares));
            }
            out.push('\n');
        }
        if self.findings.is_empty() {
            out.push_str(
                "No head has biased channels, outlier tokens, a sink or uniform attention.\n",
            );
            return;
        }
        let _ = writeln!(
            out,
            "Unusual heads ({}, the clearest first):\n",
            count(self.findings.len() as u64, "finding")
        );
        let mut rows = table(&["layer", "head", "what is unusual"]);
        for finding in self.findings.iter().take(SHOWN) {
            let text = finding.text.clone();
            rows.add_row([finding.layer.to_string(), finding.head.to_string(), text]);
        }
        if let Some(column) = rows.column_mut(2) {
            column.set_cell_alignment(CellAlignment::Left);
        }
        let _ = writeln!(out, "{rows}");
    }

    fn write_linear(&self, out: &mut String) {
        let Some(linear) = &self.linear else { return };
        let _ = writeln!(
            out,
            "\n## Linear layers in {}\n\n\
             Each product alone, and with all before it, attention as it is: signal to error of the model's\n\
             embedding in dB over all passages, and the lowest cosine of a passage.\n",
            linear.precision
        );
        let mut rows = table(&["layer", "product", "alone", "cosine", "accumu-\nlated", "cosine"]);
        for LinearErrors { layer, product, alone, accumulated } in &linear.products {
            rows.add_row([
                layer.to_string(),
                product.clone(),
                decibel(alone.sqnr_db),
                format!("{:.7}", alone.min_cosine),
                decibel(accumulated.sqnr_db),
                format!("{:.7}", accumulated.min_cosine),
            ]);
        }
        let _ = writeln!(out, "{rows}");
    }

    fn write_words(&self, out: &mut String) {
        if self.words.is_empty() {
            return;
        }
        out.push_str("\n## Where attention moved most\n\n");
        let mut rows = table(&["word", "layer, head", "KL", "looks at: fp32 -> int8"]);
        for word in self.words.iter().take(SHOWN) {
            rows.add_row([
                in_context(word),
                format!("{}, {}", word.layer, word.head),
                small(word.kl),
                word.targets.iter().take(3).map(target).collect::<Vec<_>>().join("\n"),
            ]);
        }
        let _ = writeln!(out, "{rows}");
        out.push_str("\nSentences, by the mean KL of their tokens over all heads:\n\n");
        let mut rows = table(&["sentence", "KL", "most moved"]);
        for sentence in self.sentences.iter().take(SHOWN) {
            rows.add_row([
                shortened(&sentence.text, 160),
                small(sentence.mean_kl),
                sentence.worst.word.clone(),
            ]);
        }
        let _ = writeln!(out, "{rows}");
    }

    fn write_similarity(&self, out: &mut String) {
        if self.similarity.is_empty() {
            return;
        }
        out.push_str("\n## Agreement with people's scores\n\n");
        let mut rows = table(&[
            "configuration",
            "Spearman fp32",
            "Spearman int8",
            "largest change of a cosine",
        ]);
        for Similarity { config, spearman_fp32, spearman_int8, max_change, .. } in &self.similarity
        {
            let number = |x: &Option<f64>| x.map_or("-".into(), |x| format!("{x:.5}"));
            let change = small(*max_change);
            rows.add_row([config.clone(), number(spearman_fp32), number(spearman_int8), change]);
        }
        let _ = writeln!(out, "{rows}");
    }
}

fn write_layers(out: &mut String, main: &ConfigReport) {
    out.push_str(
        "\n## Layers\n\n\
         SQNR in dB with fp32 input to each layer, mean over heads and passages; what leaves the layer\n\
         also with each path on its own input, where errors add up.\n\n",
    );
    let mut rows = table(&[
        "layer",
        "Q\ncodes",
        "K\ncodes",
        "scores",
        "attention\noutput",
        "worst head",
        "KL",
        "top-1",
        "layer\noutput",
        "accumu-\nlated",
    ]);
    for layer in &main.layers {
        let count = layer.heads.len().max(1) as f64;
        let mean = |value: &dyn Fn(&super::HeadFigures) -> f64| {
            layer.heads.iter().map(|head| value(&head.alone)).sum::<f64>() / count
        };
        let worst = layer
            .heads
            .iter()
            .min_by(|a, b| by_value(a.alone.output.sqnr_db.mean, b.alone.output.sqnr_db.mean));
        rows.add_row([
            layer.layer.to_string(),
            decibel(mean(&|h| h.q.sqnr_db.mean)),
            decibel(mean(&|h| h.k.sqnr_db.mean)),
            decibel(mean(&|h| h.scores.sqnr_db.mean)),
            decibel(layer.mean_sqnr_db),
            worst.map_or(String::new(), |h| {
                format!("{} ({})", decibel(h.alone.output.sqnr_db.mean), h.head)
            }),
            small(layer.mean_kl),
            format!("{:.4}", mean(&|h| h.probabilities.top1.mean)),
            decibel(layer.output_alone.sqnr_db.mean),
            decibel(layer.output_accumulated.sqnr_db.mean),
        ]);
    }
    let _ = writeln!(out, "{rows}");
}

fn write_map(out: &mut String, main: &ConfigReport) {
    let heads = main.layers.iter().map(|layer| layer.heads.len()).max().unwrap_or(0);
    if heads == 0 || heads > HEADS {
        return;
    }
    out.push_str("\nEach head's attention output in dB:\n\n");
    let mut header = vec!["layer".to_string()];
    header.extend((0..heads).map(|head| head.to_string()));
    let mut rows = table(&header.iter().map(String::as_str).collect::<Vec<_>>());
    for layer in &main.layers {
        let mut cells = vec![layer.layer.to_string()];
        cells.extend(layer.heads.iter().map(|h| decibel(h.alone.output.sqnr_db.mean)));
        rows.add_row(cells);
    }
    let _ = writeln!(out, "{rows}");
}

/// The first column is text, the others are numbers.
fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// `1 passage`, `2 passages`.
pub(super) fn count(number: u64, noun: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{s}")
}

/// A signal-to-noise ratio: one decimal; equal data has none.
pub(super) fn decibel(sqnr: f64) -> String {
    if sqnr == f64::INFINITY { "exact".into() } else { format!("{sqnr:.1}") }
}

/// Small numbers with two digits, zero as `0`.
pub(super) fn small(x: f64) -> String {
    if x == 0.0 { "0".into() } else { format!("{x:.1e}") }
}

fn with_error(stat: &Stat) -> String {
    match stat.standard_error > 0.0 {
        true => format!("{} +- {:.1}", decibel(stat.mean), stat.standard_error),
        false => decibel(stat.mean),
    }
}

/// `of its error 60 % comes from K, 40 % from Q`.
pub(super) fn in_words(shares: &Shares) -> String {
    let mut parts = [
        (shares.q, "Q"),
        (shares.k, "K"),
        (shares.requantization, "requantization"),
        (shares.pv, "P·V"),
    ];
    parts.sort_by(|a, b| b.0.total_cmp(&a.0));
    let parts = parts.iter().filter(|(share, _)| *share >= 0.005);
    let parts = parts.map(|(share, name)| format!("{:.0} % from {name}", 100.0 * share));
    format!("of its error {}", parts.collect::<Vec<_>>().join(", "))
}

/// A word between the last and the next few characters of its text.
fn in_context(word: &MovedWord) -> String {
    let before: Vec<char> = word.before.chars().collect();
    let start = before.len().saturating_sub(20);
    let before: String = before[start..].iter().collect();
    let after: String = word.after.chars().take(16).collect();
    format!("..{before}[{}]{after}..", word.word)
}

fn target(target: &Target) -> String {
    let Target { word, fp32, int8, .. } = target;
    format!("{word} {:.2} -> {:.2} %", 100.0 * fp32, 100.0 * int8)
}

/// At most this many characters.
fn shortened(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 2).chain("..".chars()).collect(),
        false => text.to_string(),
    }
}
