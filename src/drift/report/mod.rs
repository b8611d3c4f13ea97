//! What a [`Recorder`] found, as figures: for the terminal
//! ([`Report::to_text`]), as JSON (serde), or as one HTML page ([`Report::to_html`]).
//!
//! In JSON, a number that is infinite (the signal-to-noise ratio of equal data) or not a number is
//! `null`.

mod causes;
mod charts;
mod figures;
mod html;
mod terminal;

pub use figures::{
    ConfigReport, HeadFigures, HeadReport, LayerReport, OutputFigures, Place, ProbabilityFigures,
    Shares, StageFigures, Stat, Timing, TokenError,
};

use super::explain::findings;
use super::linear::LinearErrors;
use super::{Finding, HeadFacts, MovedSentence, MovedWord, Recorder, Subject};
use crate::nn::Precision;
use figures::by_value;
use serde::Serialize;

/// Everything that is known about the drift of a model on its texts.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What was measured.
    #[serde(flatten)]
    pub subject: Subject,
    /// Passages read.
    pub passages: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// What a reader must know: how texts were cut, what is missing.
    pub notes: Vec<String>,
    /// The configurations, best first: by the mean signal-to-noise ratio of the attention output.
    pub configs: Vec<ConfigReport>,
    /// What is unusual about heads, most unusual first.
    pub findings: Vec<Finding>,
    /// What each head looks like, whatever the configuration.
    pub layers: Vec<LayerFacts>,
    /// The words whose attention the main configuration moves most.
    pub words: Vec<MovedWord>,
    /// The sentences whose attention the main configuration moves most.
    pub sentences: Vec<MovedSentence>,
    /// What linear layers cost in another precision, if they were measured.
    pub linear: Option<LinearReport>,
    /// Agreement with scores that people gave to pairs of sentences, if there are any.
    pub similarity: Vec<Similarity>,
}

/// The heads of a layer.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct LayerFacts {
    /// Its number.
    pub layer: usize,
    /// Its heads.
    pub heads: Vec<HeadFacts>,
}

/// What linear layers cost in a precision, alone and accumulated.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LinearReport {
    /// What they were packed in.
    pub precision: Precision,
    /// In the order in which they are multiplied.
    pub products: Vec<LinearErrors>,
}

/// How a configuration changes what the model says about pairs of sentences.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Similarity {
    /// The configuration.
    pub config: String,
    /// Pairs with a score.
    pub pairs: usize,
    /// Spearman's correlation of the fp32 path's cosines with the scores; none where undefined.
    pub spearman_fp32: Option<f64>,
    /// The same of the int8 path.
    pub spearman_int8: Option<f64>,
    /// Largest change of a pair's cosine.
    pub max_change: f64,
}

impl Recorder {
    /// The figures of everything recorded so far.
    pub fn report(&self) -> Report {
        let layers: Vec<LayerFacts> = (self.shapes.iter().enumerate())
            .map(|(layer, heads)| LayerFacts {
                layer,
                heads: heads.iter().enumerate().map(|(head, shape)| shape.facts(head)).collect(),
            })
            .collect();
        let mut found: Vec<Finding> = layers
            .iter()
            .flat_map(|layer| layer.heads.iter().flat_map(|head| findings(layer.layer, head)))
            .collect();
        found.sort_by(|a, b| b.severity.total_cmp(&a.severity));
        let mut configs: Vec<ConfigReport> = (self.candidates.iter().enumerate())
            .map(|(i, state)| ConfigReport::of(state, i == 0, &self.fp32_seconds))
            .collect();
        best_first(&mut configs);
        let subject = self.subject.clone();
        let mut notes = Vec::new();
        for text in &subject.texts {
            notes.push(format!("{}: {}", text.name, text.cut));
            notes.extend(text.missing().map(|missing| format!("only {missing}")));
        }
        let linear = self.linear.as_ref().filter(|linear| linear.passages() == self.passages);
        let linear = linear.map(|linear| LinearReport {
            precision: linear.precision(),
            products: linear.errors(),
        });
        Report {
            subject,
            passages: self.passages,
            tokens: self.tokens,
            notes,
            configs,
            findings: found,
            layers,
            words: self.worst.words.clone(),
            sentences: self.worst.sentences.clone(),
            linear,
            similarity: Vec::new(),
        }
    }
}

/// A configuration that gives NaN is not good.
fn best_first(configs: &mut [ConfigReport]) {
    configs.sort_by(|a, b| by_value(b.output.mean_sqnr_db, a.output.mean_sqnr_db));
}

impl Report {
    /// The configuration that is explained, and that a gate looks at.
    pub fn main(&self) -> Option<&ConfigReport> {
        self.configs.iter().find(|config| config.main)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::Candidate;

    #[test]
    fn a_configuration_that_gives_nan_is_listed_last() {
        let names = ["default", "token", "head"];
        let candidates = names.map(|name| name.parse::<Candidate>().unwrap());
        let mut configs = Recorder::new(candidates.into()).unwrap().report().configs;
        for (config, name) in configs.iter_mut().zip(names) {
            assert_eq!(config.name, name);
        }
        let values = [f64::NAN, 30.0, f64::INFINITY];
        configs.iter_mut().zip(values).for_each(|(of, value)| of.output.mean_sqnr_db = value);
        best_first(&mut configs);
        let order: Vec<&str> = configs.iter().map(|config| config.name.as_str()).collect();
        assert_eq!(order, ["head", "token", "default"]);
    }
}
