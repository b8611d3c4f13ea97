//! The figures of a report, computed from what a recorder holds.

use crate::drift::recorder::state::{
    CandidateState, Clipped, HeadStages, HeadState, LayerState, Probabilities, Sources, Stage,
};
use crate::drift::{Distribution, Drift, Summary};
use serde::Serialize;

/// One number over passages or tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Stat {
    /// Mean of the finite ones.
    pub mean: f64,
    /// Standard error of the mean.
    pub standard_error: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Stat {
    /// The same of `1 - x`.
    fn below_one(self) -> Self {
        let Self { mean, standard_error, min, max } = self;
        Self { mean: 1.0 - mean, standard_error, min: 1.0 - max, max: 1.0 - min }
    }
}

impl From<&Summary> for Stat {
    fn from(summary: &Summary) -> Self {
        Self {
            mean: summary.mean(),
            standard_error: summary.standard_error(),
            min: summary.min(),
            max: summary.max(),
        }
    }
}

/// A stage of a head, or what leaves a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct StageFigures {
    /// Signal-to-noise ratio, one value a passage.
    pub sqnr_db: Stat,
    /// Cosine, one value a passage.
    pub cosine: Stat,
    /// All metrics over all passages as one.
    pub pooled: Drift,
}

impl From<&Stage> for StageFigures {
    fn from(stage: &Stage) -> Self {
        Self {
            sqnr_db: Stat::from(&stage.sqnr_db),
            cosine: Stat::from(&stage.cosine_loss).below_one(),
            pooled: Drift::from(&stage.pooled),
        }
    }
}

/// The attention probabilities, one value a query.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ProbabilityFigures {
    /// KL divergence in nats.
    pub kl: Stat,
    /// Median of it.
    pub kl_p50: f64,
    /// 99th percentile of it.
    pub kl_p99: f64,
    /// Total variation.
    pub total_variation: Stat,
    /// Share of queries with the same most attended key.
    pub top1: Stat,
    /// Share of the five most attended keys that is the same.
    pub top5: Stat,
    /// Entropy in int8 minus entropy in fp32, in nats.
    pub entropy_change: Stat,
}

impl From<&Probabilities> for ProbabilityFigures {
    fn from(p: &Probabilities) -> Self {
        Self {
            kl: Stat::from(p.kl.summary()),
            kl_p50: p.kl.quantile(0.5),
            kl_p99: p.kl.quantile(0.99),
            total_variation: Stat::from(&p.total_variation),
            top1: Stat::from(&p.top1),
            top5: Stat::from(&p.top5),
            entropy_change: Stat::from(&p.entropy_change),
        }
    }
}

/// The error of the attention output relative to its length, one value a query.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TokenError {
    /// Mean and extremes.
    #[serde(flatten)]
    pub stat: Stat,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl From<&Distribution> for TokenError {
    fn from(distribution: &Distribution) -> Self {
        Self {
            stat: Stat::from(distribution.summary()),
            p50: distribution.quantile(0.5),
            p90: distribution.quantile(0.9),
            p99: distribution.quantile(0.99),
        }
    }
}

/// All stages of a head.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HeadFigures {
    /// Queries as their codes have them.
    pub q: StageFigures,
    /// Keys as their codes have them.
    pub k: StageFigures,
    /// Raw scores of the keys that a query sees.
    pub scores: StageFigures,
    /// Probabilities.
    pub probabilities: ProbabilityFigures,
    /// The attention output.
    pub output: StageFigures,
    /// The attention output, token by token.
    pub token_error: TokenError,
}

impl From<&HeadStages> for HeadFigures {
    fn from(stages: &HeadStages) -> Self {
        Self {
            q: StageFigures::from(&stages.q),
            k: StageFigures::from(&stages.k),
            scores: StageFigures::from(&stages.scores),
            probabilities: ProbabilityFigures::from(&stages.probabilities),
            output: StageFigures::from(&stages.output),
            token_error: TokenError::from(&stages.token_error),
        }
    }
}

