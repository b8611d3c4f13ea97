//! Pairs of sentences with scores, and what each path says about them.

use crate::common::correlation::Correlation;
use crate::common::extremes::largest;
use crate::common::text;
use crate::common::words::is_unknown;
use anyhow::{Context, Result, bail, ensure};
use candle_int8_attention::drift::metrics::cosine;
use candle_int8_attention::drift::report::Similarity;
use candle_int8_attention::drift::{Embeddings, Recorder};
use candle_int8_attention::models::TextEncoder;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Two sentences, and how similar people found them.
pub struct Pair {
    pub score: f64,
    pub sentences: [String; 2],
}

/// Reads lines `score<TAB>sentence<TAB>sentence`; empty lines are skipped.
pub fn read(path: &Path) -> Result<Vec<Pair>> {
    let name = path.display();
    let text = text::read(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty());
    let pairs = lines
        .map(|(i, line)| parse(line).with_context(|| format!("{name}:{}", i + 1)))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!pairs.is_empty(), "{name}: no pairs in it; {FORMAT}");
    Ok(pairs)
}

const FORMAT: &str = "a line is score<TAB>sentence<TAB>sentence";

fn parse(line: &str) -> Result<Pair> {
    let columns: Vec<&str> = line.split('\t').map(str::trim).collect();
    let [score, a, b] = columns[..] else {
        let s = if columns.len() == 1 { "" } else { "s" };
        bail!("{} column{s}, so there is no score or no pair; {FORMAT}", columns.len());
    };
    ensure!(!a.is_empty() && !b.is_empty(), "an empty sentence; {FORMAT}");
    match score.parse::<f64>() {
        Ok(number) if number.is_finite() => {
            Ok(Pair { score: number, sentences: [a.to_string(), b.to_string()] })
        }
        _ => bail!("score {score:?}, expected a finite number; {FORMAT}"),
    }
}

/// How the model reads the sentences of pairs.
#[derive(Default)]
pub struct Sentences {
    all: u64,
    /// Whose end the model does not read.
    cut: u64,
    /// Of which the model knows no word, so that it cannot tell them apart.
    unknown: u64,
}

impl Sentences {
    /// Counts a sentence.
    pub fn add(&mut self, encoder: &TextEncoder, sentence: &str) -> Result<()> {
        let batch = encoder.tokenize(&[sentence])?;
        let is_cut = batch.truncated.iter().any(|&tokens| tokens > 0);
        let names = &batch.tokens[0];
        // Without the two special tokens.
        let mut words = names.iter().skip(1).take(names.len().saturating_sub(2));
        self.all += 1;
        self.cut += u64::from(is_cut);
        self.unknown += u64::from(words.all(|token| is_unknown(token)));
        Ok(())
    }

    /// In words; an error if the model knows no word of any.
    pub fn describe(&self) -> Result<String> {
        ensure!(
            self.unknown < self.all,
            "the model knows no word of the sentences: every token is unknown to it"
        );
        let mut text = "each sentence a passage".to_string();
        if self.cut > 0 {
            text += &format!("; the model's limit cuts the end of {}", self.cut);
        }
        if self.unknown > 0 {
            text += &format!("; in {} every token is unknown", self.unknown);
        }
        Ok(text)
    }
}

/// What the paths say about a pair.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Judged {
    text: String,
    pair: u64,
    score: f64,
    fp32: f64,
    /// One cosine a configuration.
    int8: Vec<f64>,
}

impl Judged {
    pub fn new(text: &str, pair: u64, score: f64, [a, b]: [Embeddings; 2]) -> Result<Self> {
        let int8 = a.int8.iter().zip(&b.int8).map(|(a, b)| Ok(cosine(a, b)?));
        Ok(Self {
            text: text.to_string(),
            pair,
            score,
            fp32: cosine(&a.fp32, &b.fp32)?,
            int8: int8.collect::<Result<_>>()?,
        })
    }
}

impl Judged {
    /// Whether it has what the report of so many configurations needs.
    pub fn is_of(&self, configs: usize) -> bool {
        self.score.is_finite() && self.int8.len() == configs
    }
}

/// One line a configuration. The pairs are put in order first, so that the order of merging does
/// not show.
pub fn similarity(judged: &[Judged], recorder: &Recorder) -> Vec<Similarity> {
    if judged.is_empty() {
        return Vec::new();
    }
    let mut judged: Vec<&Judged> = judged.iter().collect();
    judged.sort_by(|a, b| (&a.text, a.pair).cmp(&(&b.text, b.pair)));
    let column =
        |value: &dyn Fn(&Judged) -> f64| judged.iter().map(|j| value(j)).collect::<Vec<_>>();
    let gold = column(&|j| j.score);
    let fp32 = column(&|j| j.fp32);
    let of = |(i, config): (usize, &str)| {
        let int8 = column(&|j| j.int8[i]);
        Similarity {
            config: config.to_string(),
            pairs: judged.len(),
            spearman_fp32: Correlation::of(&gold, &fp32).spearman,
            spearman_int8: Correlation::of(&gold, &int8).spearman,
            max_change: largest(fp32.iter().zip(&int8).map(|(a, b)| (a - b).abs())),
        }
    };
    recorder.configs().enumerate().map(of).collect()
}
