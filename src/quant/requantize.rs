//! int32 accumulators to int8 codes: the step between two integer layers.
//!
//! The accumulator of a product stands for `real = scale_a * scale_b * acc`. As a code of the
//! output it is `zero_point + real / scale_out`, so every accumulator is multiplied by
//! `m = scale_a * scale_b / scale_out` and rounded. Two ways to do that are in use:
//!
//! * [`Requantizer::fp32`] multiplies in f32, rounds ties to even, then saturates (ONNX Runtime's
//!   `QLinearMatMul`, XNNPACK, FBGEMM). The default.
//! * [`Requantizer::fixed_point`] uses integers alone: a 31-bit multiplier and a shift, with the
//!   rounding of gemmlowp and TFLite (Jacob et al. 2018, arXiv:1712.05877, section 2.2). It can
//!   differ from the first by one step, at ties and small shifts.

use super::QuantParams;
use crate::{Error, Result};

/// A positive real multiplier as `mantissa * 2^(-31 - right_shift)`, `mantissa` in `[2^30, 2^31)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedPointMultiplier {
    mantissa: i32,
    right_shift: i32,
}

impl FixedPointMultiplier {
    /// Rounds `multiplier` to 31 significant bits.
    ///
    /// # Errors
    /// [`Error::QuantParams`] unless it is finite, positive, and below `2^31`.
    pub fn from_real(multiplier: f64) -> Result<Self> {
        if !(multiplier.is_finite() && multiplier > 0.0 && multiplier < f64::from(1u32 << 31)) {
            return Err(Error::QuantParams(format!(
                "requantization multiplier {multiplier}, expected positive and below 2^31"
            )));
        }
        // multiplier = fraction * 2^exponent with fraction in [0.5, 1). `log2` may land one off
        // beside a power of two; the two adjustments put that right.
        let mut exponent = multiplier.log2().floor() as i32 + 1;
        // In two steps, each of which is a normal number also where the multiplier is not.
        let scaled = |exponent: i32| {
            let half = exponent / 2;
            multiplier * f64::exp2(-f64::from(half)) * f64::exp2(-f64::from(exponent - half))
        };
        if scaled(exponent) >= 1.0 {
            exponent += 1;
        } else if scaled(exponent) < 0.5 {
            exponent -= 1;
        }
        let mut mantissa = (scaled(exponent) * f64::from(1u32 << 31)).round() as i64;
        if mantissa == 1 << 31 {
            mantissa /= 2;
            exponent += 1;
        }
        Ok(Self { mantissa: mantissa as i32, right_shift: -exponent })
    }

    /// The 31-bit multiplier, `[2^30, 2^31)`.
    pub fn mantissa(self) -> i32 {
        self.mantissa
    }

    /// How far to shift right after multiplying; negative means left, before multiplying.
    pub fn right_shift(self) -> i32 {
        self.right_shift
    }

    /// `acc * multiplier`, with gemmlowp's two roundings.
    pub fn apply(self, acc: i32) -> i32 {
        let left = (-self.right_shift).max(0) as u32;
        let shifted = (i64::from(acc) << left).clamp(i64::from(i32::MIN), i64::from(i32::MAX));
        let high = saturating_rounding_doubling_high_mul(shifted as i32, self.mantissa);
        rounding_divide_by_power_of_two(high, self.right_shift.max(0) as u32)
    }
}

/// The high half of `2 * a * b`, rounded to nearest, ties away from zero for positive products and
/// towards zero for negative ones; saturates in the one case that overflows. (gemmlowp,
/// `fixedpoint.h`, and Arm's `SQRDMULH`.)
fn saturating_rounding_doubling_high_mul(a: i32, b: i32) -> i32 {
    if a == i32::MIN && b == i32::MIN {
        return i32::MAX;
    }
    let product = i64::from(a) * i64::from(b);
    let nudge = if product >= 0 { 1 << 30 } else { 1 - (1 << 30) };
    // Division, not a shift: it truncates towards zero, as the definition does.
    ((product + nudge) / (1i64 << 31)) as i32
}

