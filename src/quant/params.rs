//! Scale and zero point of one group.

use super::Scheme;
use crate::cpu::plain::rows::{affine_params, symmetric_scale};
use crate::{Error, Result};

/// The smallest and largest value of a group of finite numbers.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueRange {
    /// Smallest value.
    pub min: f32,
    /// Largest value.
    pub max: f32,
}

impl ValueRange {
    /// The range of no data: neutral for [`ValueRange::union`].
    pub const EMPTY: ValueRange = ValueRange { min: f32::INFINITY, max: f32::NEG_INFINITY };

    /// The range of those values that are finite.
    pub(super) fn of_finite(values: &[f32]) -> ValueRange {
        let finite = values.iter().copied().filter(|x| x.is_finite());
        finite.fold(ValueRange::EMPTY, |range, x| range.union(ValueRange { min: x, max: x }))
    }

    /// The smallest range that holds both.
    pub fn union(self, other: ValueRange) -> ValueRange {
        ValueRange { min: self.min.min(other.min), max: self.max.max(other.max) }
    }

    /// The largest absolute value; 0 for an empty range.
    pub fn max_abs(self) -> f32 {
        self.max.max(-self.min).max(0.0)
    }
}

/// Scale and zero point: `real = scale * (q - zero_point)`.
///
/// # Edge cases
/// * A range of zeros only, or of no data at all: `scale = 1`, `zero_point = 0`; every zero
///   quantizes to the zero point and comes back as exactly 0.
/// * A range so small that its scale would be subnormal: the scale is [`f32::MIN_POSITIVE`]; the
///   error stays below half of that, 5.9e-39.
/// * A range so large that `max - min` overflows: the scale is computed as
///   `max / 255 - min / 255`, which does not.
/// * NaN or infinite bounds: an error.
///
/// ```
/// use candle_int8_attention::quant::{QuantParams, ValueRange, Scheme};
/// let params = QuantParams::from_range(Scheme::Affine, ValueRange { min: -1.0, max: 3.0 })?;
/// assert_eq!(params.zero_point(), -64);
/// assert_eq!(params.quantize(0.0), -64); // real zero is always exact
/// assert!((params.dequantize(params.quantize(2.0)) - 2.0).abs() <= params.scale() / 2.0);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantParams {
    scale: f32,
    zero_point: i8,
    scheme: Scheme,
}

impl QuantParams {
    /// Symmetric parameters: zero point 0, codes in `[-127, 127]`.
    ///
    /// # Errors
    /// [`Error::QuantParams`] unless `scale` is finite and positive.
    pub fn symmetric(scale: f32) -> Result<Self> {
        Self::checked(scale, 0, Scheme::Symmetric)
    }

    /// Affine parameters: codes in `[-128, 127]`.
    ///
    /// Unsigned parameters (ONNX `uint8`) are the same with 128 subtracted from the zero point
    /// and from every code.
    ///
    /// # Errors
    /// [`Error::QuantParams`] unless `scale` is finite and positive and `zero_point` fits int8.
    pub fn affine(scale: f32, zero_point: i32) -> Result<Self> {
        let zero_point = i8::try_from(zero_point).map_err(|_| {
            Error::QuantParams(format!("zero point {zero_point}, expected -128..=127"))
        })?;
        Self::checked(scale, zero_point, Scheme::Affine)
    }

    fn checked(scale: f32, zero_point: i8, scheme: Scheme) -> Result<Self> {
        if scale.is_finite() && scale > 0.0 {
            Ok(Self { scale, zero_point, scheme })
        } else {
            Err(Error::QuantParams(format!("scale {scale}, expected finite and positive")))
        }
    }

    /// The parameters that map `range` onto the codes of `scheme`.
    ///
    /// Symmetric: `scale = max|x| / 127`. Affine: the range is widened to contain 0, then
    /// `scale = (max - min) / 255` and `zero_point = round(-min / scale) - 128`, which is ONNX's
    /// `DynamicQuantizeLinear` shifted from unsigned to signed codes.
    ///
    /// # Errors
    /// [`Error::QuantParams`] if a bound is NaN, or infinite in a non-empty range.
    pub fn from_range(scheme: Scheme, range: ValueRange) -> Result<Self> {
        if range == ValueRange::EMPTY {
            return Ok(Self { scale: 1.0, zero_point: 0, scheme });
        }
        if !(range.min.is_finite() && range.max.is_finite()) {
            return Err(Error::QuantParams(format!(
                "range {}..{}, expected finite bounds",
                range.min, range.max
            )));
        }
        Ok(Self::from_finite_range(scheme, range))
    }

