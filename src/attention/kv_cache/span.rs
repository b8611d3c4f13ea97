//! Attention of some rows over one span of keys, and how spans are merged.

use super::attend::{Block, Engine, Span};
use super::head::{GROUP, PAGE, Rows};
use super::product::product_f32;
use crate::attention::fused::softmax_alone;
use crate::gemm::{self, ScoreScales};
use crate::quant::rows::{self, dots};
use crate::simd::widest;
use crate::uninit::overwrite;
use std::cell::RefCell;
use std::ops::Range;

/// Attention over one span, or several: of each row the largest score and the sum of
/// `2^(score - max)`, and the sums of values that have the same factors.
pub(super) struct Partial {
    softmax: Vec<(f32, f32)>,
    /// `[rows, Dv]`.
    sums: Vec<f32>,
    value_dim: usize,
}

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Partial {
    /// What is neutral to a merge.
    pub(super) fn nothing(rows: usize, value_dim: usize) -> Self {
        let softmax = vec![(f32::NEG_INFINITY, 0.0); rows];
        Self { softmax, sums: vec![0.0; rows * value_dim], value_dim }
    }

    /// Attention over one span.
    pub(super) fn over(engine: &Engine<'_>, block: &Block<'_>, span: &Span) -> Self {
        SCORES.with_borrow_mut(|scores| Self::over_with(engine, block, span, scores))
    }

    fn over_with(
        engine: &Engine<'_>,
        block: &Block<'_>,
        span: &Span,
        scores: &mut Vec<f32>,
    ) -> Self {
        let head = block.head;
        let tokens = match span {
            Span::Sinks => 0..head.sinks.tokens,
            Span::Pages(tokens) => tokens.clone(),
            Span::Recent => head.packed..head.packed + head.recent.tokens,
        };
        // Whole panels of keys.
        let (rows, stride) = (block.rows.len(), tokens.len().next_multiple_of(PAGE));
        scores.resize((2 * rows * stride).max(scores.len()), 0.0);
        let scores = &mut scores[..2 * rows * stride];
        match span {
            Span::Sinks => float_scores(engine, block, &head.sinks, scores, stride),
            Span::Pages(_) => page_scores(engine, block, tokens.clone(), scores, stride),
            Span::Recent => float_scores(engine, block, &head.recent, scores, stride),
        }
        let visible: Vec<Range<usize>> =
            (0..rows).map(|row| inside(engine, block, row, span, &tokens)).collect();
        for (row, inside) in visible.iter().enumerate() {
            let keys = tokens.start + inside.start..tokens.start + inside.end;
            let scores = &mut scores[row * stride..][inside.clone()];
            let (head, query) = block.rows[row];
            let at = [block.sequence, head, query];
            engine.between.apply(at, block.positions.position(0, query), keys, scores);
        }
        let scores = &mut scores[..rows * stride];
        let softmax = softmax_alone(scores, stride, tokens.len(), &visible);
        let mut partial = Self { softmax, ..Self::nothing(rows, engine.value_dim) };
        match span {
            Span::Sinks => partial.add_rows(&head.sinks, scores, stride),
            Span::Pages(_) => partial.add_pages(engine, block, &tokens, scores, stride),
            Span::Recent => partial.add_rows(&head.recent, scores, stride),
        }
        partial
    }

    /// Adds the values of pages, multiplied by their probabilities.
    fn add_pages(
        &mut self,
        engine: &Engine<'_>,
        block: &Block<'_>,
        tokens: &Range<usize>,
        probs: &mut [f32],
        stride: usize,
    ) {
        for (start, used, page) in block.head.pages_of(tokens.clone()) {
            let used = used.min(tokens.end - start);
            let probs = &mut probs[start - tokens.start..];
            page.values.accumulate(used, probs, stride, &mut self.sums, engine.many);
        }
    }

    /// Adds values that are kept in f32, multiplied by their probabilities.
    fn add_rows(&mut self, rows: &Rows, probs: &[f32], stride: usize) {
        let dim = self.value_dim;
        if rows.values.iter().all(|x| x.is_finite()) {
            return product_f32(&rows.values, dim, probs, stride, &mut self.sums);
        }
        // What a row does not see must not leak through 0 * NaN.
        for (key, values) in rows.values.chunks_exact(dim).enumerate() {
            let probs = probs[key..].iter().step_by(stride);
            for (sums, p) in self.sums.chunks_exact_mut(dim).zip(probs).filter(|(_, p)| **p != 0.0)
            {
                sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += p * x);
            }
        }
    }

    /// Adds another span.
    pub(super) fn merge(&mut self, other: &Partial) {
        let rows = self.softmax.iter_mut().zip(&other.softmax).enumerate();
        for (row, ((max, sum), &(other_max, other_sum))) in rows {
            let both = if other_max > *max { other_max } else { *max };
            // A row that has seen nothing has the factor 0, or 1 if the other has seen nothing
            // either; a sum that is NaN stays NaN with both.
            let factor = |max: f32| if max == both { 1.0 } else { (max - both).exp2() };
            let (own, others) = (factor(*max), factor(other_max));
            (*max, *sum) = (both, *sum * own + other_sum * others);
            let channels = row * self.value_dim..(row + 1) * self.value_dim;
            let sums = self.sums[channels.clone()].iter_mut().zip(&other.sums[channels]);
            sums.for_each(|(sum, other)| *sum = *sum * own + other * others);
        }
    }

    /// Divides by the sums of probabilities.
    pub(super) fn finish(&self, out: &mut [f32]) {
        let width = self.value_dim.max(1);
        let rows = out.chunks_exact_mut(width).zip(self.sums.chunks_exact(width));
        for ((out, sums), (_, sum)) in rows.zip(&self.softmax) {
            // No key was seen: zeros. A NaN sum stays NaN.
            let inverse = if *sum == 0.0 { 0.0 } else { 1.0 / sum };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * inverse);
        }
    }
}

