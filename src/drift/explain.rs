//! Why a head drifts: the shape of its queries, keys and attention, and what is unusual about it.

use super::merge::{Merge, merge_fields};
use super::recorder::call::Reference;
use super::{Sum, Summary};
use crate::quant::mean_of_rows;
use serde::{Deserialize, Serialize};

/// The largest of something over all passages, and where it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Peak {
    /// How large.
    pub value: f64,
    /// Which channel, or which token of the passage.
    pub index: usize,
    /// The token's word; empty for a channel.
    pub word: String,
    /// In which passage, counted from 0.
    pub passage: u64,
}

/// Keeps the larger of two peaks; among equals the earlier passage.
impl Merge for Option<Peak> {
    fn merge(&mut self, other: &Self) {
        let Some(other) = other else { return };
        let higher = self.as_ref().is_none_or(|peak| {
            other.value > peak.value || (other.value == peak.value && other.passage < peak.passage)
        });
        if higher {
            *self = Some(other.clone());
        }
    }
}

/// What queries, or keys, of one head look like.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct SideState {
    /// Of all numbers.
    values: Summary,
    /// `|mean of a channel| / median spread of the channels`.
    channel_bias: Option<Peak>,
    /// `max|channel| / median over channels of that`.
    channel_outlier: Option<Peak>,
    /// `max|token| / median over tokens of that`.
    token_outlier: Option<Peak>,
    /// Sum of squared largest values of the tokens, as they are and without their mean.
    as_is: Sum,
    smoothed: Sum,
}

merge_fields!(SideState { values, channel_bias, channel_outlier, token_outlier, as_is, smoothed });

/// One head, whatever the configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct HeadShape {
    q: SideState,
    k: SideState,
    /// Mean probability of the most attended key, one number a passage.
    sink: Summary,
    sink_peak: Option<Peak>,
    /// Entropy of the probabilities over the largest possible, one number a query.
    uniformity: Summary,
}

merge_fields!(HeadShape { q, k, sink, sink_peak, uniformity });

impl SideState {
    fn push(&mut self, data: &[f32], depth: usize, words: &[String], passage: u64) {
        if data.is_empty() || depth == 0 {
            return;
        }
        data.iter().for_each(|&x| self.values.push(f64::from(x)));
        let at = |(index, value): (usize, f64), word: &str| Peak {
            value,
            index,
            word: word.trim().to_string(),
            passage,
        };
        let mean = mean_of_rows(data, depth);
        let tokens = (data.len() / depth) as f64;
        let (mut spread, mut channel_max) = (vec![0f64; depth], vec![0f64; depth]);
        let (mut token_max, mut smooth_max) = (Vec::new(), Vec::new());
        for row in data.chunks_exact(depth) {
            let (mut largest, mut smooth) = (0f64, 0f64);
            for (channel, (&x, &mean)) in row.iter().zip(&mean).enumerate() {
                let (x, rest) = (f64::from(x).abs(), f64::from(x - mean).abs());
                spread[channel] += rest * rest / tokens;
                channel_max[channel] = channel_max[channel].max(x);
                (largest, smooth) = (largest.max(x), smooth.max(rest));
            }
            token_max.push(largest);
            smooth_max.push(smooth);
        }
        let squares = |all: &[f64]| all.iter().map(|x| x * x).sum::<f64>();
        self.as_is.add(squares(&token_max));
        self.smoothed.add(squares(&smooth_max));

        let spread: Vec<f64> = spread.into_iter().map(f64::sqrt).collect();
        let bias: Vec<f64> = mean.iter().map(|&m| f64::from(m).abs()).collect();
        self.channel_bias.merge(&Some(at(largest_over(&bias, median(&spread)), "")));
        let outlier = largest_over(&channel_max, median(&channel_max));
        self.channel_outlier.merge(&Some(at(outlier, "")));
        let outlier = largest_over(&token_max, median(&token_max));
        let word = words.get(outlier.0).map_or("", String::as_str);
        self.token_outlier.merge(&Some(at(outlier, word)));
    }

    fn shape(&self) -> SideShape {
        let gain = 10.0 * (self.as_is.value() / self.smoothed.value()).log10();
        SideShape {
            min: self.values.min(),
            max: self.values.max(),
            channel_bias: self.channel_bias.clone(),
            channel_outlier: self.channel_outlier.clone(),
            token_outlier: self.token_outlier.clone(),
            smoothing_gain_db: if gain.is_finite() { gain } else { 0.0 },
        }
    }
}

