//! What is gathered for a configuration, a layer, a head; all of it merges.

use crate::Result;
use crate::drift::merge::{Merge, merge_fields};
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

merge_fields!(Stage { pooled, sqnr_db, cosine_loss });

impl Stage {
    /// Adds a passage.
    pub fn push(&mut self, passage: &ErrorSums) {
        self.pooled.merge(passage);
        self.sqnr_db.push(passage.sqnr_db());
        self.cosine_loss.push(1.0 - passage.cosine());
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

merge_fields!(Probabilities { kl, total_variation, top1, top5, entropy_change });

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

merge_fields!(HeadStages { q, k, scores, probabilities, output, token_error });

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
}

/// Energy that each source of error alone adds to the attention output.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Sources {
    pub q: Sum,
    pub k: Sum,
    pub requantization: Sum,
    pub pv: Sum,
}

merge_fields!(Sources { q, k, requantization, pv });

/// Codes beyond the range, of all.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Clipped {
    pub clipped: u64,
    pub codes: u64,
}

merge_fields!(Clipped { clipped, codes });

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

merge_fields!(HeadState { alone, accumulated, q_clipped, k_clipped, sources });

/// One layer under one configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct LayerState {
    pub heads: Vec<HeadState>,
    /// What leaves the layer.
    pub alone: Stage,
    pub accumulated: Stage,
}

merge_fields!(LayerState { heads, alone, accumulated });

impl LayerState {
    pub fn new(heads: usize) -> Self {
        Self { heads: vec![HeadState::default(); heads], ..Self::default() }
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

/// Of the same configuration.
impl Merge for CandidateState {
    fn merge(&mut self, other: &Self) {
        self.layers.merge(&other.layers);
        self.embedding.merge(&other.embedding);
        self.seconds.merge(&other.seconds);
    }
}
