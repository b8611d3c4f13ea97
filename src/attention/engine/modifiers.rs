//! What comes between scores and softmax besides a scale, softcap, ALiBi, a mask tensor; and the logit that is
//! in the softmax beside them.

use super::mask::MaskView;
use crate::attention::AttentionSpec;
use crate::cpu::plain::softmax::exp2;
use crate::cpu::plain::widest;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Softcap, then ALiBi, then the mask; and the scale before them, which sets the unit of all of them.
pub(in crate::attention) struct Modifiers<'a> {
    /// Multiplies every product of a query and a key.
    factor: f32,
    /// Scores are in units of this times log2: 1, unless the numbers of the model are so large that scores
    /// would overflow on the way.
    unit: f32,
    softcap: Option<f32>,
    /// One a query head.
    slopes: Option<Vec<f32>>,
    mask: Option<MaskView<'a>>,
    /// One a query head, in the unit of the scores.
    sink_logits: Option<Vec<f32>>,
}

/// A scale, softcap or logit up to 2^64 leaves room for what is multiplied with it.
const LARGE_FACTOR: i32 = 64;

/// A slope up to 2^32 does too, whatever the distance.
const LARGE_SLOPE: i32 = 32;

/// The power of two in a finite number.
pub(in crate::attention) fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 0xff) as i32 - 127
}

/// 1, or the power of two that brings all numbers of a model down to where they leave room.
fn unit(spec: &AttentionSpec, scale: f32) -> f32 {
    let slopes = spec.alibi_slopes.iter().flatten();
    let logits = spec.sink_logits.iter().flatten().copied().filter(|logit| logit.is_finite());
    let factors = [Some(scale), spec.softcap].into_iter().flatten().chain(logits);
    let beyond = (slopes.map(|slope| exponent(*slope) - LARGE_SLOPE))
        .chain(factors.map(|factor| exponent(factor) - LARGE_FACTOR));
    // At most 2^95.
    f32::from_bits((127 + beyond.max().unwrap_or(0).max(0)).cast_unsigned() << 23)
}

impl<'a> Modifiers<'a> {
    /// Those of a model, whose factor on scores is `scale`, and of a call.
    pub(in crate::attention) fn new(
        spec: &AttentionSpec,
        scale: f32,
        mask: Option<MaskView<'a>>,
    ) -> Self {
        let unit = unit(spec, scale);
        let (scale, slopes) = (scale / unit, spec.alibi_slopes.as_ref());
        let some = |logits: &&Vec<f32>| logits.iter().any(|logit| *logit > f32::NEG_INFINITY);
        let in_unit =
            |logits: &Vec<f32>| logits.iter().map(|logit| logit / unit * LOG2_E).collect();
        Self {
            // A softcap bends the score itself; log2(e) comes after it.
            factor: if spec.softcap.is_some() { scale } else { scale * LOG2_E },
            unit,
            softcap: spec.softcap.map(|cap| cap / unit),
            slopes: slopes.map(|slopes| slopes.iter().map(|slope| slope / unit).collect()),
            mask,
            sink_logits: spec.sink_logits.as_ref().filter(some).map(in_unit),
        }
    }

    /// The logits in the denominators of heads, in the unit of the scores.
    pub(super) fn sink_logits(&self) -> Option<&[f32]> {
        self.sink_logits.as_deref()
    }

    /// Multiplies every product of a query and a key.
    pub(in crate::attention) fn factor(&self) -> f32 {
        self.factor
    }

    /// Whether what all scores of a row have in common changes its probabilities: a softcap bends the true
    /// score, and a sink logit stands beside it.
    pub(in crate::attention) fn row_constants(&self) -> bool {
        self.softcap.is_some() || self.sink_logits.is_some()
    }

    /// Scores are in units of this times log2.
    pub(super) fn unit(&self) -> f32 {
        self.unit
    }

    /// Whether scores stay as they are.
    pub(super) fn is_nothing(&self) -> bool {
        self.softcap.is_none() && self.slopes.is_none() && self.mask.is_none()
    }

    /// Whether one query, `at` its batch element, head and token, may see any of `keys`.
    pub(super) fn let_see(&self, at: [usize; 3], keys: Range<usize>) -> bool {
        !keys.is_empty()
            && (self.mask.as_ref())
                .is_none_or(|mask| mask.mark(at, keys.clone(), &mut vec![0; keys.len()]))
    }

