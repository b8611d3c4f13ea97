//! What was embedded, and how fast.

use crate::args::Args;
use crate::common::model::shown;
use crate::common::print::{count, wrapped};
use crate::input::Counts;
use candle_int8_attention::models::TextEmbedding;
use serde::Serialize;
use std::time::Duration;

#[derive(Debug, Serialize)]
pub struct Report {
    model: String,
    precision: String,
    normalized: bool,
    file: String,
    output: String,
    shard: String,
    pub texts: u64,
    tokens: u64,
    /// From the first text that is read to the last embedding that is written; loading the model is left out.
    seconds: f64,
    texts_per_second: f64,
    tokens_per_second: f64,
    /// Texts that were longer than the model reads, and the tokens that they lost.
    cut_texts: u64,
    cut_tokens: u64,
    #[serde(flatten)]
    skipped: Counts,
}

impl Report {
    pub fn new(args: &Args, model: String) -> Self {
        Self {
            model,
            precision: match &args.layers {
                Some(file) => format!("layers as in {}", shown(file)),
                None => args.precision.to_string(),
            },
            normalized: args.normalize,
            file: shown(&args.file),
            output: shown(&args.output),
            shard: args.shard.to_string(),
            texts: 0,
            tokens: 0,
            seconds: 0.0,
            texts_per_second: 0.0,
            tokens_per_second: 0.0,
            cut_texts: 0,
            cut_tokens: 0,
            skipped: Counts::default(),
        }
    }

    pub fn add(&mut self, embedding: &TextEmbedding) {
        self.texts += 1;
        self.tokens += embedding.tokens as u64;
        self.cut_texts += u64::from(embedding.truncated > 0);
        self.cut_tokens += embedding.truncated as u64;
    }

    /// Texts a second until now, for people.
    pub fn rate(&self, elapsed: Duration) -> String {
        format!("{:.0} texts/s", self.texts as f64 / elapsed.as_secs_f64().max(1e-9))
    }

    pub fn finish(&mut self, elapsed: Duration, skipped: Counts) {
        self.seconds = elapsed.as_secs_f64();
        let a_second = |number: u64| number as f64 / self.seconds.max(1e-9);
        self.texts_per_second = a_second(self.texts);
        self.tokens_per_second = a_second(self.tokens);
        self.skipped = skipped;
    }

    pub fn render(&self) -> String {
        let texts = count(self.texts as usize, "text");
        let mut lines = vec![format!(
            "{texts} of {} ({}, {} in {}): {:.2} s, {:.0} texts and {:.0} tokens a second",
            self.file,
            count(self.tokens as usize, "token"),
            self.model,
            self.precision,
            self.seconds,
            self.texts_per_second,
            self.tokens_per_second
        )];
        if self.cut_texts > 0 {
            let (cut, lost) = (self.cut_texts as usize, self.cut_tokens as usize);
            lines.push(format!(
                "{} longer than the model reads: {} cut off",
                count(cut, "text"),
                count(lost, "token")
            ));
        }
        let Counts { empty, not_utf8, no_field } = self.skipped;
        if empty + not_utf8 + no_field > 0 {
            lines.push(format!("lines left out: {}", self.skipped));
        }
        lines.push(format!("written to {}", self.output));
        lines.iter().map(|line| wrapped(line)).collect::<Vec<_>>().join("\n")
    }
}
