//! Rounding of weights that suits what enters them.
//!
//! With errors `e` of the weights of an output, that output is off by `e·x`, and over some inputs by
//!
//! ```text
//! sum (e·x)^2  =  e H e  =  |L^T e|^2        H = sum x x^T = L L^T, Cholesky's factor
//! ```
//!
//! The nearest codes make `e·e` least, which is another thing where inputs have directions in common, as
//! activations do: a mean, and channels that rise and fall together. From the last input to the first,
//!
//! ```text
//! code[j] = round(w[j] + sum_{k > j} L[k, j] / L[j, j] * e[k])        e[k] = w[k] - code[k], in steps
//! ```
//!
//! makes each element of `L^T e` as small as those behind it leave it: the nearest plane of Babai (1986), and what
//! GPTQ does (Frantar et al. 2022, arXiv:2210.17323; that both are one, Chen et al. 2025, arXiv:2507.18553).
//!
//! `H` is taken in blocks of [`BLOCK`] inputs: with a whole one, errors of all-MiniLM-L6 were smaller by a few
//! percent, and it takes the cube of the inputs to factor.

use crate::cpu::Level;
use crate::cpu::plain::widest;
use crate::parallel::{self, Work};
use crate::quant::Rotation;
use std::ops::Range;

/// Inputs whose errors make up for each other.
const BLOCK: usize = 128;

/// What is added to the diagonal of `H`, of its mean: as if there were noise in the inputs, which keeps codes
/// from suiting just those that were seen. With a hundredth embeddings of MiniLM were less close, with one as
/// close.
const DAMPING: f64 = 0.3;

/// The blocks of `L[k, j] / L[j, j]`, `j < k`, row-major.
pub(super) struct Rounding {
    depth: usize,
    blocks: Vec<Vec<f32>>,
}

impl Rounding {
    /// For rows of `depth` elements, of which `inputs` are examples; both are rotated before they are
    /// multiplied.
    pub(super) fn new(level: Level, depth: usize, inputs: &[f32]) -> Self {
        let mut rows = inputs.to_vec();
        Rotation::new(depth).apply_on(level, &mut rows);
        let blocks = parallel::map((0..depth).step_by(BLOCK), |start| {
            let block = start..(start + BLOCK).min(depth);
            factors(
                widest!(moments, (&rows[..], depth, block), (&[f32], usize, Range<usize>) => Vec<f64>),
            )
        });
        Self { depth, blocks }
    }

    /// Replaces the nearest codes of rotated weights, `[outputs, depth]`, where there is a scale.
    pub(super) fn round(&self, weights: &[f32], scales: &[f32], codes: &mut [i8]) {
        let depth = self.depth.max(1);
        let rows = weights.chunks_exact(depth).zip(scales).zip(codes.chunks_exact_mut(depth));
        let rows = rows.filter(|((_, scale), _)| scale.is_finite()).collect();
        let work = Work { float_macs: weights.len().saturating_mul(BLOCK / 2), ..Work::default() };
        work.for_each(rows, |((weights, scale), codes)| {
            let blocks = weights.chunks(BLOCK).zip(codes.chunks_mut(BLOCK));
            for (factors, (weights, codes)) in self.blocks.iter().zip(blocks) {
                let job = (&factors[..], weights, *scale, codes);
                widest!(round_block, job, (&[f32], &[f32], f32, &mut [i8]) => ());
            }
        });
    }
}

#[inline(always)]
fn round_block((factors, weights, scale, codes): (&[f32], &[f32], f32, &mut [i8])) {
    let size = weights.len();
    let mut steps = [0f32; BLOCK];
    steps.iter_mut().zip(weights).for_each(|(step, weight)| *step = weight / scale);
    let mut wanted = steps;
    for k in (0..size).rev() {
        let code = wanted[k].round_ties_even().clamp(-127.0, 127.0);
        codes[k] = code as i8;
        let error = steps[k] - code;
        let factors = &factors[k * size..][..k];
        wanted.iter_mut().zip(factors).for_each(|(wanted, factor)| *wanted += factor * error);
    }
}

/// The lower triangle of `H` of a block.
#[inline(always)]
fn moments((rows, depth, block): (&[f32], usize, Range<usize>)) -> Vec<f64> {
    let size = block.len();
    let mut h = vec![0f64; size * size];
    let mut x = [0f64; BLOCK];
    for row in rows.chunks_exact(depth) {
        x.iter_mut().zip(&row[block.clone()]).for_each(|(x, &input)| *x = f64::from(input));
        for (k, h) in h.chunks_exact_mut(size).enumerate() {
            h[..=k].iter_mut().zip(&x).for_each(|(h, other)| *h += x[k] * other);
        }
    }
    h
}

/// Those of a block, 0 where there are no inputs, or not all of them are finite: then the nearest codes stay.
fn factors(mut h: Vec<f64>) -> Vec<f32> {
    let size = h.len().isqrt();
    let diagonal = |h: &[f64], k: usize| h[k * size + k];
    let trace: f64 = (0..size).map(|k| diagonal(&h, k)).sum();
    if trace == 0.0 || !trace.is_finite() {
        return vec![0.0; h.len()];
    }
    (0..size).for_each(|k| h[k * size + k] += DAMPING * trace / size as f64);
    cholesky(&mut h, size);
    (0..h.len()).map(|at| (h[at] / diagonal(&h, at % size)) as f32).collect()
}

