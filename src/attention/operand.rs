//! One side of the product: a float tensor, and how its rows become codes.

use super::view::View;
use crate::quant::rows::{BlockCodes, RowParams, quantize_block, row_range, subtract};
use crate::quant::{
    Granularity, MeanBuilder, QuantConfig, QuantParams, Range, RangeSource, Scheme, static_params,
};
use crate::{Error, Result};
use rayon::prelude::*;

/// Rows that are loaded and quantized at a time; they fit L1 and L2 at any head dim.
pub(super) const BLOCK: usize = 48;

/// A float tensor `[B, H, S, D]` with the choices of its quantization.
pub(super) struct Operand<'a> {
    view: View<'a>,
    scheme: Scheme,
    granularity: Granularity,
    /// One a group; `None` when every row has its own, found when the row is quantized.
    params: Option<Vec<QuantParams>>,
    /// `[heads, D]`: what smoothing subtracts.
    means: Option<Vec<f32>>,
}

/// Some rows of a head, quantized.
#[derive(Default)]
pub(super) struct QuantizedRows {
    /// The rows in f32, after smoothing.
    pub values: Vec<f32>,
    /// Their codes, row-major.
    pub codes: Vec<i8>,
    /// Their scales. NaN for a row that holds NaN or infinity, which makes its scores NaN.
    pub scales: Vec<f32>,
    /// Their zero points.
    pub zeros: Vec<i32>,
    /// The sums of their codes.
    pub sums: Vec<i32>,
}

impl<'a> Operand<'a> {
    /// Finds the means and ranges that the configuration asks for. Rows that are not finite take
    /// part in neither.
    pub(super) fn prepare(view: View<'a>, config: &QuantConfig, smooth: bool) -> Result<Self> {
        let groups = config.granularity.groups(view.heads(), view.tokens())?;
        let means = smooth.then(|| means(&view));
        let mut operand = Self {
            view,
            scheme: config.scheme,
            granularity: config.granularity,
            params: None,
            means,
        };
        operand.params = match (&config.range, config.granularity) {
            (RangeSource::Static(given), granularity) => {
                if let Some(other) = given.iter().find(|p| p.scheme() != config.scheme) {
                    return Err(Error::Config(format!(
                        "static parameters are {}, but the scheme is {}",
                        other.scheme(),
                        config.scheme
                    )));
                }
                Some(static_params(given, granularity, &operand.view.dims(), groups)?)
            }
            (RangeSource::Dynamic, Granularity::PerToken) => None,
            (RangeSource::Dynamic, _) => Some(operand.dynamic_params(groups)),
        };
        Ok(operand)
    }

    pub(super) fn view(&self) -> &View<'a> {
        &self.view
    }

    /// Whether every zero point is 0.
    pub(super) fn is_symmetric(&self) -> bool {
        self.scheme == Scheme::Symmetric
    }

    /// What smoothing subtracts from the rows of a head.
    pub(super) fn mean(&self, head: usize) -> Option<&[f32]> {
        let depth = self.view.depth();
        self.means.as_ref().map(|means| &means[head * depth..(head + 1) * depth])
    }

    /// Quantizes rows `tokens` of head `head` into `rows`.
    pub(super) fn quantize_rows(
        &self,
        head: usize,
        tokens: std::ops::Range<usize>,
        rows: &mut QuantizedRows,
    ) {
        let (count, depth) = (tokens.len(), self.view.depth());
        rows.values.resize(count * depth, 0.0);
        rows.codes.resize(count * depth, 0);
        rows.scales.resize(count, 0.0);
        rows.zeros.resize(count, 0);
        rows.sums.resize(count, 0);
        self.load_smoothed(head, tokens.clone(), &mut rows.values);
        if depth == 0 {
            rows.scales.fill(1.0);
            return;
        }
        let given: Vec<QuantParams>;
        let params = match &self.params {
            None => RowParams::Own(self.scheme),
            Some(params) => {
                let of_token =
                    |token| params[self.granularity.group(head, token, self.view.tokens())];
                given = tokens.map(of_token).collect();
                RowParams::Given(&given)
            }
        };
        let out = BlockCodes {
            codes: &mut rows.codes,
            scales: &mut rows.scales,
            zeros: &mut rows.zeros,
            sums: &mut rows.sums,
        };
        quantize_block(&rows.values, depth, params, out);
    }

    fn load_smoothed(&self, head: usize, tokens: std::ops::Range<usize>, out: &mut [f32]) {
        self.view.load_rows(head, tokens, out);
        if let Some(mean) = self.mean(head) {
            subtract(out, mean);
        }
    }

    /// The parameters of every group, from the ranges of the smoothed data.
    fn dynamic_params(&self, groups: usize) -> Vec<QuantParams> {
        let (heads, tokens) = (self.view.heads(), self.view.tokens());
        let of_head = |head: usize| {
            let mut ranges: Vec<(usize, Range)> = Vec::new();
            let mut buffer = Vec::new();
            for block in blocks(tokens) {
                buffer.resize(block.len() * self.view.depth(), 0.0);
                self.load_smoothed(head, block.clone(), &mut buffer);
                let rows = buffer.chunks_exact(self.view.depth().max(1));
                for (token, row) in block.zip(rows) {
                    let found = row_range(row);
                    let range = if found.finite { found.range } else { Range::EMPTY };
                    let group = self.granularity.group(head, token, tokens);
                    match ranges.last_mut() {
                        Some((last, union)) if *last == group => *union = union.union(range),
                        _ => ranges.push((group, range)),
                    }
                }
            }
            ranges
        };
        let mut ranges = vec![Range::EMPTY; groups];
        let found: Vec<_> = match self.view.is_small() {
            true => (0..heads).map(of_head).collect(),
            false => (0..heads).into_par_iter().map(of_head).collect(),
        };
        for (group, range) in found.into_iter().flatten() {
            ranges[group] = ranges[group].union(range);
        }
        ranges.into_iter().map(|r| QuantParams::from_finite_range(self.scheme, r)).collect()
    }
}

/// `0..tokens` in runs of [`BLOCK`].
pub(super) fn blocks(tokens: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..tokens).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(tokens))
}

/// The mean over tokens of every head, `[heads, D]`.
fn means(view: &View<'_>) -> Vec<f32> {
    let depth = view.depth();
    let mut means = vec![0f32; view.heads() * depth];
    if depth == 0 {
        return means;
    }
    let of_head = |(head, mean): (usize, &mut [f32])| {
        let mut builder = MeanBuilder::new(depth);
        let mut buffer = Vec::new();
        for block in blocks(view.tokens()) {
            buffer.resize(block.len() * depth, 0.0);
            view.load_rows(head, block, &mut buffer);
            builder.push(&buffer);
        }
        mean.copy_from_slice(&builder.finish());
    };
    match view.is_small() {
        true => means.chunks_exact_mut(depth).enumerate().for_each(of_head),
        false => means.par_chunks_exact_mut(depth).enumerate().for_each(of_head),
    }
    means
}
