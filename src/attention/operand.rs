//! One side of the product: a float tensor, and how its rows become codes.

use super::engine::blocks;
use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::{BlockCodes, Rows};
use crate::memory::Footprint;
use crate::parallel;
use crate::quant::rows::{RowParams, quantize_block, row_range};
use crate::quant::{Granularity, MeanSums, QuantConfig, QuantParams, Scheme, ValueRange};
use crate::view::View;

/// A float tensor `[B, H, S, D]` with the choices of its quantization.
pub(super) struct Operand<'a> {
    level: Level,
    view: View<'a>,
    scheme: Scheme,
    granularity: Granularity,
    smooth: bool,
    /// One a group; `None` when every row has its own, found when the row is quantized.
    params: Option<Vec<QuantParams>>,
}

/// What smoothing subtracts from the rows of one head, with the memory that finding it takes.
#[derive(Default)]
pub(super) struct Mean {
    values: Vec<f32>,
    used: bool,
    sums: MeanSums,
    buffer: Vec<f32>,
}

impl Mean {
    /// `None` without smoothing.
    pub(super) fn get(&self) -> Option<&[f32]> {
        self.used.then_some(&self.values)
    }
}

/// Some rows of a head, quantized.
#[derive(Default)]
pub(super) struct QuantizedRows {
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
    /// Finds the ranges that the configuration asks for. Rows that are not finite take no part.
    pub(super) fn prepare(
        level: Level,
        view: View<'a>,
        config: &QuantConfig,
        smooth: bool,
    ) -> Result<Self> {
        let (groups, given) = config.groups(&view.dims())?;
        let (scheme, granularity) = (config.scheme, config.granularity);
        let mut operand = Self { level, view, scheme, granularity, smooth, params: given };
        if operand.params.is_none() && granularity != Granularity::PerToken {
            operand.params = Some(operand.dynamic_params(groups));
        }
        Ok(operand)
    }

    pub(super) fn view(&self) -> &View<'a> {
        &self.view
    }

    /// Whether every zero point is 0.
    pub(super) fn is_symmetric(&self) -> bool {
        self.scheme == Scheme::Symmetric
    }

    /// The scale of every row without smoothing, NaN for one that is not finite, in row-major
    /// order.
    pub(super) fn all_scales(&self) -> Vec<f32> {
        let (mut scales, mut buffer) = (Vec::new(), Vec::new());
        let mut quantized = QuantizedRows::default();
        for head in 0..self.view.heads() {
            for tokens in blocks(self.view.tokens()) {
                let rows = self.view.rows(head, tokens.clone(), &mut buffer);
                self.quantize(rows, (head, tokens), None, &mut quantized);
                scales.extend_from_slice(&quantized.scales);
            }
        }
        scales
    }

    /// What smoothing subtracts from the rows of a head: their mean, without those that are not
    /// finite.
    pub(super) fn find_mean(&self, head: usize, mean: &mut Mean) {
        mean.used = self.smooth;
        if self.smooth {
            mean.sums.start(self.view.depth());
            for block in blocks(self.view.tokens()) {
                mean.sums.add(self.view.rows(head, block, &mut mean.buffer));
            }
            mean.sums.finish(&mut mean.values);
        }
    }

    /// Quantizes the rows `tokens` of head `head`, less their `mean`, into `out`.
    pub(super) fn quantize(
        &self,
        rows: Rows<'_>,
        (head, tokens): (usize, std::ops::Range<usize>),
        mean: Option<&[f32]>,
        out: &mut QuantizedRows,
    ) {
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
        out.resize(rows.count(), rows.depth());
        if rows.depth() == 0 {
            // Sums of nothing are 0 at any scale.
            out.scales.fill(1.0);
            out.zeros.fill(0);
            return out.sums.fill(0);
        }
        let QuantizedRows { codes, scales, zeros, sums } = out;
        quantize_block(self.level, rows, mean, params, BlockCodes { codes, scales, zeros, sums });
    }

    /// The parameters of every group, from the ranges of the smoothed data.
    fn dynamic_params(&self, groups: usize) -> Vec<QuantParams> {
        let mut ranges = vec![ValueRange::EMPTY; groups];
        let found = parallel::map(0..self.view.heads(), |head| self.head_ranges(head));
        for (group, range) in found.into_iter().flatten() {
            ranges[group] = ranges[group].union(range);
        }
        ranges.into_iter().map(|r| QuantParams::from_finite_range(self.scheme, r)).collect()
    }

    /// The range of each group that has rows in `head`.
    fn head_ranges(&self, head: usize) -> Vec<(usize, ValueRange)> {
        let (depth, tokens) = (self.view.depth(), self.view.tokens());
        let (zeros, mut mean) = (vec![0.0; depth], Mean::default());
        self.find_mean(head, &mut mean);
        let mean = mean.get().unwrap_or(&zeros);
        let mut ranges: Vec<(usize, ValueRange)> = Vec::new();
        let (mut buffer, mut smoothed) = (Vec::new(), vec![0.0; depth]);
        for block in blocks(tokens) {
            let rows = self.view.rows(head, block.clone(), &mut buffer);
            for (token, row) in block.zip(rows.iter()) {
                let from = row.iter().zip(mean);
                smoothed.iter_mut().zip(from).for_each(|(to, (x, mean))| *to = x - mean);
                let found = row_range(&smoothed);
                let range = if found.finite { found.range } else { ValueRange::EMPTY };
                let group = self.granularity.group(head, token, tokens);
                match ranges.last_mut() {
                    Some((last, union)) if *last == group => *union = union.union(range),
                    _ => ranges.push((group, range)),
                }
            }
        }
        ranges
    }
}

impl QuantizedRows {
    pub(super) fn resize(&mut self, rows: usize, depth: usize) {
        self.codes.resize(rows * depth, 0);
        self.scales.resize(rows, 0.0);
        self.zeros.resize(rows, 0);
        self.sums.resize(rows, 0);
    }
}

impl Footprint for Mean {
    fn footprint(&self) -> usize {
        self.values.footprint() + self.sums.footprint() + self.buffer.footprint()
    }
}

impl Footprint for QuantizedRows {
    fn footprint(&self) -> usize {
        let Self { codes, scales, zeros, sums } = self;
        codes.footprint() + scales.footprint() + zeros.footprint() + sums.footprint()
    }
}
