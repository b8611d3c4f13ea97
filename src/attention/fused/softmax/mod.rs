//! The softmax over a tile of keys, with running maximum and sum (Milakov and Gimelshein 2018,
//! arXiv:1805.02867), in base 2: scores come multiplied by `log2(e)`.
//!
//! `portable` is plain Rust for every machine, `avx512` is written with that set's instructions.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

pub(super) use portable::exp2;

use crate::pv::{Int8Run, KEY_GROUP, RUN};
use std::ops::Range;
use std::sync::OnceLock;

/// What the softmax of one query has seen so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    /// The largest score.
    pub max: f32,
    /// The sum of `2^(score - max)`.
    pub sum: f32,
    /// What the sums of values so far must be multiplied by after this tile.
    pub rescale: f32,
}

impl Running {
    pub(super) const START: Running = Running { max: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0 };
}

/// Where the probabilities of a tile go: row-major, rows `stride` elements apart.
pub(super) enum Probs<'a> {
    /// In the place of the scores.
    F32,
    /// Rounded to bf16.
    Bf16(&'a mut [u16]),
    /// Rounded to 1/255 of the largest of a run of [`RUN`] keys.
    Int8 {
        codes: &'a mut [u8],
        /// What the codes stand for: all runs of a row before those of the next.
        runs: &'a mut [Int8Run],
    },
}

/// Scores of some queries against a tile of keys.
pub(super) struct Tile<'a> {
    /// Row-major, rows `stride` elements apart.
    pub scores: &'a mut [f32],
    pub stride: usize,
    /// Keys in the tile; probabilities are written for these, and zeros up to whole groups.
    pub keys: usize,
    /// The keys of the tile that each query sees.
    pub visible: &'a [Range<usize>],
    pub probs: Probs<'a>,
}

/// What a kernel of the softmax does with the scores that one query sees.
trait SoftmaxKernel: Sync {
    /// Whether this machine has the instructions.
    fn is_available(&self) -> bool;

    /// The largest score; NaN does not count.
    fn max(&self, scores: &[f32]) -> f32;

    /// Replaces scores by `2^(score - max)`, relative error below [`ERROR_F32`]; returns their sum.
    fn exp_f32(&self, scores: &mut [f32], max: f32) -> f32;

    /// Writes `2^(score - max)` rounded to bf16, relative error before that below [`ERROR_BF16`];
    /// returns the sum of the rounded ones, so that they sum to 1 after the division.
    fn exp_bf16(&self, scores: &[f32], max: f32, probs: &mut [u16]) -> f32;

    /// Writes `255 * 2^(score - max)` rounded; returns the sum of these codes, or NaN if there is a
    /// NaN.
    fn exp_int8(&self, scores: &[f32], max: f32, codes: &mut [u8]) -> f32;
}

/// The code of a probability as large as the largest.
const CODES: f32 = 255.0;

/// The relative error of `2^x` in f32, where it is not below the smallest normal number.
#[cfg(test)]
const ERROR_F32: f64 = 2e-7;
/// The relative error of `2^x` before it is rounded to bf16, whose own is up to 3.9e-3.
#[cfg(test)]
const ERROR_BF16: f64 = 1.1e-4;

/// Every kernel compiled for this architecture, best first.
static TABLE: &[&dyn SoftmaxKernel] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512::Avx512,
    &portable::Portable,
];

fn kernel() -> &'static dyn SoftmaxKernel {
    static BEST: OnceLock<&'static dyn SoftmaxKernel> = OnceLock::new();
    *BEST.get_or_init(|| {
        let best = TABLE.iter().find(|kernel| kernel.is_available());
        *best.expect("the portable kernel is always available")
    })
}

/// Turns scores into probabilities (not yet divided by their sum), row by row. What a query does
/// not see becomes 0. A NaN score makes the sum of its row NaN.
pub(super) fn softmax_tile(tile: Tile<'_>, running: &mut [Running]) {
    softmax_tile_with(kernel(), tile, running);
}

fn softmax_tile_with(kernel: &dyn SoftmaxKernel, mut tile: Tile<'_>, running: &mut [Running]) {
    let padded = tile.keys.next_multiple_of(KEY_GROUP);
    for (row, running) in running.iter_mut().enumerate() {
        let Range { start, end } = tile.visible[row].clone();
        let scores = &mut tile.scores[row * tile.stride..][..padded];
        let max = running.advance(kernel.max(&scores[start..end]), &scores[start..end]);
        let sum = match &mut tile.probs {
            Probs::F32 => {
                scores[..start].fill(0.0);
                scores[end..].fill(0.0);
                kernel.exp_f32(&mut scores[start..end], max)
            }
            Probs::Bf16(probs) => {
                let probs = &mut probs[row * tile.stride..][..padded];
                probs[..start].fill(0);
                probs[end..].fill(0);
                kernel.exp_bf16(&scores[start..end], max, &mut probs[start..end])
            }
            Probs::Int8 { codes, runs } => {
                let codes = &mut codes[row * tile.stride..][..padded];
                codes[..start].fill(0);
                codes[end..].fill(0);
                let per_row = tile.keys.div_ceil(RUN);
                let runs = &mut runs[row * per_row..][..per_row];
                int8_row(kernel, (&scores[..end], start), max, codes, runs)
            }
        };
        running.sum = running.sum * running.rescale + sum;
    }
}

