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
use crate::memory::Footprint;

/// Some rows in 16 bits. The memory is kept from one [`Int16Rows::put`] to the next.
#[derive(Default)]
pub(crate) struct Int16Rows {
    /// Each row filled up with zeros to `stride`, whole groups.
    codes: Vec<i16>,
    /// `[rows, runs]`.
    scales: Vec<f32>,
    stride: usize,
    count: usize,
    depth: usize,
}

impl Int16Rows {
    /// Rounds rows, in the place of those that were here. A run that is not finite has a scale of NaN.
    pub(crate) fn put(&mut self, rows: Rows<'_>) {
        (self.count, self.depth) = (rows.count(), rows.depth());
        self.stride = self.depth.next_multiple_of(GROUP);
        self.codes.clear();
        self.codes.resize(self.count * self.stride, 0);
        self.scales.clear();
        self.scales.resize(self.count * self.runs(), 0.0);
        if self.depth > 0 {
            let Self { codes, scales, stride, .. } = self;
            let job = Round { rows, codes, scales, stride: *stride };
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
        (&self.codes, self.stride)
    }

    /// `[rows, runs]`.
    pub(crate) fn scales(&self) -> &[f32] {
        &self.scales
    }
}

impl Footprint for Int16Rows {
    fn footprint(&self) -> usize {
        self.codes.footprint() + self.scales.footprint()
    }
}

struct Round<'a> {
    rows: Rows<'a>,
    codes: &'a mut [i16],
    scales: &'a mut [f32],
    stride: usize,
}

/// Symmetric codes of each run; one that is not finite has a scale of NaN and codes of 0.
#[inline(always)]
fn round(Round { rows, codes, scales, stride }: Round<'_>) {
    const MOST: f32 = INT16_LEFT as f32;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: the integer is in the low bits of the sum.
    let mut scales = scales.iter_mut();
    for (row, codes) in rows.iter().zip(codes.chunks_exact_mut(stride)) {
        for (run, codes) in row.chunks(RUN).zip(codes.chunks_mut(RUN)) {
            let Some(scale) = scales.next() else { return };
            let (largest, finite) = max_magnitude(run);
            if !finite {
                *scale = f32::NAN;
                continue;
            }
            // Neither it nor its inverse is 0, subnormal or infinite.
            *scale = (largest / MOST).max(f32::MIN_POSITIVE);
            let inverse = 1.0 / *scale;
            for (code, x) in codes.iter_mut().zip(run) {
                let x = x * inverse;
                // No sum overflows, however the two divisions were rounded.
                let x = if x > MOST { MOST } else { x };
                let x = if x < -MOST { -MOST } else { x };
                *code = (x + ROUND).to_bits() as i16;
            }
        }
    }
}
