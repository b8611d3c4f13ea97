//! One side of the product: a float tensor, and how its rows become codes.

use super::seen::Seen;
use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::{BlockCodes, Rows};
use crate::memory::{Aligned, footprint};
use crate::parallel;
use crate::product::RowSums;
use crate::quant::rows::{RowParams, quantize_block, row_range};
use crate::quant::{
    Conditioned, Conditioning, Granularity, KEY_BLOCK, MeanSums, QUERY_BLOCK, QuantConfig,
    QuantParams, RangeSource, Scheme, Smoothing, ValueRange,
};
use crate::view::View;
use std::ops::Range;

/// Whose rows they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Queries,
    Keys,
}

/// A float tensor `[B, H, S, D]` with the choices of its quantization. Rows of keys are counted among those
/// that are seen.
pub(super) struct Operand<'a> {
    level: Level,
    side: Side,
    view: View<'a>,
    scheme: Scheme,
    granularity: Granularity,
    conditioning: Conditioning,
    /// Whether parameters come from the data.
    dynamic: bool,
    /// One a group; `None` when every row has its own, found when the row is quantized.
    params: Option<Vec<QuantParams>>,
}

/// Memory for rows on their way to codes.
#[derive(Default)]
pub(super) struct Buffers {
    rows: Vec<f32>,
    gathered: Vec<f32>,
    values: Aligned<f32>,
    pub conditioned: Conditioned,
}

/// Some rows of a head, quantized.
#[derive(Default)]
pub(super) struct QuantizedRows {
    /// Their codes, row-major.
    pub codes: Aligned<i8>,
    /// Their scales. NaN for a row that holds NaN or infinity, which makes its scores NaN.
    pub scales: Aligned<f32>,
    /// Their zero points.
    pub zeros: Vec<i32>,
    /// The sums of their codes.
    pub sums: Vec<i32>,
}

impl<'a> Operand<'a> {
    /// Finds the ranges that the configuration asks for. Rows that are not finite, or that take no part,
    /// do not count.
    pub(super) fn prepare(
        level: Level,
        (side, view): (Side, View<'a>),
        config: &QuantConfig,
        conditioning: Conditioning,
        seen: &Seen,
    ) -> Result<Self> {
        let (groups, given) = config.groups(&view.dims())?;
        let (scheme, granularity) = (config.scheme, config.granularity);
        let dynamic = config.range == RangeSource::Dynamic;
        let params = given;
        let mut operand =
            Self { level, side, view, scheme, granularity, conditioning, dynamic, params };
        if dynamic && granularity != Granularity::PerToken {
            operand.params = Some(operand.dynamic_params(groups, seen));
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

    pub(super) fn conditioning(&self) -> &Conditioning {
        &self.conditioning
    }

    /// Rows that share a mean where smoothing is local.
    pub(super) fn block(&self) -> usize {
        match self.side {
            Side::Queries => QUERY_BLOCK,
            Side::Keys => KEY_BLOCK,
        }
    }

    /// How many rows of a head there are to quantize.
    pub(super) fn count(&self, head: usize, seen: &Seen) -> usize {
        match self.side {
            Side::Queries => self.view.tokens(),
            Side::Keys => seen.keys(head).len(),
        }
    }

    /// `0..count` in blocks.
    pub(super) fn blocks(&self, count: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let block = self.block();
        (0..count).step_by(block).map(move |start| start..(start + block).min(count))
    }

    /// The rows as they are.
    pub(super) fn rows<'b>(
        &'b self,
        (head, rows): (usize, Range<usize>),
        seen: &Seen,
        buffer: &'b mut Vec<f32>,
        gathered: &'b mut Vec<f32>,
    ) -> Rows<'b> {
        match self.side {
            Side::Queries => self.view.rows(head, rows, buffer),
            Side::Keys => seen.keys(head).rows(&self.view, head, rows, buffer, gathered),
        }
    }

    /// The scale of every row without conditioning, NaN for one that is not finite, in row-major
    /// order.
    pub(super) fn all_scales(&self, seen: &Seen) -> Vec<f32> {
        let (mut scales, mut buffers) = (Vec::new(), Buffers::default());
        let mut quantized = QuantizedRows::default();
        for head in 0..self.view.heads() {
            for rows in self.blocks(self.count(head, seen)) {
                self.quantize((head, rows), None, seen, &mut buffers, (&mut quantized, None));
                scales.extend_from_slice(&quantized.scales);
            }
        }
        scales
    }

    /// The mean of all rows of a head that take part and are finite, where it is that one which is
    /// subtracted.
    pub(super) fn head_mean(
        &self,
        head: usize,
        seen: &Seen,
        buffers: &mut Buffers,
    ) -> Option<Vec<f32>> {
        if self.conditioning.smoothing != Smoothing::Head {
            return None;
        }
        let (mut sums, mut mean) = (MeanSums::default(), Vec::new());
        let Buffers { rows: buffer, gathered, .. } = buffers;
        sums.start(self.view.depth());
        for block in self.blocks(self.count(head, seen)) {
            let rows = self.rows((head, block.clone()), seen, buffer, gathered);
            for run in self.runs_of_parts(head, block.clone(), seen) {
                sums.add(rows.part(run.start - block.start..run.end - block.start));
            }
        }
        sums.finish(&mut mean);
        Some(mean)
    }

    /// Those of `rows` that take part.
    fn runs_of_parts(&self, head: usize, rows: Range<usize>, seen: &Seen) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for row in rows.filter(|&row| self.takes_part(head, row, seen)) {
            match runs.last_mut() {
                Some(run) if run.end == row => run.end += 1,
                _ => runs.push(row..row + 1),
            }
        }
        runs
    }