/// Where the error of the attention output comes from, as shares of 1; only of the main
/// configuration. Each source is measured with the others exact.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Shares {
    /// Rounding of the queries.
    pub q: f64,
    /// Rounding of the keys.
    pub k: f64,
    /// Scores that went through int8.
    pub requantization: f64,
    /// Probabilities times values in bf16.
    pub pv: f64,
}

impl Shares {
    fn of(sources: &Sources) -> Option<Self> {
        let Sources { q, k, requantization, pv } = sources;
        let [q, k, requantization, pv] = [q, k, requantization, pv].map(|sum| sum.value());
        let all = q + k + requantization + pv;
        (all > 0.0).then(|| Self {
            q: q / all,
            k: k / all,
            requantization: requantization / all,
            pv: pv / all,
        })
    }
}

/// One head.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HeadReport {
    /// Its number.
    pub head: usize,
    /// fp32 input to both paths.
    pub alone: HeadFigures,
    /// Each path on its own input.
    pub accumulated: HeadFigures,
    /// Share of the codes of Q that lie beyond the range.
    pub q_clipped: f64,
    /// The same of K.
    pub k_clipped: f64,
    /// Percentiles of the relative error of a token's attention output, fp32 input, for charts.
    #[serde(skip)]
    pub(super) token_percentiles: Vec<f64>,
    /// Where the error comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<Shares>,
}

impl HeadReport {
    fn of(head: usize, state: &HeadState) -> Self {
        let share = |c: Clipped| c.clipped as f64 / c.codes.max(1) as f64;
        Self {
            head,
            alone: HeadFigures::from(&state.alone),
            accumulated: HeadFigures::from(&state.accumulated),
            q_clipped: share(state.q_clipped),
            k_clipped: share(state.k_clipped),
            token_percentiles: shares().map(|s| state.alone.token_error.quantile(s)).collect(),
            shares: Shares::of(&state.sources),
        }
    }
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LayerReport {
    /// Its number.
    pub layer: usize,
    /// Signal-to-noise ratio of the attention output, mean over heads and passages, fp32 input.
    pub mean_sqnr_db: f64,
    /// Mean KL divergence of the probabilities, over heads and queries.
    pub mean_kl: f64,
    /// What leaves the layer, fp32 input to both paths.
    pub output_alone: StageFigures,
    /// What leaves the layer, each path on its own input.
    pub output_accumulated: StageFigures,
    /// Its heads.
    pub heads: Vec<HeadReport>,
}

impl LayerReport {
    fn of(layer: usize, state: &LayerState) -> Self {
        let heads: Vec<HeadReport> =
            state.heads.iter().enumerate().map(|(i, head)| HeadReport::of(i, head)).collect();
        Self {
            layer,
            mean_sqnr_db: mean_sqnr(heads.iter()),
            mean_kl: mean(heads.iter().map(|head| head.alone.probabilities.kl.mean)),
            output_alone: StageFigures::from(&state.alone),
            output_accumulated: StageFigures::from(&state.accumulated),
            heads,
        }
    }
}

/// A head with a value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Place {
    /// Its layer.
    pub layer: usize,
    /// Its number.
    pub head: usize,
    /// The value.
    pub value: f64,
}

/// The attention output of all heads of all layers, fp32 input to both paths.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct OutputFigures {
    /// Signal-to-noise ratio, mean over everything.
    pub mean_sqnr_db: f64,
    /// The layer with the lowest mean.
    pub lowest_layer: usize,
    /// Its mean.
    pub lowest_layer_sqnr_db: f64,
    /// The head with the lowest mean over passages.
    pub worst_head: Place,
    /// The lowest value of any head in any passage.
    pub worst_passage: Place,
    /// The lowest cosine of any head in any passage.
    pub min_cosine: f64,
    /// Mean KL divergence of the probabilities, in nats.
    pub mean_kl: f64,
    /// Share of queries with the same most attended key.
    pub top1: f64,
    /// Share of the five most attended keys that is the same.
    pub top5: f64,
}

/// Time of one layer's attention: the lower quartile over layers and passages, which what else the
/// machine does disturbs less than the median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Timing {
    /// Candle's fp32 operations, in milliseconds.
    pub fp32_ms: f64,
    /// This configuration.
    pub int8_ms: f64,
    /// How many times as fast.
    pub speedup: f64,
}

