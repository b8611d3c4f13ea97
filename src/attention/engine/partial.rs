//! Attention of some rows over some of the keys, and how such parts are merged.

use super::output::Element;
use super::softmax::Running;
use std::mem::MaybeUninit;

/// Of each row the largest score and the sum of `2^(score - max)`, and the sums of values that have the
/// same factors.
#[derive(Default)]
pub(super) struct Partial {
    pub running: Vec<Running>,
    /// `[rows, width]`.
    pub sums: Vec<f32>,
}

impl Partial {
    /// Nothing seen yet; what is neutral to a merge.
    pub(super) fn start(&mut self, rows: usize, width: usize) {
        self.running.clear();
        self.running.resize(rows, Running::START);
        self.sums.clear();
        self.sums.resize(rows * width, 0.0);
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

    /// Adds keys that come after these.
    pub(super) fn merge(&mut self, other: &Partial) {
        let width = self.width();
        let rows = self.running.iter_mut().zip(&other.running);
        let sums = self.sums.chunks_exact_mut(width).zip(other.sums.chunks_exact(width));
        for ((own, other), (own_sums, other_sums)) in rows.zip(sums) {
            let both = if other.max > own.max { other.max } else { own.max };
            // A row that has seen nothing has the factor 0, or 1 if the other has seen nothing
            // either; a sum that is NaN stays NaN with both.
            let factor = |max: f32| if max == both { 1.0 } else { (max - both).exp2() };
            let (own_factor, other_factor) = (factor(own.max), factor(other.max));
            own.sum = own.sum * own_factor + other.sum * other_factor;
            own.max = both;
            let sums = own_sums.iter_mut().zip(other_sums);
            sums.for_each(|(sum, other)| *sum = *sum * own_factor + other * other_factor);
        }
    }

    /// Writes `[rows, value_dim]`: the sums of values divided by those of probabilities.
    pub(super) fn finish<T: Element>(&self, value_dim: usize, out: &mut [MaybeUninit<T>]) {
        let rows = self.sums.chunks_exact(self.width()).zip(out.chunks_exact_mut(value_dim));
        for ((sums, out), running) in rows.zip(&self.running) {
            // No key was seen: zeros. A NaN sum stays NaN.
            let inverse = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
            T::write_scaled(&sums[..value_dim], inverse, out);
        }
    }

    /// Of the sums; 1 where there is none.
    fn width(&self) -> usize {
        (self.sums.len() / self.running.len().max(1)).max(1)
    }
}
