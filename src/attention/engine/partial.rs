//! Attention of some rows over some of the keys, and how such parts are merged.

use super::output::{Element, Means};
use super::tile::Running;
use crate::memory::{Aligned, footprint};
use std::mem::MaybeUninit;

/// Of each row the largest score and the sum of `2^(score - max)`, and the sums of values that have the
/// same factors.
#[derive(Default)]
pub(super) struct Partial {
    pub running: Vec<Running>,
    /// `[rows, width]`.
    pub sums: Aligned<f32>,
    /// The score, in a unit beyond log2, from which those of a row are counted; unused without such a unit.
    references: Vec<f32>,
    /// Whether a row has made room for large values.
    large: bool,
}

/// Values up to `f32::MAX` are multiplied with at most 2^-32, so that 2^31 of them add up to a finite sum,
/// beside as many of the others, which are at most [`LARGEST`](crate::product::LARGEST).
const ROOM: f32 = 32.0;

footprint!(Partial: running, sums, references);

impl Partial {
    /// Nothing seen yet; what is neutral to a merge.
    pub(super) fn start(&mut self, rows: usize, width: usize) {
        self.running.clear();
        self.running.resize(rows, Running::START);
        self.sums.clear();
        self.sums.resize(rows * width);
        self.references.clear();
        self.references.resize(rows, f32::NEG_INFINITY);
        self.large = false;
    }

    /// To the new maxima of their rows.
    pub(super) fn rescale(&mut self) {
        let width = self.width();
        for (sums, running) in self.sums.chunks_exact_mut(width).zip(&self.running) {
            if running.rescale != 1.0 {
                sums.iter_mut().for_each(|sum| *sum *= running.rescale);
            }
        }
    }

    /// Counts the scores of a row from the largest so far on, of which `top` is that of `scores`, and turns
    /// them from units of `unit` times log2 into log2.
    ///
    /// Multiplying by a power of two is exact, so the differences have the bits that they have in log2
    /// where that does not overflow.
    pub(super) fn refer(&mut self, row: usize, top: f32, unit: f32, scores: &mut [f32]) {
        let reference = self.references[row].max(top);
        if reference == f32::NEG_INFINITY {
            return;
        }
        self.move_reference(row, reference, unit);
        scores.iter_mut().for_each(|score| *score = (*score - reference) * unit);
    }

    /// A larger reference, from which the largest score is farther away.
    fn move_reference(&mut self, row: usize, reference: f32, unit: f32) {
        let running = &mut self.running[row];
        if running.max != f32::NEG_INFINITY {
            running.max += (self.references[row] - reference) * unit;
            // What is this far below the largest is nothing beside it, and its sums are finite.
            running.max = running.max.max(f32::MIN);
        }
        self.references[row] = reference;
    }

    /// Makes the probabilities of a row so small, for all keys that it has seen and those whose largest score
    /// is `top`, that sums of the largest numbers are finite: what they are divided by becomes smaller too.
    pub(super) fn make_room(&mut self, row: usize, top: f32) {
        let width = self.width();
        let running = &mut self.running[row];
        let max = running.max.max(top + ROOM);
        if !max.is_finite() {
            return;
        }
        self.large = true;
        let factor = (running.max - max).exp2();
        (running.sum, running.max) = (running.sum * factor, max);
        self.sums[row * width..][..width].iter_mut().for_each(|sum| *sum *= factor);
    }

    /// Adds keys that come after these; scores are in units of `unit` times log2.
    pub(super) fn merge(&mut self, other: &Partial, unit: f32) {
        let width = self.width();
        self.large |= other.large;
        for row in 0..self.running.len() {
            let mut other_running = other.running[row];
            if unit != 1.0 && other_running.max != f32::NEG_INFINITY {
                let (own, others) = (self.references[row], other.references[row]);
                self.move_reference(row, own.max(others), unit);
                other_running.max += (others - self.references[row]) * unit;
                other_running.max = other_running.max.max(f32::MIN);
            }
            let (own, other_sums) = (&mut self.running[row], &other.sums[row * width..][..width]);
            let both = if other_running.max > own.max { other_running.max } else { own.max };
            // A row that has seen nothing has the factor 0, or 1 if the other has seen nothing
            // either; a sum that is NaN stays NaN with both.
            let factor = |max: f32| if max == both { 1.0 } else { (max - both).exp2() };
            let (own_factor, other_factor) = (factor(own.max), factor(other_running.max));
            own.sum = own.sum * own_factor + other_running.sum * other_factor;
            own.max = both;
            let sums = self.sums[row * width..][..width].iter_mut().zip(other_sums);
            sums.for_each(|(sum, other)| *sum = *sum * own_factor + other * other_factor);
        }
    }

    /// Adds a logit without a value to the denominator of a row, in units of `unit` times log2. A row that has
    /// seen no key, or only NaN, stays as it is.
    pub(super) fn add_logit(&mut self, row: usize, mut logit: f32, unit: f32) {
        if self.running[row].max == f32::NEG_INFINITY || logit == f32::NEG_INFINITY {
            return;
        }
        if unit != 1.0 {
            let reference = self.references[row].max(logit);
            self.move_reference(row, reference, unit);
            logit = ((logit - reference) * unit).max(f32::MIN);
        }
        let width = self.width();
        let running = &mut self.running[row];
        let max = running.max.max(logit);
        let factor = (running.max - max).exp2();
        running.sum = running.sum * factor + (logit - max).exp2();
        running.max = max;
        if factor != 1.0 {
            self.sums[row * width..][..width].iter_mut().for_each(|sum| *sum *= factor);
        }
    }

    /// Writes all of `[rows, value_dim]`: the sums of values divided by those of probabilities.
    ///
    /// # Panics
    /// Unless there are as many rows as were started.
    pub(super) fn finish<T: Element>(&mut self, value_dim: usize, out: &mut [MaybeUninit<T>]) {
        assert_eq!(out.len(), self.running.len() * value_dim);
        let width = self.width();
        if self.large {
            let rows = self.sums.chunks_exact_mut(width).zip(&self.running);
            rows.for_each(|(sums, running)| within(sums, running.sum));
        }
        T::write(Means { sums: &self.sums, width, value_dim, running: &self.running }, out);
    }

    /// Of the sums; 1 where there is none.
    fn width(&self) -> usize {
        (self.sums.len() / self.running.len().max(1)).max(1)
    }
}

/// A mean of finite numbers is finite, but rounding could make it larger than all of them.
fn within(sums: &mut [f32], weight: f32) {
    let most = f32::MAX * (1.0 - 4.0 * f32::EPSILON) * weight.min(1.0);
    for sum in sums.iter_mut().filter(|sum| sum.is_finite() && sum.abs() > most) {
        *sum = most.copysign(*sum);
    }
}