/// Writes codes for the scores from `start` on, and what they stand for, run by run; returns the
/// sum of what they stand for.
fn int8_row(
    kernel: &dyn SoftmaxKernel,
    (scores, start): (&[f32], usize),
    max: f32,
    codes: &mut [u8],
    runs: &mut [Int8Run],
) -> f32 {
    let mut sum = 0.0;
    for (i, run) in runs.iter_mut().enumerate() {
        let end = (i * RUN + RUN).min(scores.len());
        let keys = (i * RUN).max(start).min(end)..end;
        // The run's own maximum gives all of its codes a use.
        let run_max = kernel.max(&scores[keys.clone()]);
        let (top, scale) = match run_max == f32::NEG_INFINITY {
            true => (0.0, 0.0),
            false => (run_max, exp2(run_max - max) / CODES),
        };
        let codes = kernel.exp_int8(&scores[keys.clone()], top, &mut codes[keys]);
        *run = Int8Run { scale, codes: codes as u32 };
        sum += codes * scale;
    }
    sum
}

impl Running {
    /// What `score` adds to the sum.
    pub(super) fn probability(&self, score: f32) -> f32 {
        exp2(score - self.max_or_zero())
    }

    /// Any finite maximum gives zeros for minus infinity, without the NaN of -inf - (-inf).
    fn max_or_zero(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }

    /// Takes in the maximum of a tile; returns what to subtract from its scores.
    fn advance(&mut self, tile_max: f32, scores: &[f32]) -> f32 {
        let old = self.max;
        self.max = if tile_max > old { tile_max } else { old };
        if self.max == f32::NEG_INFINITY && scores.iter().any(|x| x.is_nan()) {
            self.sum = f32::NAN;
        }
        let subtract = self.max_or_zero();
        self.rescale = if self.max == old { 1.0 } else { exp2(old - subtract) };
        subtract
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pv::ValueFormat;

    const FORMATS: [ValueFormat; 3] = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8];

