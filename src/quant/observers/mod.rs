//! Observers: they watch the numbers that pass, and say which range int8 should cover.
//!
//! | observer | range | for |
//! |---|---|---|
//! | [`MinMax`] | all that was seen | data whose largest numbers matter most: queries and keys |
//! | [`MovingAverage`] | mean extremes of the calls, the last ones weigh most | data that change slowly |
//! | [`Percentile`](ObserverKind::Percentile) | all but a given share | rare outliers |
//! | [`Mse`](ObserverKind::Mse) | where rounding and clipping together cost least | data that enter a sum: values, activations |
//!
//! All work on a stream, in memory that does not grow, and can be merged: what two observers saw
//! in two parts of a text is what one would have seen in both. NaN and infinity are passed over,
//! as they are where ranges are found in a call.
//!
//! ```
//! use candle_int8_attention::quant::{Observer, ObserverKind, Scheme};
//!
//! let mut observer = Observer::new(ObserverKind::MinMax)?;
//! observer.observe(&[0.5, -2.0, 1.0]);
//! observer.observe(&[3.0]);
//! let params = observer.params(Scheme::Symmetric)?;
//! assert_eq!(params.scale(), 3.0 / 127.0);
//! # Ok::<(), candle_int8_attention::Error>(())
//! ```

mod histogram;
mod kind;
mod moving_average;
mod mse;

pub use histogram::Histogram;
pub use kind::ObserverKind;
pub use moving_average::MovingAverage;

use super::{QuantParams, Scheme, ValueRange};
use crate::{Error, Result};

/// The extremes of all values, `[min(x), max(x)]`.
///
/// Source: textbook definition; `MinMaxObserver` of PyTorch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinMax {
    range: ValueRange,
}

impl Default for MinMax {
    fn default() -> Self {
        Self { range: ValueRange::EMPTY }
    }
}

impl MinMax {
    /// Takes more values into account.
    pub fn observe(&mut self, values: &[f32]) {
        self.range = self.range.union(ValueRange::of_finite(values));
    }

    /// Adds what another observer saw.
    pub fn merge(&mut self, other: &Self) {
        self.range = self.range.union(other.range);
    }

    /// The extremes; [`ValueRange::EMPTY`] if nothing was seen.
    pub fn range(&self) -> ValueRange {
        self.range
    }
}

/// An observer of any [`ObserverKind`].
#[derive(Debug, Clone, PartialEq)]
pub struct Observer {
    kind: ObserverKind,
    state: State,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    MinMax(MinMax),
    MovingAverage(MovingAverage),
    Histogram(Histogram),
}

impl Observer {
    /// An observer that has seen nothing.
    ///
    /// # Errors
    /// Those of [`ObserverKind::check`].
    pub fn new(kind: ObserverKind) -> Result<Self> {
        kind.check()?;
        let state = match kind {
            ObserverKind::MinMax => State::MinMax(MinMax::default()),
            ObserverKind::MovingAverage { weight } => {
                State::MovingAverage(MovingAverage::new(weight))
            }
            ObserverKind::Percentile { .. } | ObserverKind::Mse => {
                State::Histogram(Histogram::default())
            }
        };
        Ok(Self { kind, state })
    }

    /// How it chooses the range.
    pub fn kind(&self) -> ObserverKind {
        self.kind
    }

    /// Takes more values into account. For [`MovingAverage`] each call is one observation.
    pub fn observe(&mut self, values: &[f32]) {
        match &mut self.state {
            State::MinMax(state) => state.observe(values),
            State::MovingAverage(state) => state.observe(values),
            State::Histogram(state) => state.observe(values),
        }
    }