    /// Changes the scores of `keys` for one query, `at` its batch element, head and token, and
    /// leaves them in their unit. Its place among the keys is `position`.
    pub(super) fn apply(
        &self,
        at: [usize; 3],
        position: isize,
        keys: Range<usize>,
        scores: &mut [f32],
    ) {
        if let Some(cap) = self.softcap {
            widest!(softcap, (&mut *scores, cap), (&mut [f32], f32) => ());
        }
        if let Some(slopes) = &self.slopes {
            // Distances are exact in f32 up to 2^24 keys.
            let distance = (position - keys.start as isize) as f32;
            let slope = slopes[at[1]] * LOG2_E;
            widest!(alibi, (&mut *scores, slope, distance), (&mut [f32], f32, f32) => ());
        }
        if let Some(mask) = &self.mask {
            mask.apply(at, keys, LOG2_E / self.unit, scores);
        }
    }
}

/// `cap * tanh(score / cap)`, in units of log2. With `e = exp(-2|x|)`, `tanh|x| = (1-e) / (1+e)`,
/// which has an absolute error of about 1e-7; where that is much beside a small `x`, the first terms
/// of its series at 0 take over. A softmax sees `cap` times the error, so caps may be large.
#[inline(always)]
fn softcap((scores, cap): (&mut [f32], f32)) {
    for score in scores {
        let x = *score / cap;
        let a = x.abs();
        let e = exp2(-2.0 * LOG2_E * a);
        let series = a * (1.0 - a * a * (1.0 / 3.0 - a * a * (2.0 / 15.0)));
        let tanh = if a < 0.03 { series } else { (1.0 - e) / (1.0 + e) };
        *score = (tanh * LOG2_E).copysign(x) * cap;
    }
}

/// Subtracts `slope` times the distance; that of the first score is `distance`, and each is one
/// less than the one before.
#[inline(always)]
fn alibi((scores, slope, distance): (&mut [f32], f32, f32)) {
    for (i, score) in scores.iter_mut().enumerate() {
        *score -= slope * (distance - i as f32).abs();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ordinary models keep log2; the others come down to where a product with any distance is finite.
    #[test]
    fn the_unit_is_as_large_as_the_numbers_ask_for() {
        let unit = |scale, softcap, slopes: &[f32]| {
            let alibi_slopes = Some(slopes.to_vec());
            unit(&AttentionSpec { softcap, alibi_slopes, ..AttentionSpec::default() }, scale)
        };
        for scale in [0.0, 1e-40, 0.125, -1.0, 1e19] {
            assert_eq!(unit(scale, Some(50.0), &[0.5, -1e9]), 1.0, "{scale}");
        }
        assert_eq!(unit(2f32.powi(65), None, &[]), 2.0);
        assert_eq!(unit(-f32::MAX, None, &[]), 2f32.powi(63));
        assert_eq!(unit(1.0, Some(f32::MAX), &[1.0]), 2f32.powi(63));
        assert_eq!(unit(1.0, None, &[0.0, -2f32.powi(40), 1.0]), 256.0);
        assert_eq!(unit(f32::MAX, None, &[f32::MAX]), 2f32.powi(95));
    }

    #[test]
    fn softcap_is_cap_times_tanh() {
        let cap = 30.0;
        let xs: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.1).collect();
        let mut capped = xs.clone();
        softcap((&mut capped, cap));
        for (x, found) in xs.iter().zip(capped) {
            let exact = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
            assert!((f64::from(found / LOG2_E) - exact).abs() < 2e-7 * f64::from(cap), "{x}");
        }
        // Caps that bend nothing.
        for cap in [1e5f32, 1e8, 1e12, 1e30, 3e38] {
            let mut scores = [3.5f32, -0.02, 90.0];
            softcap((&mut scores, cap));
            for (found, x) in scores.into_iter().zip([3.5f32, -0.02, 90.0]) {
                assert!((found / LOG2_E - x).abs() < 1e-6 * x.abs().max(1.0), "{cap}: {found}");
            }
        }
        let mut special = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0];
        softcap((&mut special, cap));
        assert_eq!(special[..2], [LOG2_E * cap, -LOG2_E * cap]);
        assert!(special[2].is_nan());
        assert_eq!(special[3], 0.0);
    }
}