    fn takes_part(&self, head: usize, row: usize, seen: &Seen) -> bool {
        self.side == Side::Keys || seen.asks(head, row)
    }

    /// Conditions rows of a head, to `to` or into the buffers, and returns them; where smoothing is local, they are
    /// one block. `true` if there was anything to do: their ranges are known then.
    fn condition<'b>(
        &'b self,
        (head, rows): (usize, Range<usize>),
        head_mean: Option<&[f32]>,
        seen: &Seen,
        buffers: &'b mut Buffers,
        to: Option<&'b mut [f32]>,
    ) -> (Rows<'b>, &'b Conditioned, bool) {
        let depth = self.view.depth();
        let Buffers { rows: buffer, gathered, values: own, conditioned } = buffers;
        if self.conditioning.is_nothing() {
            conditioned.clear();
            let rows = self.rows((head, rows), seen, buffer, gathered);
            if let Some(to) = to {
                let to = to.chunks_exact_mut(depth.max(1));
                rows.iter().zip(to).for_each(|(row, to)| to.copy_from_slice(row));
            }
            return (rows, conditioned, false);
        }
        own.resize(rows.len() * depth);
        let to = to.unwrap_or(own);
        let start = rows.start;
        let values = self.rows((head, rows), seen, buffer, gathered);
        let takes_part = |row: usize| self.takes_part(head, start + row, seen);
        let all = self.side == Side::Keys || seen.all_ask(head);
        let takes_part = (!all).then_some(&takes_part as &dyn Fn(usize) -> bool);
        let first = start == 0;
        let out = (&mut *conditioned, &mut *to);
        self.conditioning.apply(self.level, values, (takes_part, first), head_mean, out);
        (Rows::new(to, to.len().checked_div(depth).unwrap_or(0), depth, depth), conditioned, true)
    }

    /// Quantizes rows of a head into `out`, and copies them to `to`, conditioned.
    pub(super) fn quantize(
        &self,
        (head, rows): (usize, Range<usize>),
        head_mean: Option<&[f32]>,
        seen: &Seen,
        buffers: &mut Buffers,
        (out, to): (&mut QuantizedRows, Option<&mut [f32]>),
    ) {
        let (depth, count) = (self.view.depth(), rows.len());
        out.resize(count, depth);
        let (values, block, ranges) =
            self.condition((head, rows.clone()), head_mean, seen, buffers, to);
        if depth == 0 {
            // Sums of nothing are 0 at any scale.
            out.scales.fill(1.0);
            out.zeros.fill(0);
            return out.sums.fill(0);
        }
        let mut given: Vec<QuantParams>;
        let params = match &self.params {
            None => RowParams::Own(self.scheme),
            Some(_) => {
                given = rows.map(|row| self.params_of(head, row, seen)).collect();
                for &row in block.outliers.iter().filter(|_| self.dynamic) {
                    let range = row_range(values.row(row)).range;
                    given[row] = QuantParams::from_finite_range(self.scheme, range);
                }
                RowParams::Given(&given)
            }
        };
        let QuantizedRows { codes, scales, zeros, sums } = out;
        let ranges = ranges.then_some(&block.ranges);
        let out = BlockCodes { codes, scales, zeros, sums };
        quantize_block(self.level, (values, ranges), params, out);
    }

    /// Those of the group of a row.
    fn params_of(&self, head: usize, row: usize, seen: &Seen) -> QuantParams {
        let tokens = self.view.tokens();
        // What is given is given for the keys as they are in the tensor.
        let row = match self.side {
            Side::Keys if !self.dynamic => seen.keys(head).key(row),
            _ => row,
        };
        self.params.as_ref().expect("parameters by group")
            [self.granularity.group(head, row, tokens)]
    }

    /// The parameters of every group, from the ranges of the conditioned data.
    fn dynamic_params(&self, groups: usize, seen: &Seen) -> Vec<QuantParams> {
        let mut ranges = vec![ValueRange::EMPTY; groups];
        let found = parallel::map(0..self.view.heads(), |head| self.head_ranges(head, seen));
        for (group, range) in found.into_iter().flatten() {
            ranges[group] = ranges[group].union(range);
        }
        ranges.into_iter().map(|r| QuantParams::from_finite_range(self.scheme, r)).collect()
    }

    /// The range of each group that has rows in `head`.
    fn head_ranges(&self, head: usize, seen: &Seen) -> Vec<(usize, ValueRange)> {
        let (depth, tokens) = (self.view.depth(), self.view.tokens());
        let mut buffers = Buffers::default();
        let mean = self.head_mean(head, seen, &mut buffers);
        let mut ranges: Vec<(usize, ValueRange)> = Vec::new();
        for block in self.blocks(self.count(head, seen)).filter(|_| depth > 0) {
            let rows = (head, block.clone());
            let (values, found, _) =
                self.condition(rows, mean.as_deref(), seen, &mut buffers, None);
            for (index, row) in block.enumerate() {
                if !self.takes_part(head, row, seen) || found.outliers.contains(&index) {
                    continue;
                }
                let range = row_range(values.row(index));
                let range = if range.finite { range.range } else { ValueRange::EMPTY };
                let group = self.granularity.group(head, row, tokens);
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
    /// For the packed product.
    pub(super) fn sums(&self) -> RowSums<'_> {
        RowSums { sums: &self.sums, zeros: &self.zeros }
    }

    /// Makes one of the rows 0.
    pub(super) fn forget(&mut self, row: usize, depth: usize) {
        self.codes[row * depth..(row + 1) * depth].fill(0);
        (self.scales[row], self.zeros[row], self.sums[row]) = (0.0, 0, 0);
    }

    pub(super) fn resize(&mut self, rows: usize, depth: usize) {
        self.codes.resize(rows * depth);
        self.scales.resize(rows);
        self.zeros.resize(rows, 0);
        self.sums.resize(rows, 0);
    }
}

footprint!(Buffers: rows, gathered, values, conditioned);

footprint!(QuantizedRows: codes, scales, zeros, sums);