/// The largest value with its place, as a multiple of `unit`; 0 where there is no unit.
fn largest_over(values: &[f64], unit: f64) -> (usize, f64) {
    let largest = values.iter().copied().enumerate().reduce(|a, b| if b.1 > a.1 { b } else { a });
    match largest {
        Some((index, value)) if unit > 0.0 => (index, value / unit),
        _ => (0, 0.0),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

impl HeadShape {
    /// Refuses what no queries and keys look like: for what was read from a file.
    pub(super) fn check(&self) -> Result<(), String> {
        let sides = [&self.q.values, &self.k.values];
        sides.into_iter().chain([&self.sink, &self.uniformity]).try_for_each(Summary::check)
    }

    /// Adds one head of a passage.
    pub fn push(&mut self, call: &Reference, head: usize, words: &[String], passage: u64) {
        let dims = call.dims;
        let (q_size, k_size) = (dims.queries * dims.depth, dims.keys * dims.depth);
        self.q.push(&call.q[head * q_size..][..q_size], dims.depth, words, passage);
        let key_head = dims.key_head(head);
        self.k.push(&call.k[key_head * k_size..][..k_size], dims.depth, words, passage);

        let size = dims.queries * dims.keys;
        let mut mean = vec![0f64; dims.keys];
        let mut rows = 0;
        let matrix = call.probabilities[head * size..][..size].chunks_exact(dims.keys.max(1));
        for (row, entropy) in matrix.zip(&call.entropies[head * dims.queries..]) {
            let seen = row.iter().filter(|&&p| p > 0.0).count();
            if seen < 2 {
                continue;
            }
            rows += 1;
            self.uniformity.push(entropy / (seen as f64).ln());
            mean.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
        // With fewer keys, one of them has a large share anyway.
        if rows < FEWEST_KEYS {
            return;
        }
        let (index, value) = largest_over(&mean, rows as f64);
        self.sink.push(value);
        let word = words.get(index).map_or("", String::as_str).trim().to_string();
        self.sink_peak.merge(&Some(Peak { value, index, word, passage }));
    }

    /// The figures for a report.
    pub fn facts(&self, head: usize) -> HeadFacts {
        HeadFacts {
            head,
            q: self.q.shape(),
            k: self.k.shape(),
            sink_share: self.sink.mean(),
            sink: self.sink_peak.clone(),
            uniformity: self.uniformity.mean(),
        }
    }
}

const FEWEST_KEYS: usize = 8;

/// What queries, or keys, of one head look like.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SideShape {
    /// The smallest number.
    pub min: f64,
    /// The largest number.
    pub max: f64,
    /// The channel with the largest mean, as a multiple of the median spread (standard deviation)
    /// of the channels; the worst passage.
    pub channel_bias: Option<Peak>,
    /// The channel with the largest number, as a multiple of the median over channels.
    pub channel_outlier: Option<Peak>,
    /// The token with the largest number, as a multiple of the median over tokens.
    pub token_outlier: Option<Peak>,
    /// How much smaller the squared steps of one scale a token become when the mean is subtracted,
    /// in dB: what smoothing wins.
    pub smoothing_gain_db: f64,
}

/// What one head looks like, whatever the configuration.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct HeadFacts {
    /// Its number.
    pub head: usize,
    /// Queries.
    pub q: SideShape,
    /// Keys.
    pub k: SideShape,
    /// Mean probability of the most attended key of a passage, over passages.
    pub sink_share: f64,
    /// The most attended key of all.
    pub sink: Option<Peak>,
    /// Entropy of the probabilities over that of equal shares, mean over queries.
    pub uniformity: f64,
}

/// What is unusual about a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Cause {
    /// A channel of the keys is far from zero for all tokens.
    KeyChannelBias,
    /// A channel of the queries is far from zero for all tokens.
    QueryChannelBias,
    /// A key much larger than the others of its passage.
    OutlierKey,
    /// A query much larger than the others of its passage.
    OutlierQuery,
    /// One key has most of the attention of all queries.
    AttentionSink,
    /// All keys have nearly the same share.
    NearUniform,
}

/// Something unusual about a head, and what it means for int8.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// Which layer.
    pub layer: usize,
    /// Which head.
    pub head: usize,
    /// What it is.
    pub cause: Cause,
    /// How far beyond the threshold of its cause, 1 = just there.
    pub severity: f64,
    /// In words, with the numbers.
    pub text: String,
}

/// From where on something is unusual. Gaussian data stays well below each.
const BIAS: f64 = 6.0;
const OUTLIER: f64 = 5.0;
const SINK: f64 = 0.5;
const UNIFORM: f64 = 0.97;

/// Everything unusual about a head.
pub(crate) fn findings(layer: usize, facts: &HeadFacts) -> Vec<Finding> {
    let head = facts.head;
    let finding = |cause, severity: f64, text| {
        (severity >= 1.0).then_some(Finding { layer, head, cause, severity, text })
    };
    let bias = |cause, what: &str, short: &str, side: &SideShape| {
        let peak = side.channel_bias.as_ref()?;
        let text = format!(
            "channel {} of the {what} has a mean of {:.0} times the usual spread; smooth-{short} \
             takes {:.1} dB of error away",
            peak.index, peak.value, side.smoothing_gain_db
        );
        finding(cause, peak.value / BIAS, text)
    };
    let outlier = |cause, what: &str, side: &SideShape| {
        let peak = side.token_outlier.as_ref()?;
        let text = format!(
            "the {what} of token {} {:?} in passage {} is {:.0} times as large as usual; with one \
             scale a token only its own scores suffer",
            peak.index, peak.word, peak.passage, peak.value
        );
        finding(cause, peak.value / OUTLIER, text)
    };
    let sink = || {
        let peak = facts.sink.as_ref()?;
        let text = format!(
            "{:.0} % of all attention goes to one key, token {} {:?}; an error of its score is in \
             every row",
            100.0 * facts.sink_share,
            peak.index,
            peak.word
        );
        finding(Cause::AttentionSink, facts.sink_share / SINK, text)
    };
    let uniform = || {
        let text = format!(
            "attention is nearly uniform ({:.1} % of the largest entropy): the top keys differ by \
             little, so top-1 agreement says little here",
            100.0 * facts.uniformity
        );
        finding(Cause::NearUniform, facts.uniformity / UNIFORM, text)
    };
    [
        bias(Cause::KeyChannelBias, "keys", "K", &facts.k),
        bias(Cause::QueryChannelBias, "queries", "Q", &facts.q),
        outlier(Cause::OutlierKey, "key", &facts.k),
        outlier(Cause::OutlierQuery, "query", &facts.q),
        sink(),
        uniform(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