/// One configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ConfigReport {
    /// Its name.
    pub name: String,
    /// All of it in words.
    pub description: String,
    /// Whether it is the one that is explained.
    pub main: bool,
    /// Its attention output.
    pub output: OutputFigures,
    /// The model's embedding with int8 in every layer.
    pub embedding: StageFigures,
    /// How long its attention took, which differs from run to run; nothing for bf16, which is computed in
    /// f32.
    pub timing: Option<Timing>,
    /// Its layers.
    pub layers: Vec<LayerReport>,
}

impl ConfigReport {
    pub(super) fn of(state: &CandidateState, main: bool, fp32: &Distribution) -> Self {
        let layers: Vec<LayerReport> =
            state.layers.iter().enumerate().map(|(i, layer)| LayerReport::of(i, layer)).collect();
        let (fp32_ms, int8_ms) = (1e3 * fp32.quantile(0.25), 1e3 * state.seconds.quantile(0.25));
        let timing = Timing { fp32_ms, int8_ms, speedup: fp32_ms / int8_ms };
        Self {
            name: state.name.clone(),
            description: state.description.clone(),
            main,
            output: OutputFigures::of(&layers),
            embedding: StageFigures::from(&state.embedding),
            timing: (state.seconds.summary().count() > 0).then_some(timing),
            layers,
        }
    }
}

impl OutputFigures {
    fn of(layers: &[LayerReport]) -> Self {
        let heads = || layers.iter().flat_map(|layer| &layer.heads);
        let probabilities = |value: fn(&ProbabilityFigures) -> f64| {
            mean(heads().map(|head| value(&head.alone.probabilities)))
        };
        let lowest = layers.iter().min_by(|a, b| by_value(a.mean_sqnr_db, b.mean_sqnr_db));
        let cosines = heads().map(|head| head.alone.output.cosine.min);
        Self {
            mean_sqnr_db: mean_sqnr(heads()),
            lowest_layer: lowest.map_or(0, |layer| layer.layer),
            lowest_layer_sqnr_db: lowest.map_or(0.0, |layer| layer.mean_sqnr_db),
            worst_head: worst(layers, |head| head.alone.output.sqnr_db.mean),
            worst_passage: worst(layers, |head| head.alone.output.sqnr_db.min),
            min_cosine: cosines.fold(1.0, |a, b| if b.is_nan() { b } else { a.min(b) }),
            mean_kl: probabilities(|p| p.kl.mean),
            top1: probabilities(|p| p.top1.mean),
            top5: probabilities(|p| p.top5.mean),
        }
    }
}

/// NaN is the lowest of all: it must be seen.
pub(super) fn by_value(a: f64, b: f64) -> std::cmp::Ordering {
    b.is_nan().cmp(&a.is_nan()).then(a.total_cmp(&b))
}

fn worst(layers: &[LayerReport], value: fn(&HeadReport) -> f64) -> Place {
    let places = layers.iter().flat_map(|layer| {
        let place = move |head: &HeadReport| Place {
            layer: layer.layer,
            head: head.head,
            value: value(head),
        };
        layer.heads.iter().map(place)
    });
    let none = Place { layer: 0, head: 0, value: 0.0 };
    places.min_by(|a, b| by_value(a.value, b.value)).unwrap_or(none)
}

/// Over the heads that differ at all; infinite if none does.
fn mean_sqnr<'a>(heads: impl Iterator<Item = &'a HeadReport>) -> f64 {
    let mut all = Summary::default();
    heads.for_each(|head| all.push(head.alone.output.sqnr_db.mean));
    all.mean()
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let mut all = Summary::default();
    values.for_each(|value| all.push(value));
    all.mean()
}

/// Shares of the tokens for which a percentile is looked up.
const STEPS: usize = 200;

/// Shares from the smallest to the largest, in the middles of equal steps.
pub(super) fn shares() -> impl Iterator<Item = f64> {
    (0..STEPS).map(|i| (i as f64 + 0.5) / STEPS as f64)
}