/// The lower triangle of a positive definite matrix becomes its factor `L`.
fn cholesky(h: &mut [f64], size: usize) {
    for k in 0..size {
        for j in 0..=k {
            let dot: f64 = (0..j).map(|i| h[k * size + i] * h[j * size + i]).sum();
            let rest = h[k * size + j] - dot;
            h[k * size + j] = if j == k { rest.sqrt() } else { rest / h[j * size + j] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;
    use crate::nn::linear::int8::Int8Weights;
    use crate::testing::randn;

    const DEPTH: usize = 200;
    const OUTPUTS: usize = 30;

    fn numbers(shape: &[usize]) -> Vec<f32> {
        randn(shape).flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Rows that have a mean, and three directions that they differ in more than in others.
    fn inputs(rows: usize) -> Vec<f32> {
        let (mean, ways) = (numbers(&[DEPTH]), numbers(&[3, DEPTH]));
        let row = |_| {
            let (noise, along) = (numbers(&[DEPTH]), numbers(&[3]));
            let x = |i: usize| {
                let common: f32 = (0..3).map(|way| along[way] * ways[way * DEPTH + i]).sum();
                mean[i] + common + 0.5 * noise[i]
            };
            (0..DEPTH).map(x).collect::<Vec<_>>()
        };
        (0..rows).flat_map(row).collect()
    }

    fn weights(level: Level, weights: &[f32], inputs: Option<&[f32]>) -> Int8Weights {
        Int8Weights::new(level, weights, (OUTPUTS, DEPTH), inputs).unwrap()
    }

    /// `sum (e·x)^2` over outputs and rows.
    fn energy(exact: &[f32], rounded: &Int8Weights, rows: &[f32]) -> f64 {
        let found = rounded.unpacked();
        let off = |row: &[f32]| -> f64 {
            let output = |(w, found): (&[f32], &[f32])| {
                let terms = w.iter().zip(found).zip(row);
                terms.map(|((w, found), x)| f64::from((w - found) * x)).sum::<f64>().powi(2)
            };
            exact.chunks(DEPTH).zip(found.chunks(DEPTH)).map(output).sum()
        };
        rows.chunks(DEPTH).map(off).sum()
    }

    #[test]
    fn outputs_of_other_inputs_of_the_kind_are_closer() {
        let (exact, all) = (numbers(&[OUTPUTS, DEPTH]), inputs(600));
        let (seen, others) = all.split_at(300 * DEPTH);
        let level = Level::active().unwrap();
        let nearest = energy(&exact, &weights(level, &exact, None), others);
        let suited = energy(&exact, &weights(level, &exact, Some(seen)), others);
        // About a sixth.
        assert!(suited < 0.3 * nearest, "{suited} {nearest}");
    }

    #[test]
    fn every_level_gives_the_same_codes() {
        let (exact, seen) = (numbers(&[OUTPUTS, DEPTH]), inputs(50));
        let on = |level| weights(level, &exact, Some(&seen)).unpacked();
        let levels = runnable();
        let first = on(levels[0]);
        assert!(levels.into_iter().all(|level| on(level) == first));
    }

    #[test]
    fn the_nearest_codes_stay_where_nothing_is_known_of_inputs() {
        let level = Level::active().unwrap();
        let exact = numbers(&[OUTPUTS, DEPTH]);
        let nearest = weights(level, &exact, None).unpacked();
        let mut bad = inputs(40);
        bad.iter_mut().step_by(7).for_each(|x| *x = f32::INFINITY);
        for inputs in [&[][..], &[0.0; 3 * DEPTH], &bad] {
            assert!(weights(level, &exact, Some(inputs)).unpacked() == nearest);
        }
    }

    /// A step too far at the end of the range is made up for by the next weight, not by a code beyond it.
    #[test]
    fn codes_stay_in_their_range_and_rows_without_a_scale_at_zero() {
        let factors = [0.0, 0.0, 4.0, 0.0];
        let mut codes = [0; 2];
        round_block((&factors, &[127.0, 0.4], 1.0, &mut codes));
        assert_eq!(codes, [127, 0]);
        round_block((&factors, &[100.0, 0.4], 1.0, &mut codes));
        assert_eq!(codes, [102, 0]); // 100 + 4 * 0.4
        let rounding = Rounding { depth: 2, blocks: vec![factors.to_vec()] };
        let mut codes = [0; 2];
        rounding.round(&[f32::NAN, 1.0], &[f32::NAN], &mut codes);
        assert_eq!(codes, [0; 2]);
    }

    #[test]
    fn a_factor_times_itself_is_the_matrix() {
        let l = [2.0, 0.0, 0.0, -1.0, 3.0, 0.0, 0.5, 4.0, 1.0];
        let entry = |at: usize| (0..3).map(|k| l[at / 3 * 3 + k] * l[at % 3 * 3 + k]).sum();
        let mut h: Vec<f64> = (0..9).map(entry).collect();
        cholesky(&mut h, 3);
        for (k, row) in h.chunks(3).enumerate() {
            assert_eq!(row[..=k], l[3 * k..=4 * k]);
        }
    }
}