/// The keys of a span that a row sees, counted from the span's first.
fn inside(
    engine: &Engine<'_>,
    block: &Block<'_>,
    row: usize,
    span: &Span,
    tokens: &Range<usize>,
) -> Range<usize> {
    let seen = match span {
        // A window of the cache leaves the sinks in sight.
        Span::Sinks => block.positions.range(0, block.rows[row].1),
        // Slots of sinks are empty.
        _ => block.visible[row].start.max(engine.cache.config.sinks)..block.visible[row].end,
    };
    let clamp = |x: usize| x.clamp(tokens.start, tokens.end) - tokens.start;
    let start = clamp(seen.start);
    start..clamp(seen.end).max(start)
}

/// Int8 scores against `tokens`, whose start is that of a page.
fn page_scores(
    engine: &Engine<'_>,
    block: &Block<'_>,
    tokens: Range<usize>,
    scores: &mut [f32],
    stride: usize,
) {
    const NO_BIAS: [f32; PAGE] = [0.0; PAGE];
    let depth = block.head.dims.depth;
    let mut biases = block.biases.clone();
    for (start, used, page) in block.head.pages_of(tokens.clone()) {
        let used = used.min(tokens.end - start);
        let step = if page.offsets.is_empty() { PAGE } else { GROUP };
        for first in (0..used).step_by(step) {
            if !page.offsets.is_empty() {
                let offset = &page.offsets[first / GROUP * depth..(first / GROUP + 1) * depth];
                engine.bias(&block.queries, offset, &mut biases[..block.rows.len()]);
            }
            let scales = ScoreScales {
                row_scales: &block.scales,
                row_biases: &biases,
                column_scales: &page.key_scales,
                column_biases: &NO_BIAS,
                zeros: None,
            };
            // SAFETY: `score_tiles` writes numbers.
            let out = unsafe { overwrite(&mut scores[start + first - tokens.start..]) };
            let columns = first..(first + step).min(used);
            gemm::score_tiles(&block.codes, &page.keys, columns, &scales, out, stride);
        }
    }
    let (first, left_over) = scores.split_at_mut(block.rows.len() * stride);
    widest!(add, (first, &*left_over), (&mut [f32], &[f32]) => ());
}

#[inline(always)]
fn add((sums, others): (&mut [f32], &[f32])) {
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
}

/// f32 scores against keys that are kept in f32.
fn float_scores(
    engine: &Engine<'_>,
    block: &Block<'_>,
    keys: &Rows,
    scores: &mut [f32],
    stride: usize,
) {
    let depth = block.queries.len() / block.rows.len();
    for (row, scores) in scores.chunks_exact_mut(stride).take(block.rows.len()).enumerate() {
        let scores = &mut scores[..keys.tokens];
        scores.fill(0.0);
        let query = &block.queries[row * depth..(row + 1) * depth];
        dots(rows::Rows::new(&keys.keys, keys.tokens, depth, depth), None, query, scores);
        scores.iter_mut().for_each(|score| *score *= engine.factor);
    }
}