    fn runnable() -> impl Iterator<Item = &'static dyn SoftmaxKernel> {
        TABLE.iter().copied().filter(|kernel| kernel.is_available())
    }

    fn from_bf16(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[test]
    fn exp2_is_within_its_stated_error() {
        let xs: Vec<f32> = (0..=1_250_000).map(|i| -(i as f32) * 1e-4).collect();
        for kernel in runnable() {
            let (mut f32s, mut bf16s) = (xs.clone(), vec![0; xs.len()]);
            kernel.exp_f32(&mut f32s, 0.0);
            kernel.exp_bf16(&xs, 0.0, &mut bf16s);
            for ((x, in_f32), in_bf16) in xs.iter().zip(f32s).zip(bf16s) {
                let exact = f64::from(*x).exp2();
                let off = |found: f32| (f64::from(found) / exact - 1.0).abs();
                assert!(off(in_f32) < ERROR_F32, "{x} {in_f32}");
                // Half a unit in the last place of 8 bits is at most 2^-8 of the number.
                let in_bf16 = from_bf16(in_bf16);
                assert!(off(in_bf16) < ERROR_BF16 + 1.0 / 256.0, "{x} {in_bf16}");
            }
        }
    }

    /// bf16 keeps too little to see the error before rounding, but the mean over many does.
    #[test]
    fn exp2_in_bf16_is_right_on_average() {
        let xs: Vec<f32> = (0..100_000).map(|i| -(i as f32) * 1.237e-5).collect();
        let exact: f64 = xs.iter().map(|x| f64::from(*x).exp2()).sum();
        for kernel in runnable() {
            let found = f64::from(kernel.exp_bf16(&xs, 0.0, &mut vec![0; xs.len()]));
            assert!((found / exact - 1.0).abs() < ERROR_BF16, "{found} {exact}");
        }
    }

    #[test]
    fn exp2_of_special_numbers() {
        let inf = f32::INFINITY;
        for kernel in runnable() {
            for len in 1..70 {
                let mut scores = vec![-inf; len];
                assert_eq!(kernel.max(&scores), -inf);
                assert_eq!(kernel.exp_f32(&mut scores, 1.0), 0.0);
                assert_eq!(scores, vec![0.0; len]);
                scores[len / 2] = f32::NAN;
                assert_eq!(kernel.max(&scores), if len == 1 { -inf } else { 0.0 });
                assert!(kernel.exp_bf16(&scores, 0.0, &mut vec![0; len]).is_nan());
                assert!(kernel.exp_f32(&mut scores, 0.0).is_nan());
                assert!(scores[len / 2].is_nan());
                let below = vec![-2e30; len];
                assert_eq!(kernel.max(&below), -2e30);
                assert_eq!(kernel.exp_bf16(&below, 0.0, &mut vec![1; len]), 0.0);
            }
        }
    }

    /// Scores through tiles of some size, as one row of probabilities that sum to 1.
    fn softmax(
        kernel: &dyn SoftmaxKernel,
        scores: &[f32],
        visible: Range<usize>,
        tile: usize,
        format: ValueFormat,
    ) -> Vec<f32> {
        let mut running = [Running::START];
        let mut all: Vec<f32> = Vec::new();
        for (index, keys) in scores.chunks(tile).enumerate() {
            let start = index * tile;
            let clamp = |x: usize| x.clamp(start, start + keys.len()) - start;
            let mut buffer = keys.to_vec();
            buffer.resize(keys.len().next_multiple_of(KEY_GROUP), 123.0);
            let stride = buffer.len();
            let (mut halves, mut codes) = (vec![0x7fc0u16; stride], vec![77u8; stride]);
            let mut runs = vec![Int8Run::default(); keys.len().div_ceil(RUN)];
            let probs = match format {
                ValueFormat::F32 => Probs::F32,
                ValueFormat::Bf16 => Probs::Bf16(&mut halves),
                ValueFormat::Int8 => Probs::Int8 { codes: &mut codes, runs: &mut runs },
            };
            let inside = clamp(visible.start)..clamp(visible.end);
            let (scores, visible) = (&mut buffer, std::slice::from_ref(&inside));
            let job = Tile { scores, stride, keys: keys.len(), visible, probs };
            softmax_tile_with(kernel, job, &mut running);
            all.iter_mut().for_each(|p| *p *= running[0].rescale);
            let written: Vec<f32> = match format {
                ValueFormat::F32 => buffer,
                ValueFormat::Bf16 => halves.iter().map(|&half| from_bf16(half)).collect(),
                ValueFormat::Int8 => {
                    let real = codes.chunks(RUN).zip(&runs).flat_map(|(codes, run)| {
                        let sum: u32 = codes.iter().map(|&code| u32::from(code)).sum();
                        assert!(running[0].sum.is_nan() || run.codes == sum, "{sum} {run:?}");
                        codes.iter().map(|&code| f32::from(code) * run.scale)
                    });
                    real.collect()
                }
            };
            assert!(written[keys.len()..].iter().all(|&p| p == 0.0), "zeros fill the last group");
            all.extend(&written[..keys.len()]);
        }
        all.iter().map(|p| p / running[0].sum).collect()
    }

    #[test]
    fn tiles_and_ranges_give_the_softmax() {
        let scores: Vec<f32> = (0..77).map(|i| ((i * 37) % 61) as f32 / 3.0 - 10.0).collect();
        let every = |visible: Range<usize>| runnable().map(move |kernel| (kernel, visible.clone()));
        for (kernel, visible) in [0..77, 0..1, 5..70, 33..34, 76..77].into_iter().flat_map(every) {
            let seen = |i: usize| visible.contains(&i);
            let term = |i: usize| if seen(i) { f64::from(scores[i]).exp2() } else { 0.0 };
            let sum: f64 = (0..77).map(term).sum();
            let largest = (0..77).map(term).fold(0.0, f64::max) / sum;
            for tile in [77, 100, 1, 2, 16, 17, 32] {
                for format in FORMATS {
                    let found = softmax(kernel, &scores, visible.clone(), tile, format);
                    for (i, p) in found.iter().enumerate() {
                        let exact = term(i) / sum;
                        let off = (f64::from(*p) - exact).abs();
                        let bound = match format {
                            ValueFormat::F32 => 1e-6 * exact,
                            ValueFormat::Bf16 => 0.004 * exact,
                            // Half a code, in this one and in each that the sum is made of. The
                            // largest probability bounds what a code stands for.
                            ValueFormat::Int8 => {
                                0.51 / 255.0 * largest * (1.0 + exact * visible.len() as f64)
                            }
                        };
                        let what = (&visible, tile, format, i);
                        assert!(off <= bound, "{what:?}: {p} {exact}");
                    }
                    let sum: f32 = found.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5, "{visible:?} {tile} {format:?}: {sum}");
                }
            }
        }
    }

    #[test]
    fn infinities_and_nan() {
        let inf = f32::INFINITY;
        let every = |kernel| FORMATS.map(|format| (kernel, format));
        for (kernel, format) in runnable().flat_map(every) {
            let masked = softmax(kernel, &[-inf, 1.0, -inf, 1.0], 0..4, 2, format);
            assert_eq!(masked, [0.0, 0.5, 0.0, 0.5]);
            // Nothing to see: 0 / 0, which the caller turns into zeros by the sum.
            assert!(softmax(kernel, &[-inf; 3], 0..3, 2, format).iter().all(|p| p.is_nan()));
            for scores in [[f32::NAN, 1.0, 2.0], [f32::NAN, -inf, -inf], [-inf, -inf, f32::NAN]] {
                for tile in [1, 3] {
                    assert!(
                        softmax(kernel, &scores, 0..3, tile, format).iter().any(|p| p.is_nan())
                    );
                }
            }
            let unseen = softmax(kernel, &[f32::NAN, 1.0, 1.0, f32::NAN], 1..3, 4, format);
            assert_eq!(unseen, [0.0, 0.5, 0.5, 0.0]);
        }
    }
}
