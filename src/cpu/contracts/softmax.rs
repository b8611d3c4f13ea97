//! What the softmax does with the scores that one query sees, in units of log2.
//!
//! All levels give the same bits, but for the bf16 of some: products and sums are rounded apart, sums of floats are
//! those of 16 lanes, added up as [`sum_lanes`](crate::cpu::plain::lanes::sum_lanes) does; those of codes are exact.

use super::panel_product::{INT16_LEFT, LANES, RUN};

/// One instruction set's way.
#[derive(Debug)]
pub(crate) struct Softmax {
    /// Name in reports.
    pub name: &'static str,
    /// The largest score; NaN does not count.
    ///
    /// # Safety
    /// The instructions are there; so for the others.
    pub max: unsafe fn(&[f32]) -> f32,
    /// Replaces scores by `2^(score - max)`, relative error below [`ERROR_F32`]: see [`F32Exp`].
    pub exp_f32: unsafe fn(F32Exp<'_>),
    /// Writes `255 * 2^(score - max)` rounded to codes of the same number; returns the sum of these
    /// codes, or NaN if there is a NaN.
    pub exp_int8: unsafe fn(&[f32], f32, &mut [u8]) -> f32,
    /// Writes `2^(score - top)` in int16: see [`Int16Exp`].
    pub exp_int16: unsafe fn(Int16Exp<'_>),
}

/// Rows of scores, each from the beginning of a run on.
#[derive(Clone, Copy)]
pub(crate) struct Scores<'a> {
    /// From the first of the first row on, at least as far as the last of the last.
    pub data: &'a [f32],
    pub rows: usize,
    /// Scores of a row: a multiple of 16.
    pub len: usize,
    /// From the start of a row to that of the next.
    pub stride: usize,
}

impl<'a> Scores<'a> {
    /// Checks that they are there.
    ///
    /// # Panics
    /// Unless they are, in rows of a multiple of 16, or if there are none.
    pub(crate) fn check(&self) {
        self.check_len(self.data.len());
    }

    /// Checks that so many elements are enough for rows like these.
    pub(crate) fn check_len(&self, data: usize) {
        let Self { rows, len, stride, .. } = *self;
        assert!(rows > 0 && len > 0 && len <= stride && len.is_multiple_of(LANES));
        let reach = (rows - 1).checked_mul(stride).and_then(|last| last.checked_add(len));
        assert!(reach.is_some_and(|reach| reach <= data), "the scores of all rows");
    }

    /// Runs of a row.
    #[inline(always)]
    pub(crate) fn runs(&self) -> usize {
        self.len.div_ceil(RUN)
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.len]
    }
}

/// Up to 16 rows of scores, whose place `2^(score - max)` takes.
pub(crate) struct F32Exp<'a> {
    /// As in [`Scores`].
    pub scores: &'a mut [f32],
    pub len: usize,
    pub stride: usize,
    /// One a row.
    pub maxes: &'a [f32],
    /// Of what has come in the place of the scores, one a row.
    pub sums: &'a mut [f32],
}

/// Rows of scores, and their place in an int16 product: `2^(score - top) ~ code / 4096`, with the largest score of
/// each run as its top.
///
/// ```text
/// i      = round(2^11 * min(top - score, 15))              11 bits of fraction in a u16, ties to even
/// q      = 2^14 * 2^-(fraction of i)                       a polynomial in integers
/// code   = round(q / 2^(2 + integer part of i))            0..=4096
/// ```
///
/// All of it from `i` on is in 16-bit integers: twice as many in a vector as f32, and the same on every
/// level by nature. The rounding of `i` is up to `2^-12 ln 2` of the result, and the polynomial is off by
/// up to [`ERROR_INT16`] with it; that of the code is up to `2^-13` of the largest of its run.
pub(crate) struct Int16Exp<'a> {
    pub scores: Scores<'a>,
    /// As many in each row, `stride` elements apart.
    pub codes: &'a mut [i16],
    pub stride: usize,
    pub runs: Int16Runs<'a>,
}

/// What is known of the runs of some rows, whose codes are in int16: a number for each row, run by run.
pub(crate) struct Int16Runs<'a> {
    /// The largest score, minus infinity where there is none. NaN does not count.
    pub tops: &'a mut [f32],
    /// The sum of the codes, which is exact; NaN where a score is NaN.
    pub counts: &'a mut [f32],
    /// From one run of a row to the next.
    pub stride: usize,
}

impl Int16Runs<'_> {
    /// From a row and a run on.
    #[inline(always)]
    pub(crate) fn at(&mut self, row: usize, run: usize) -> Int16Runs<'_> {
        let (at, stride) = (run * self.stride + row, self.stride);
        Int16Runs { tops: &mut self.tops[at..], counts: &mut self.counts[at..], stride }
    }

    #[inline(always)]
    pub(crate) fn set(&mut self, row: usize, run: usize, (top, count): (f32, f32)) {
        let at = run * self.stride + row;
        (self.tops[at], self.counts[at]) = (top, count);
    }

    /// # Panics
    /// Unless there are numbers for so many rows and runs.
    pub(crate) fn check(&self, rows: usize, runs: usize) {
        let needed = (runs.saturating_sub(1)).checked_mul(self.stride);
        let needed = needed.and_then(|before| before.checked_add(rows));
        let fits = |len: usize| needed.is_some_and(|needed| len >= needed);
        assert!(rows <= self.stride && fits(self.tops.len()) && fits(self.counts.len()));
    }
}

/// Bits behind the point of a distance from the largest score of a run.
pub(crate) const FRACTION: u32 = 11;
/// The largest distance: beyond it the code is 0.
pub(crate) const FARTHEST: f32 = 15.0;
/// A distance added to this has its integer in the lowest 16 bits, which are 0 here.
pub(crate) const DISTANCE: f32 = (3 << (22 - FRACTION)) as f32;
/// The bits above which a distance was NaN.
pub(crate) const DISTANCE_END: u32 = DISTANCE.to_bits() + ((FARTHEST as u32) << FRACTION);
/// The coefficients of `2^-f` in fourteen bits: `q = c0 - f (c1 - f (c2 - f c3))`, minimax in relative
/// error over `[0, 1]`, then the neighbours in integers with the least mean square error.
pub(crate) const EXP2_INT16: [i16; 4] = [16_382, 11_320, 3_770, 641];
/// A code of the largest score: `q` times this in the upper half is rounded to 4096.
pub(crate) const TOP_INT16: i16 = 8192;
/// What a code of 1 stands for in a run whose largest score is that of the row.
pub(crate) const SCALE_INT16: f32 = 1.0 / INT16_LEFT as f32;

/// Writes `2^(score - max)` rounded to bf16, relative error before that below [`ERROR_BF16`], to as
/// many places; returns the sum of the rounded ones, so that they sum to 1 after the division.
///
/// # Safety
/// The instructions are there.
pub(crate) type ExpBf16 = unsafe fn(&[f32], f32, &mut [u16]) -> f32;

/// The code of a probability as large as the largest.
pub(crate) const CODES: f32 = 255.0;

/// The relative error of `2^x` in f32, where it is not below the smallest normal number.
#[cfg(test)]
pub(crate) const ERROR_F32: f64 = 2e-7;
/// The relative error of `2^x` before it is rounded to bf16, whose own is up to 3.9e-3.
#[cfg(test)]
pub(crate) const ERROR_BF16: f64 = 1.1e-4;
/// The relative error of `2^x` before it is rounded to int16.
#[cfg(test)]
pub(crate) const ERROR_INT16: f64 = 4e-4;