    /// Adds what another observer saw. The order matters for [`MovingAverage`] alone: `other` came
    /// after.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the kinds differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        match (&mut self.state, &other.state) {
            _ if self.kind != other.kind => Err(Error::Mismatch(format!(
                "observers of two kinds, {} and {}; expected one",
                self.kind, other.kind
            ))),
            (State::MinMax(state), State::MinMax(other)) => {
                state.merge(other);
                Ok(())
            }
            (State::MovingAverage(state), State::MovingAverage(other)) => state.merge(other),
            (State::Histogram(state), State::Histogram(other)) => {
                state.merge(other);
                Ok(())
            }
            _ => unreachable!("the kind decides the state"),
        }
    }

    /// The range that codes of this scheme should cover; [`ValueRange::EMPTY`] if nothing was seen.
    pub fn range(&self, scheme: Scheme) -> ValueRange {
        match (&self.state, self.kind) {
            (State::MinMax(state), _) => state.range(),
            (State::MovingAverage(state), _) => state.range(),
            (State::Histogram(state), ObserverKind::Percentile { percent }) => {
                state.percentile_range(scheme, percent)
            }
            (State::Histogram(state), _) => state.mse_range(scheme),
        }
    }

    /// Scale and zero point for [`Observer::range`].
    ///
    /// # Errors
    /// Those of [`QuantParams::from_range`].
    pub fn params(&self, scheme: Scheme) -> Result<QuantParams> {
        QuantParams::from_range(scheme, self.range(scheme))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const KINDS: [ObserverKind; 4] = [
        ObserverKind::MinMax,
        ObserverKind::MovingAverage { weight: 0.25 },
        ObserverKind::Percentile { percent: 99.0 },
        ObserverKind::Mse,
    ];

    fn after(kind: ObserverKind, calls: &[&[f32]]) -> Observer {
        let mut observer = Observer::new(kind).unwrap();
        calls.iter().for_each(|call| observer.observe(call));
        observer
    }

    fn waves(count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|i| size * (i as f32 * 0.37).sin() * (i as f32 * 0.011).cos()).collect()
    }

    #[test]
    fn parts_that_are_merged_are_one_stream() {
        let calls = [waves(500, 1.0), waves(300, 7.0), waves(400, 0.01), vec![], waves(1, 2.0)];
        let calls: Vec<&[f32]> = calls.iter().map(Vec::as_slice).collect();
        for kind in KINDS {
            let whole = after(kind, &calls);
            for cut in 0..=calls.len() {
                let mut parts = after(kind, &calls[..cut]);
                parts.merge(&after(kind, &calls[cut..])).unwrap();
                for scheme in [Scheme::Symmetric, Scheme::Affine] {
                    let (a, b) = (whole.range(scheme), parts.range(scheme));
                    let tolerance = match kind {
                        // Rounding of the mean, nothing else.
                        ObserverKind::MovingAverage { .. } => 1e-6 * a.max_abs(),
                        _ => 0.0,
                    };
                    assert!((a.min - b.min).abs() <= tolerance, "{kind} {cut}: {a:?} {b:?}");
                    assert!((a.max - b.max).abs() <= tolerance, "{kind} {cut}: {a:?} {b:?}");
                }
            }
        }
    }

    #[test]
    fn nothing_zeros_and_numbers_that_are_not_finite() {
        for kind in KINDS {
            for scheme in [Scheme::Symmetric, Scheme::Affine] {
                let range = |values: &[f32]| after(kind, &[values]).range(scheme);
                assert_eq!(range(&[]), ValueRange::EMPTY, "{kind}");
                assert_eq!(range(&[f32::NAN, f32::INFINITY]), ValueRange::EMPTY, "{kind}");
                assert_eq!(range(&[0.0, -0.0]).max_abs(), 0.0, "{kind}");
                assert_eq!(after(kind, &[&[0.0]]).params(scheme).unwrap().scale(), 1.0, "{kind}");
                let bad = range(&[f32::NAN, 1.0, -1.0, f32::NEG_INFINITY]);
                assert_eq!(bad, range(&[1.0, -1.0]), "{kind}");
                for extreme in [f32::MAX, f32::MIN_POSITIVE, f32::from_bits(1)] {
                    let range = range(&[extreme, -extreme]);
                    assert!(range.max <= extreme && range.max > 0.25 * extreme, "{kind} {range:?}");
                    assert!(range.min >= -extreme, "{kind} {range:?}");
                }
            }
        }
    }

    #[test]
    fn kinds_are_not_mixed() {
        let mut observer = after(KINDS[2], &[&[1.0]]);
        let error = observer.merge(&after(KINDS[3], &[&[1.0]])).unwrap_err().to_string();
        assert!(error.contains("percentile:99 and mse"), "{error}");
    }

    #[test]
    fn a_rare_outlier_widens_only_the_range_that_must_hold_it() {
        let mut values = waves(10_000, 1.0);
        values[777] = -50.0;
        let max_abs = |kind| after(kind, &[&values]).range(Scheme::Symmetric).max_abs();
        assert_eq!(max_abs(ObserverKind::MinMax), 50.0);
        assert!(max_abs(ObserverKind::Percentile { percent: 99.0 }) < 1.0);
        // Clipping it costs (50 - r)^2 once, covering it r^2 / (12 * 127^2) 10,000 times.
        assert!(max_abs(ObserverKind::Mse) > 40.0);
        let affine = after(ObserverKind::Percentile { percent: 99.0 }, &[&values]);
        let range = affine.range(Scheme::Affine);
        assert!(range.min > -1.0 && range.max < 1.0, "{range:?}");
    }
}
