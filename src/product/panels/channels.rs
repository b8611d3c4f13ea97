//! Int8 values: one scale and one offset a channel, over all keys of a head.
//!
//! ```text
//! value = offset + scale * code             code in [-127, 127]
//! ```
//!
//! The offset is the middle of the channel's range, which makes the scale as small as can be. It
//! costs nothing: `sum_j p_j (offset + scale * code_j)` is `offset * sum_j p_j` and the integer
//! product, whatever the probabilities sum to.

use super::LARGEST;
use crate::cpu::contracts::{Int8Run, LANES};
use crate::cpu::plain::{each_lane, lanes, widest};
use crate::memory::Footprint;

/// The largest code.
const CODE_MAX: f32 = 127.0;

/// What is known of each channel. All but the ranges is padded with zeros to whole vectors.
pub(super) struct Channels {
    low: Vec<f32>,
    high: Vec<f32>,
    /// The value of code 0.
    pub offsets: Vec<f32>,
    /// What a code of 1 adds.
    pub scales: Vec<f32>,
    /// `1 / scale`, or 0.
    pub inverses: Vec<f32>,
}

impl Channels {
    pub(super) fn new(depth: usize) -> Self {
        Self {
            low: vec![f32::INFINITY; depth],
            high: vec![f32::NEG_INFINITY; depth],
            offsets: vec![0.0; depth.next_multiple_of(LANES)],
            scales: vec![0.0; depth.next_multiple_of(LANES)],
            inverses: vec![0.0; depth.next_multiple_of(LANES)],
        }
    }

    /// Bytes of memory.
    pub(super) fn footprint(&self) -> usize {
        let Self { low, high, offsets, scales, inverses } = self;
        [low, high, offsets, scales, inverses].map(Footprint::footprint).iter().sum()
    }

    /// Widens the ranges to row-major `rows`; those with a larger magnitude than [`LARGEST`] or
    /// NaN take no part.
    pub(super) fn observe(&mut self, rows: &[f32]) {
        let job = (&mut self.low[..], &mut self.high[..], rows);
        widest!(widen, job, (&mut [f32], &mut [f32], &[f32]) => ());
        for (c, (&low, &high)) in self.low.iter().zip(&self.high).enumerate() {
            if low > high {
                continue; // No row yet.
            }
            let scale = (high - low) / (2.0 * CODE_MAX);
            // A range too narrow for its inverse is a constant.
            let inverse = 1.0 / scale;
            let inverse = if inverse.is_finite() { inverse } else { 0.0 };
            self.offsets[c] = (low + high) / 2.0;
            self.scales[c] = if inverse == 0.0 { 0.0 } else { scale };
            self.inverses[c] = inverse;
        }
    }
}

#[inline(always)]
fn widen((low, high, rows): (&mut [f32], &mut [f32], &[f32])) {
    let finite = |row: &[f32]| row.iter().fold(true, |all, x| all & (x.abs() <= LARGEST));
    if finite(rows) {
        return widen_finite(low, high, rows);
    }
    for row in rows.chunks_exact(low.len().max(1)).filter(|row| finite(row)) {
        widen_finite(low, high, row);
    }
}

/// Some channels at a time, whose ranges stay in registers over all rows.
#[inline(always)]
fn widen_finite(low: &mut [f32], high: &mut [f32], rows: &[f32]) {
    let depth = low.len().max(1);
    for (i, (low, high)) in low.chunks_mut(LANES).zip(high.chunks_mut(LANES)).enumerate() {
        let (mut lows, mut highs) = (lanes(low, 0), lanes(high, 0));
        for row in rows.chunks_exact(depth) {
            let x = lanes(row, i * LANES);
            lows = each_lane(|c| if x[c] < lows[c] { x[c] } else { lows[c] });
            highs = each_lane(|c| if x[c] > highs[c] { x[c] } else { highs[c] });
        }
        low.copy_from_slice(&lows[..low.len()]);
        high.copy_from_slice(&highs[..high.len()]);
    }
}

