//! What both paths say about the pairs, and how that reads in a terminal.

use crate::common::correlation::Correlation;
use crate::common::extremes::{ascending, largest};
use crate::common::print::{count, signed, table};
use crate::pairs::Pair;
use serde::Serialize;
use std::fmt::Write;

/// How many pairs a terminal shows; JSON holds all.
const SHOWN: usize = 10;

/// Similarities of one pair.
#[derive(Debug, Clone, Serialize)]
pub struct Similarity {
    /// What people said, if anybody asked.
    pub score: Option<f64>,
    pub fp32: f64,
    pub int8: f64,
    pub a: String,
    pub b: String,
}

impl Similarity {
    pub fn new(pair: &Pair, fp32: f64, int8: f64) -> Self {
        Self { score: pair.score, fp32, int8, a: pair.a.clone(), b: pair.b.clone() }
    }

    fn change(&self) -> f64 {
        self.int8 - self.fp32
    }
}

/// Everything this example prints. Correlations are `null` where they are undefined.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub config: String,
    pub pairs: usize,
    pub scored_pairs: usize,
    pub sentences: usize,
    pub sentences_cut: usize,
    pub min_cosine: f64,
    pub max_similarity_change: f64,
    pub spearman_fp32: Option<f64>,
    pub spearman_int8: Option<f64>,
    pub spearman_change: Option<f64>,
    pub pearson_fp32: Option<f64>,
    pub pearson_int8: Option<f64>,
    pub pearson_change: Option<f64>,
    pub similarities: Vec<Similarity>,
}

/// The corpus and how it was embedded.
pub struct Subject {
    pub model: String,
    pub config: String,
    pub sentences: usize,
    pub sentences_cut: usize,
    pub min_cosine: f64,
}

impl Report {
    pub fn new(subject: Subject, similarities: Vec<Similarity>) -> Self {
        let scored: Vec<(f64, &Similarity)> =
            similarities.iter().filter_map(|s| Some((s.score?, s))).collect();
        let gold: Vec<f64> = scored.iter().map(|(score, _)| *score).collect();
        let column = |value: fn(&Similarity) -> f64| -> Vec<f64> {
            scored.iter().map(|(_, s)| value(s)).collect()
        };
        let fp32 = Correlation::of(&gold, &column(|s| s.fp32));
        let int8 = Correlation::of(&gold, &column(|s| s.int8));
        let change = |a: Option<f64>, b: Option<f64>| Some(b? - a?);
        let Subject { model, config, sentences, sentences_cut, min_cosine } = subject;
        Self {
            model,
            config,
            pairs: similarities.len(),
            scored_pairs: gold.len(),
            sentences,
            sentences_cut,
            min_cosine,
            max_similarity_change: largest(similarities.iter().map(|s| s.change().abs())),
            spearman_fp32: fp32.spearman,
            spearman_int8: int8.spearman,
            spearman_change: change(fp32.spearman, int8.spearman),
            pearson_fp32: fp32.pearson,
            pearson_int8: int8.pearson,
            pearson_change: change(fp32.pearson, int8.pearson),
            similarities,
        }
    }

    pub fn render(&self) -> String {
        let mut out = String::new();
        let Self { model, config, pairs, sentences, .. } = self;
        let (pairs, sentences) = (count(*pairs, "pair"), count(*sentences, "different sentence"));
        let _ = writeln!(out, "Text   {pairs}, {sentences}");
        if self.sentences_cut > 0 {
            let cut = self.sentences_cut;
            let _ = writeln!(out, "       The model's limit cut the end of {cut} of them.");
        }
        let _ = writeln!(out, "Model  {model}");
        let _ = writeln!(out, "Int8   {config}");
        self.render_pairs(&mut out);
        self.render_correlations(&mut out);
        let _ = write!(
            out,
            "\nSmallest cosine between the f32 and the int8 embedding of any sentence: {:.6}\n\
             Largest change of any pair's similarity: {:.6}\n",
            self.min_cosine, self.max_similarity_change
        );
        out
    }

    fn render_pairs(&self, out: &mut String) {
        let mut shown: Vec<&Similarity> = self.similarities.iter().collect();
        let which = if shown.len() > SHOWN {
            shown.sort_by(|a, b| ascending(-a.change().abs(), -b.change().abs()));
            shown.truncate(SHOWN);
            format!("The {SHOWN} pairs that int8 changes most")
        } else {
            "Each pair".to_string()
        };
        let _ = write!(
            out,
            "\n{which}: cosine similarity of the two sentence embeddings, with the attention of\n\
             every layer computed in f32 and in int8.\n\n"
        );
        let mut rows = table(&["pair", "score", "f32", "int8", "change"]);
        for s in shown {
            rows.add_row([
                format!("{}\n{}", s.a, s.b),
                s.score.map_or("-".into(), |score| score.to_string()),
                format!("{:.5}", s.fp32),
                format!("{:.5}", s.int8),
                signed(s.change()),
            ]);
        }
        let _ = writeln!(out, "{rows}");
    }

    fn render_correlations(&self, out: &mut String) {
        if self.scored_pairs == 0 {
            let _ = writeln!(out, "\nNo pair has a score, so there is nothing to correlate with.");
            return;
        }
        let _ = write!(
            out,
            "\nAgreement with the scores of {}, 1 is perfect. Spearman compares the order,\n\
             Pearson the values.\n\n",
            count(self.scored_pairs, "pair")
        );
        let mut rows = table(&["correlation", "f32", "int8", "change"]);
        let value = |x: Option<f64>| x.map_or("undefined".into(), |x| format!("{x:.5}"));
        let change = |x: Option<f64>| x.map_or("undefined".into(), signed);
        for (name, fp32, int8, moved) in [
            ("Spearman", self.spearman_fp32, self.spearman_int8, self.spearman_change),
            ("Pearson", self.pearson_fp32, self.pearson_int8, self.pearson_change),
        ] {
            rows.add_row([name.to_string(), value(fp32), value(int8), change(moved)]);
        }
        let _ = writeln!(out, "{rows}");
        if self.spearman_fp32.is_none() {
            out.push_str(
                "Undefined: it takes two pairs at least, and scores that are not all equal.\n",
            );
        }
    }
}
