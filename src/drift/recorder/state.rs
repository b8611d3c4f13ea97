//! What is gathered for a configuration, a layer, a head; all of it merges.

use crate::Result;
use crate::drift::metrics::{entropy, kl_divergence, same_top1, topk_agreement, total_variation};
use crate::drift::{Distribution, ErrorSums, Sum, Summary};
use serde::{Deserialize, Serialize};

/// One stage: sums over everything, and how the passages differ.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Stage {
    pub pooled: ErrorSums,
    /// One signal-to-noise ratio a passage.
    pub sqnr_db: Summary,
    /// `1 - cosine`, one a passage: cosines so near to 1 that the spread would drown in them.
    pub cosine_loss: Summary,
}

impl Stage {
    /// Adds a passage.
    pub fn push(&mut self, passage: &ErrorSums) {
        self.pooled.merge(passage);
        self.sqnr_db.push(passage.sqnr_db());
        self.cosine_loss.push(1.0 - passage.cosine());
    }

    pub fn merge(&mut self, other: &Self) {
        self.pooled.merge(&other.pooled);
        self.sqnr_db.merge(&other.sqnr_db);
        self.cosine_loss.merge(&other.cosine_loss);
    }
}

/// The attention probabilities, one number a query and metric.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Probabilities {
    pub kl: Distribution,
    pub total_variation: Summary,
    pub top1: Summary,
    pub top5: Summary,
    pub entropy_change: Summary,
}

impl Probabilities {
    /// Adds the rows of a head, whose entropies in the reference are known, and gives the KL
    /// divergence of each. A query that sees no key has
    /// no probabilities to compare; its divergence is 0.
    pub fn push(
        &mut self,
        reference: &[f32],
        entropies: &[f64],
        candidate: &[f32],
    ) -> Result<Vec<f64>> {
        let keys = (reference.len() / entropies.len().max(1)).max(1);
        let rows = reference.chunks_exact(keys).zip(candidate.chunks_exact(keys)).zip(entropies);
        rows.map(|((p, q), before)| {
            if p.iter().all(|&p| p == 0.0) {
                return Ok(0.0);
            }
            let kl = kl_divergence(p, q)?;
            self.kl.push(kl);
            self.total_variation.push(total_variation(p, q)?);
            self.top1.push(f64::from(u8::from(same_top1(p, q)?)));
            self.top5.push(topk_agreement(p, q, 5)?);
            self.entropy_change.push(entropy(q) - before);
            Ok(kl)
        })
        .collect()
    }

    pub fn merge(&mut self, other: &Self) {
        self.kl.merge(&other.kl);
        self.total_variation.merge(&other.total_variation);
        self.top1.merge(&other.top1);
        self.top5.merge(&other.top5);
        self.entropy_change.merge(&other.entropy_change);
    }
}

/// All stages of one head.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct HeadStages {
    pub q: Stage,
    pub k: Stage,
    pub scores: Stage,
    pub probabilities: Probabilities,
    pub output: Stage,
    /// `|a - b| / |a|` of the attention output, one number a query.
    pub token_error: Distribution,
}

impl HeadStages {
    /// Adds the attention output of a passage.
    pub fn push_output(
        &mut self,
        reference: &[f32],
        candidate: &[f32],
        value_dim: usize,
    ) -> Result<()> {
        self.output.push(&ErrorSums::of(reference, candidate)?);
        let width = value_dim.max(1);
        for (a, b) in reference.chunks_exact(width).zip(candidate.chunks_exact(width)) {
            let row = ErrorSums::of(a, b)?;
            self.token_error.push(10f64.powf(-row.sqnr_db() / 20.0));
        }
        Ok(())
    }

    pub fn merge(&mut self, other: &Self) {
        self.q.merge(&other.q);
        self.k.merge(&other.k);
        self.scores.merge(&other.scores);
        self.probabilities.merge(&other.probabilities);
        self.output.merge(&other.output);
        self.token_error.merge(&other.token_error);
    }
}

/// Energy that each source of error alone adds to the attention output.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Sources {
    pub q: Sum,
    pub k: Sum,
    pub requantization: Sum,
    pub pv: Sum,
}

impl Sources {
    pub fn merge(&mut self, other: &Self) {
        self.q.merge(&other.q);
        self.k.merge(&other.k);
        self.requantization.merge(&other.requantization);
        self.pv.merge(&other.pv);
    }
}

/// Codes beyond the range, of all.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Clipped {
    pub clipped: u64,
    pub codes: u64,
}

impl Clipped {
    pub fn merge(&mut self, other: &Self) {
        self.clipped += other.clipped;
        self.codes += other.codes;
    }
}

/// One head under one configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct HeadState {
    /// fp32 input to both paths.
    pub alone: HeadStages,
    /// Each path on its own input.
    pub accumulated: HeadStages,
    pub q_clipped: Clipped,
    pub k_clipped: Clipped,
    pub sources: Sources,
}

impl HeadState {
    fn merge(&mut self, other: &Self) {
        self.alone.merge(&other.alone);
        self.accumulated.merge(&other.accumulated);
        self.q_clipped.merge(&other.q_clipped);
        self.k_clipped.merge(&other.k_clipped);
        self.sources.merge(&other.sources);
    }
}

/// One layer under one configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct LayerState {
    pub heads: Vec<HeadState>,
    /// What leaves the layer.
    pub alone: Stage,
    pub accumulated: Stage,
}

impl LayerState {
    pub fn new(heads: usize) -> Self {
        Self { heads: vec![HeadState::default(); heads], ..Self::default() }
    }

    pub fn merge(&mut self, other: &Self) {
        self.alone.merge(&other.alone);
        self.accumulated.merge(&other.accumulated);
        self.heads.iter_mut().zip(&other.heads).for_each(|(a, b)| a.merge(b));
    }
}

/// One configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct CandidateState {
    pub name: String,
    pub description: String,
    pub layers: Vec<LayerState>,
    /// What the model is used for.
    pub embedding: Stage,
    /// Seconds of one layer's attention; empty for what is not timed.
    pub seconds: Distribution,
}

impl CandidateState {
    pub fn merge(&mut self, other: &Self) {
        self.layers.iter_mut().zip(&other.layers).for_each(|(a, b)| a.merge(b));
        self.embedding.merge(&other.embedding);
        self.seconds.merge(&other.seconds);
    }
}
