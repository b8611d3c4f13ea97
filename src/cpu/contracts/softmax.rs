//! What the softmax does with the scores that one query sees, in units of log2.

/// One instruction set's way, row by row.
#[derive(Debug)]
pub(crate) struct Softmax {
    /// Name in reports.
    pub name: &'static str,
    /// The largest score; NaN does not count.
    ///
    /// # Safety
    /// The instructions are there; so for the others.
    pub max: unsafe fn(&[f32]) -> f32,
    /// Replaces scores by `2^(score - max)`, relative error below [`ERROR_F32`]; returns their sum.
    pub exp_f32: unsafe fn(&mut [f32], f32) -> f32,
    /// Writes `255 * 2^(score - max)` rounded to codes of the same number; returns the sum of these
    /// codes, or NaN if there is a NaN.
    pub exp_int8: unsafe fn(&[f32], f32, &mut [u8]) -> f32,
}

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