/// `x / 2^exponent`, rounded to nearest, ties away from zero.
fn rounding_divide_by_power_of_two(x: i32, exponent: u32) -> i32 {
    if exponent > 31 {
        return 0;
    }
    let mask = (1i64 << exponent) - 1;
    let remainder = i64::from(x) & mask;
    let threshold = (mask >> 1) + i64::from(x < 0);
    ((i64::from(x) >> exponent) + i64::from(remainder > threshold)) as i32
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Multiplier {
    Fp32(f32),
    FixedPoint(FixedPointMultiplier),
}

/// Turns int32 accumulators into int8 codes; see the module's text for the two modes.
///
/// ```
/// use candle_int8_attention::quant::{QuantParams, Requantizer};
/// let output = QuantParams::affine(0.5, -3)?;
/// // Inputs with scales 0.02 and 0.05: acc = 1234 stands for 0.02 * 0.05 * 1234 = 1.234.
/// let requantizer = Requantizer::fp32(0.02, 0.05, output)?;
/// assert_eq!(requantizer.requantize(1234), -1); // round(1.234 / 0.5) - 3
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Requantizer {
    multiplier: Multiplier,
    output: QuantParams,
}

impl Requantizer {
    /// f32 multiplication by `scale_a * scale_b / output.scale()`, ties to even.
    ///
    /// # Errors
    /// [`Error::QuantParams`] if that multiplier is not finite and positive.
    pub fn fp32(scale_a: f32, scale_b: f32, output: QuantParams) -> Result<Self> {
        let multiplier = scale_a * scale_b / output.scale();
        if multiplier.is_finite() && multiplier > 0.0 {
            Ok(Self { multiplier: Multiplier::Fp32(multiplier), output })
        } else {
            Err(Error::QuantParams(format!(
                "requantization multiplier {scale_a} * {scale_b} / {} = {multiplier}, expected \
                 finite and positive",
                output.scale()
            )))
        }
    }

    /// Integer arithmetic only, bit-exact with gemmlowp.
    ///
    /// # Errors
    /// Those of [`FixedPointMultiplier::from_real`].
    pub fn fixed_point(scale_a: f32, scale_b: f32, output: QuantParams) -> Result<Self> {
        let real = f64::from(scale_a) * f64::from(scale_b) / f64::from(output.scale());
        let multiplier = Multiplier::FixedPoint(FixedPointMultiplier::from_real(real)?);
        Ok(Self { multiplier, output })
    }

    /// Scale and zero point of the codes this produces.
    pub fn output(&self) -> QuantParams {
        self.output
    }

    /// The integer multiplier of the fixed-point mode.
    pub fn multiplier(&self) -> Option<FixedPointMultiplier> {
        match self.multiplier {
            Multiplier::FixedPoint(multiplier) => Some(multiplier),
            Multiplier::Fp32(_) => None,
        }
    }

    /// One accumulator to one code.
    pub fn requantize(&self, acc: i32) -> i8 {
        let zero = i32::from(self.output.zero_point());
        let (qmin, qmax) = (self.output.scheme().qmin(), self.output.scheme().qmax());
        match self.multiplier {
            Multiplier::Fp32(m) => {
                let (low, high) =
                    ((i32::from(qmin) - zero) as f32, (i32::from(qmax) - zero) as f32);
                let steps = (acc as f32 * m).clamp(low, high).round_ties_even();
                (steps as i32 + zero) as i8
            }
            Multiplier::FixedPoint(m) => {
                m.apply(acc).saturating_add(zero).clamp(i32::from(qmin), i32::from(qmax)) as i8
            }
        }
    }

    /// Every accumulator to its code.
    pub fn requantize_all(&self, accumulators: &[i32]) -> Vec<i8> {
        accumulators.iter().map(|&acc| self.requantize(acc)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multipliers_are_normalized() {
        for real in [0.5, 0.25, 0.999_999_999_9, 1.0, 3.7, 1e-9, 123_456.0, 0.1] {
            let m = FixedPointMultiplier::from_real(real).unwrap();
            assert!(m.mantissa() >= 1 << 30, "{real}: {m:?}");
            let back = f64::from(m.mantissa()) * f64::exp2(-31.0 - f64::from(m.right_shift()));
            assert!((back / real - 1.0).abs() < 1e-9, "{real}: {back}");
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 4e9] {
            assert!(FixedPointMultiplier::from_real(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_two_modes_differ_by_one_step_at_most() {
        let output = QuantParams::affine(0.37, 5).unwrap();
        let fp32 = Requantizer::fp32(0.013, 0.021, output).unwrap();
        let fixed = Requantizer::fixed_point(0.013, 0.021, output).unwrap();
        for acc in (-300_000..300_000).step_by(7) {
            let (a, b) = (fp32.requantize(acc), fixed.requantize(acc));
            assert!((i32::from(a) - i32::from(b)).abs() <= 1, "{acc}: {a} and {b}");
        }
    }

    #[test]
    fn multipliers_above_one_shift_left_and_saturate() {
        let output = QuantParams::affine(1.0, 0).unwrap();
        let fixed = Requantizer::fixed_point(4.0, 2.0, output).unwrap();
        let codes = fixed.requantize_all(&[0, 3, -3, i32::MAX, i32::MIN]);
        assert_eq!(codes, [0, 24, -24, 127, -128]);
    }

    #[test]
    fn multipliers_that_vanish_or_overflow_are_an_error() {
        let output = QuantParams::affine(1e30, 0).unwrap();
        assert!(Requantizer::fp32(1e-30, 1e-30, output).is_err());
        let output = QuantParams::affine(1e-30, 0).unwrap();
        let error = Requantizer::fp32(1e30, 1e30, output).unwrap_err();
        assert!(error.to_string().contains("multiplier"), "{error}");
    }
}
