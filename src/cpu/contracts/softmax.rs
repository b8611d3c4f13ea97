//! What the softmax does with the scores that one query sees, in units of log2.
//!
//! All levels give the same bits, but for the bf16 of some: products and sums are rounded apart, sums are
//! those of 16 lanes, added up as [`sum_lanes`](crate::cpu::plain::lanes::sum_lanes) does.

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
    /// Writes the largest score of each run of [`RUN`](super::RUN) scores of each row. NaN does not count.
    pub max_of_runs: unsafe fn(Scores<'_>, &mut [f32]),
    /// Writes `2^(score - max)` in int16: see [`Int16Exp`].
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
    /// Checks that they are there; returns how many elements they lie in, those between rows included.
    ///
    /// # Panics
    /// Unless they are, in rows of a multiple of 16, or if there are none.
    pub(crate) fn check(&self) -> usize {
        let Self { data, rows, len, stride } = *self;
        assert!(rows > 0 && len > 0 && len <= stride && len.is_multiple_of(LANES));
        let reach = (rows - 1).checked_mul(stride).and_then(|last| last.checked_add(len));
        reach.filter(|&reach| reach <= data.len()).expect("the scores of all rows")
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

/// Up to 16 rows of scores, and their place in an int16 product: `2^(score - max) ~ scale * code` with a scale for
/// each run. Their sums are those of what the codes stand for, or NaN where a score is NaN.
///
/// ```text
/// scale  = 2^(top - max) / 4096                            top: the largest score of the run
/// i      = round(2^11 * min(top - score, 15))              11 bits of fraction in a u16, ties to even
/// q      = 2^14 * 2^-(fraction of i)                       a polynomial in integers
/// code   = round(q / 2^(2 + integer part of i))            0..=4096
/// ```
///
/// All of it from `i` on is in 16-bit integers: twice as many in a vector as f32, and the same on every
/// level by nature. The rounding of `i` is up to `2^-12 ln 2` of the result, and the polynomial is off by
/// up to [`ERROR_INT16`] with it; that of the code is up to `2^-13` of the largest of its run.
///
/// A sum is over lanes in f32: lane `l` of 16 adds up the codes at places `2 l` and `2 l + 1` of every 32 in
/// the run, exactly, times the scale, run by run.
pub(crate) struct Int16Exp<'a> {
    pub scores: Scores<'a>,
    /// In the places of the scores.
    pub codes: &'a mut [i16],
    /// The largest score of each run, and its scale, as [`scales_of_runs`](crate::cpu::plain::softmax::scales_of_runs)
    /// finds it.
    pub tops: &'a [f32],
    pub scales: &'a [f32],
    /// One a row.
    pub sums: &'a mut [f32],
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