/// The code of a value; to nearest, ties to even; values outside the range saturate.
#[inline(always)]
pub(super) fn code(x: f32, offset: f32, inverse: f32) -> i8 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: the integer is in the low bits of the sum.
    let x = (x - offset) * inverse;
    let x = if x > CODE_MAX { CODE_MAX } else { x };
    let x = if x < -CODE_MAX { -CODE_MAX } else { x };
    (x + ROUND).to_bits() as i8
}

/// Sums of rows of one panel, which know nothing of their channels' scales yet.
pub(super) struct Dequantize<'a> {
    /// Row-major, as many in a row as there are scales.
    pub sums: &'a [f32],
    /// What the probabilities stand for, `per_row` in each row.
    pub runs: &'a [Int8Run],
    pub per_row: usize,
    /// Of the panel's channels.
    pub scales: &'a [f32],
    pub offsets: &'a [f32],
    /// Starts at the panel's first channel of the first row; rows are `stride` elements apart.
    pub out: &'a mut [f32],
    pub stride: usize,
}

/// `out += sum * scale + weight * offset`, each step rounded to f32; `weight` is what the
/// probabilities of the row sum to.
#[inline(always)]
pub(super) fn dequantize(job: Dequantize<'_>) {
    let rows = job.sums.chunks_exact(job.scales.len()).zip(job.runs.chunks_exact(job.per_row));
    for ((sums, runs), out) in rows.zip(job.out.chunks_mut(job.stride)) {
        let weight = runs.iter().map(|run| run.scale * run.codes as f32).sum::<f32>();
        let channels = job.scales.iter().zip(job.offsets);
        for ((out, sum), (scale, offset)) in out.iter_mut().zip(sums).zip(channels) {
            *out += sum * scale + weight * offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_to_nearest_and_saturate() {
        let codes = |xs: &[f32]| xs.iter().map(|&x| code(x, 0.0, 1.0)).collect::<Vec<_>>();
        assert_eq!(codes(&[0.5, 1.5, -0.5, -2.5, 126.6, 1e9, -1e9]), [0, 2, 0, -2, 127, 127, -127]);
        assert_eq!(code(3.0, 1.0, 10.0), 20);
    }

    #[test]
    fn ranges_are_those_of_the_rows_that_are_finite() {
        let mut channels = Channels::new(3);
        channels.observe(&[1.0, -2.0, 5.0, f32::NAN, 9.0, 9.0, f32::INFINITY, 9.0, 9.0]);
        channels.observe(&[3.0, 252.0, 5.0, f32::MAX, -9.0, 9.0]);
        assert_eq!(channels.offsets[..4], [2.0, 125.0, 5.0, 0.0]);
        assert_eq!(channels.scales[..4], [2.0 / 254.0, 1.0, 0.0, 0.0]);
        assert_eq!(channels.inverses[1..3], [1.0, 0.0]);
        assert_eq!(code(1.0, 2.0, channels.inverses[0]), -127);
    }

    #[test]
    fn ranges_of_any_width_give_finite_scales() {
        for (low, high) in [(-LARGEST, LARGEST), (0.0, 1e-40), (0.0, 0.0), (1.0, 1.0 + 1e-7)] {
            let mut channels = Channels::new(1);
            channels.observe(&[low, high]);
            let (offset, scale) = (channels.offsets[0], channels.scales[0]);
            for x in [low, high] {
                let code = code(x, offset, channels.inverses[0]);
                let error =
                    (f64::from(scale) * f64::from(code) + f64::from(offset) - f64::from(x)).abs();
                // Half a step, or the rounding of the offset, or a range too narrow for a scale.
                let rounding = f64::from(x.abs()) * f64::from(f32::EPSILON);
                let bound = f64::from(scale) * 0.5001 + rounding + 1e-36;
                assert!(error <= bound, "{low} {high} {x}: {error}");
            }
        }
    }
}
