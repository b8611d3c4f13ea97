//! Extremes that follow the data.

use crate::quant::ValueRange;
use crate::{Error, Result};

/// Exponential moving average of the extremes of each call:
/// `min = (1 - w) * min + w * min(x)`, the same for `max`; the first call sets both.
///
/// Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1; `MovingAverageMinMaxObserver` of
/// PyTorch, whose weight is 0.01. A call without a finite value is no observation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MovingAverage {
    weight: f64,
    /// Of the first call, and of the average: what a merge needs.
    seen: Option<(Extremes, Extremes)>,
    calls: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Extremes {
    min: f64,
    max: f64,
}

impl Extremes {
    fn map(self, other: Self, f: impl Fn(f64, f64) -> f64) -> Self {
        Self { min: f(self.min, other.min), max: f(self.max, other.max) }
    }
}

impl MovingAverage {
    /// `weight` of the newest call.
    pub(super) fn new(weight: f64) -> Self {
        Self { weight, seen: None, calls: 0 }
    }

    /// One more observation.
    pub fn observe(&mut self, values: &[f32]) {
        let range = ValueRange::of_finite(values);
        if range == ValueRange::EMPTY {
            return;
        }
        let new = Extremes { min: range.min.into(), max: range.max.into() };
        self.calls += 1;
        self.seen = match self.seen {
            None => Some((new, new)),
            Some((first, average)) => {
                Some((first, average.map(new, |old, new| old + self.weight * (new - old))))
            }
        };
    }

    /// Appends what another observer saw after this one.
    ///
    /// After `m` calls the first, `y`, has the weight `(1 - w)^(m - 1)`, and would have had `w`
    /// times that behind others; so with the averages `a` and `b` of both parts the whole has
    /// `b + (1 - w)^m * (a - y)`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the weights differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.weight != other.weight {
            return Err(Error::Mismatch(format!(
                "moving averages of the weights {} and {}; expected one",
                self.weight, other.weight
            )));
        }
        self.seen = match (self.seen, other.seen) {
            (None, seen) | (seen, None) => seen,
            (Some((first, a)), Some((y, b))) => {
                let left = (1.0 - self.weight).powf(other.calls as f64);
                let change = a.map(y, |a, y| left * (a - y));
                Some((first, b.map(change, |b, change| b + change)))
            }
        };
        self.calls += other.calls;
        Ok(())
    }

    /// The averages; [`ValueRange::EMPTY`] if nothing was seen.
    pub fn range(&self) -> ValueRange {
        match self.seen {
            None => ValueRange::EMPTY,
            Some((_, Extremes { min, max })) => ValueRange { min: min as f32, max: max as f32 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_formula_by_hand() {
        let mut observer = MovingAverage::new(0.5);
        observer.observe(&[-1.0, 2.0]);
        assert_eq!(observer.range(), ValueRange { min: -1.0, max: 2.0 });
        observer.observe(&[-3.0, 4.0, 0.0]);
        assert_eq!(observer.range(), ValueRange { min: -2.0, max: 3.0 });
        observer.observe(&[f32::NAN]);
        observer.observe(&[1.0]);
        assert_eq!(observer.range(), ValueRange { min: -0.5, max: 2.0 });
    }

    #[test]
    fn weights_are_not_mixed() {
        let error = MovingAverage::new(0.5).merge(&MovingAverage::new(0.25)).unwrap_err();
        assert!(error.to_string().contains("0.5 and 0.25"), "{error}");
    }
}