    /// [`QuantParams::from_range`] for bounds known to be finite, or the empty range.
    pub(crate) fn from_finite_range(scheme: Scheme, range: ValueRange) -> Self {
        match scheme {
            Scheme::Symmetric => {
                Self { scale: symmetric_scale(range.max_abs()), zero_point: 0, scheme }
            }
            Scheme::Affine => {
                let (scale, zero) = affine_params(range.min.min(0.0), range.max.max(0.0));
                Self { scale, zero_point: zero as i8, scheme }
            }
        }
    }

    /// Real size of one step.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The code of real 0.
    pub fn zero_point(&self) -> i8 {
        self.zero_point
    }

    /// Symmetric or affine; it decides the smallest code.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Those of `2^power` times the numbers, whose codes are the same; `None` where the scale is no normal number
    /// then.
    pub(crate) fn times_power(self, power: i32) -> Option<Self> {
        let scale = (f64::from(self.scale) * 2f64.powi(power)) as f32;
        scale.is_normal().then_some(Self { scale, ..self })
    }

    /// `clamp(round(x / scale) + zero_point)`, ties to even. Infinities saturate; NaN gives the
    /// zero point (use [`QuantizedTensor::quantize`](super::QuantizedTensor::quantize) to have it
    /// reported).
    pub fn quantize(&self, x: f32) -> i8 {
        let zero = f32::from(self.zero_point);
        let (low, high) =
            (f32::from(self.scheme.qmin()) - zero, f32::from(self.scheme.qmax()) - zero);
        let steps = x / self.scale;
        let steps = if steps.is_nan() { 0.0 } else { steps.clamp(low, high) };
        (steps.round_ties_even() + zero) as i8
    }

    /// `scale * (q - zero_point)`, saturating at the largest finite f32 (which the rounding of a
    /// huge scale could otherwise exceed).
    pub fn dequantize(&self, q: i8) -> f32 {
        let steps = f32::from(i16::from(q) - i16::from(self.zero_point));
        (self.scale * steps).clamp(f32::MIN, f32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(scheme: Scheme, min: f32, max: f32) -> QuantParams {
        QuantParams::from_range(scheme, ValueRange { min, max }).unwrap()
    }

    #[test]
    fn zero_is_exact_in_every_affine_range() {
        for (min, max) in [(-1.0, 3.0), (2.0, 5.0), (-7.5, -0.1), (-1e-30, 1e30), (0.0, 0.0)] {
            let p = params(Scheme::Affine, min, max);
            assert_eq!(p.dequantize(p.quantize(0.0)), 0.0, "{min}..{max}");
        }
    }

    #[test]
    fn constant_zero_and_empty_ranges_have_scale_one() {
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            assert_eq!(params(scheme, 0.0, 0.0).scale(), 1.0);
            assert_eq!(QuantParams::from_range(scheme, ValueRange::EMPTY).unwrap().scale(), 1.0);
            let p = params(scheme, 2.5, 2.5);
            assert_eq!(p.quantize(2.5), 127);
            assert!((p.dequantize(127) - 2.5).abs() < 1e-6);
        }
    }

    #[test]
    fn subnormal_ranges_keep_a_usable_scale() {
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            for max in [f32::from_bits(1), 1e-40, f32::MIN_POSITIVE] {
                let p = params(scheme, -max, max);
                assert!(p.scale() >= f32::MIN_POSITIVE);
                assert!((p.dequantize(p.quantize(max)) - max).abs() <= p.scale() / 2.0);
            }
        }
    }

    #[test]
    fn huge_ranges_do_not_overflow() {
        for scheme in [Scheme::Symmetric, Scheme::Affine] {
            let p = params(scheme, f32::MIN, f32::MAX);
            assert!(p.scale().is_finite());
            assert_eq!(p.quantize(f32::MAX), 127);
            assert!(p.dequantize(127).is_finite());
        }
    }

    #[test]
    fn bounds_that_are_not_finite_are_an_error() {
        for (min, max) in [(f32::NAN, 1.0), (0.0, f32::INFINITY), (f32::NEG_INFINITY, 0.0)] {
            let error =
                QuantParams::from_range(Scheme::Affine, ValueRange { min, max }).unwrap_err();
            assert!(error.to_string().contains("finite"), "{error}");
        }
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert!(QuantParams::symmetric(scale).is_err(), "{scale}");
        }
        assert!(QuantParams::affine(1.0, 128).unwrap_err().to_string().contains("128"));
    }

    #[test]
    fn scalar_quantize_saturates_and_rounds_ties_to_even() {
        let p = QuantParams::symmetric(1.0).unwrap();
        let cases = [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-500.0, -127)];
        for (x, q) in cases {
            assert_eq!(p.quantize(x), q, "{x}");
        }
        assert_eq!(p.quantize(f32::INFINITY), 127);
        assert_eq!(p.quantize(f32::NAN), 0);
        assert_eq!(QuantParams::affine(1.0, 0).unwrap().quantize(-500.0), -128);
    }
}
