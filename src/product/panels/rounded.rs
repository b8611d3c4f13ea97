//! Rows of f32 that are rounded to 16 bits when they come: the left side of products of integers.
//!
//! ```text
//! x ~ scale[row, run] * code        |code| <= 4096
//! ```
//!
//! A run is [`RUN`] elements, so a large element coarsens its own run alone.

use crate::cpu::contracts::panel_product::INT16_LEFT;
use crate::cpu::contracts::{GROUP, RUN, Rows};
use crate::cpu::plain::rows::max_magnitude;
use crate::cpu::plain::widest;
use crate::memory::{Aligned, footprint};

/// Some rows in 16 bits. The memory is kept from one [`Int16Rows::put`] to the next.
#[derive(Default)]
pub(crate) struct Int16Rows {
    /// Each row filled up with zeros to `stride`, whole groups; room for more than that.
    codes: Aligned<i16>,
    /// `[rows, runs]`, with room for more.
    scales: Aligned<f32>,
    stride: usize,
    count: usize,
    depth: usize,
}

impl Int16Rows {
    /// Rounds rows, in the place of those that were here. A run that is not finite has a scale of NaN.
    pub(crate) fn put(&mut self, rows: Rows<'_>) {
        (self.count, self.depth) = (rows.count(), rows.depth());
        self.stride = self.depth.next_multiple_of(GROUP);
        let runs = self.runs();
        self.codes.grow(self.count * self.stride);
        self.scales.grow(self.count * runs);
        if self.depth > 0 {
            let (codes, scales) = (&mut self.codes, &mut self.scales);
            let job = Round { rows, codes, stride: self.stride, scales, runs };
            widest!(round, job, Round<'_> => ());
        }
    }

    /// How many rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Runs of a row.
    pub(crate) fn runs(&self) -> usize {
        self.depth.div_ceil(RUN)
    }

    /// All codes, and how many there are from one row to the next.
    pub(crate) fn codes(&self) -> (&[i16], usize) {
        (&self.codes[..self.count * self.stride], self.stride)
    }

    /// `[rows, runs]`.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales[..self.count * self.runs()]
    }
}

footprint!(Int16Rows: codes, scales);

struct Round<'a> {
    rows: Rows<'a>,
    codes: &'a mut [i16],
    stride: usize,
    scales: &'a mut [f32],
    runs: usize,
}

#[inline(always)]
fn round(Round { rows, codes, stride, scales, runs }: Round<'_>) {
    let outs = codes.chunks_exact_mut(stride).zip(scales.chunks_exact_mut(runs));
    for (row, (codes, scales)) in rows.iter().zip(outs) {
        let (codes, padding) = codes.split_at_mut(row.len());
        padding.fill(0);
        for ((run, codes), scale) in row.chunks(RUN).zip(codes.chunks_mut(RUN)).zip(scales) {
            *scale = round_run(run, codes);
        }
    }
}

/// Writes the symmetric codes of a run and returns their scale: NaN, with codes of 0, for one that is not finite.
#[inline(always)]
fn round_run(run: &[f32], codes: &mut [i16]) -> f32 {
    const MOST: f32 = INT16_LEFT as f32;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: the integer is in the low bits of the sum.
    let (largest, finite) = max_magnitude(run);
    if !finite {
        codes.fill(0);
        return f32::NAN;
    }
    // Neither it nor its inverse is 0, subnormal or infinite.
    let scale = (largest / MOST).max(f32::MIN_POSITIVE);
    let inverse = 1.0 / scale;
    for (code, x) in codes.iter_mut().zip(run) {
        let x = x * inverse;
        // No sum overflows, however the two divisions were rounded.
        let x = if x > MOST { MOST } else { x };
        let x = if x < -MOST { -MOST } else { x };
        *code = (x + ROUND).to_bits() as i16;
    }
    scale
}
