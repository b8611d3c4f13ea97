//! What comes between scores and softmax besides a scale: softcap, ALiBi, a mask tensor.

use super::mask::MaskView;
use crate::cpu::plain::softmax::exp2;
use crate::cpu::plain::widest;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Softcap, then ALiBi, then the mask.
pub(in crate::attention) struct Modifiers<'a> {
    pub softcap: Option<f32>,
    /// One a query head.
    pub slopes: Option<Vec<f32>>,
    pub mask: Option<MaskView<'a>>,
}

impl Modifiers<'_> {
    /// Whether scores stay as they are.
    pub(super) fn is_nothing(&self) -> bool {
        self.softcap.is_none() && self.slopes.is_none() && self.mask.is_none()
    }

    /// Changes the scores of `keys` for one query, `at` its batch element, head and token, and
    /// leaves them in units of log2. Its place among the keys is `position`.
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
            mask.apply(at, keys, scores);
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
