//! The choice of an observer.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How a range is chosen from the values that were seen.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum ObserverKind {
    /// Everything that was seen: [`MinMax`](super::MinMax).
    #[default]
    MinMax,
    /// The mean extremes of the calls, of which the last weigh most:
    /// [`MovingAverage`](super::MovingAverage).
    MovingAverage {
        /// Of the newest call, above 0 and at most 1.
        weight: f64,
    },
    /// All but a share of the values:
    /// [`Histogram::percentile_range`](super::Histogram::percentile_range).
    Percentile {
        /// Of the values that are covered, above 0 and at most 100.
        percent: f64,
    },
    /// The smallest mean squared error of rounding and clipping:
    /// [`Histogram::mse_range`](super::Histogram::mse_range).
    Mse,
}

impl ObserverKind {
    /// PyTorch's default for the weight of a moving average.
    pub const MOVING_AVERAGE: ObserverKind = ObserverKind::MovingAverage { weight: 0.01 };
    /// All but one value of 10,000.
    pub const PERCENTILE: ObserverKind = ObserverKind::Percentile { percent: 99.99 };

    /// # Errors
    /// [`Error::InvalidArgument`] for a weight or percentage outside of its range.
    pub fn check(self) -> Result<()> {
        let wrong = |what, x, top| {
            Err(Error::InvalidArgument(format!("{what} {x}, expected above 0 and at most {top}")))
        };
        match self {
            ObserverKind::MovingAverage { weight } if !(weight > 0.0 && weight <= 1.0) => {
                wrong("weight of the moving average", weight, 1)
            }
            ObserverKind::Percentile { percent } if !(percent > 0.0 && percent <= 100.0) => {
                wrong("percentile", percent, 100)
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for ObserverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObserverKind::MinMax => f.write_str("min-max"),
            ObserverKind::MovingAverage { weight } => write!(f, "moving-average:{weight}"),
            ObserverKind::Percentile { percent } => write!(f, "percentile:{percent}"),
            ObserverKind::Mse => f.write_str("mse"),
        }
    }
}

impl FromStr for ObserverKind {
    type Err = Error;

    /// `min-max`, `moving-average[:WEIGHT]`, `percentile[:PERCENT]` or `mse`.
    fn from_str(text: &str) -> Result<Self> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number.parse::<f64>().ok())),
            None => (text, None),
        };
        let kind = match (name, number) {
            ("min-max", None) => ObserverKind::MinMax,
            ("mse", None) => ObserverKind::Mse,
            ("moving-average", None) => ObserverKind::MOVING_AVERAGE,
            ("moving-average", Some(Some(weight))) => ObserverKind::MovingAverage { weight },
            ("percentile", None) => ObserverKind::PERCENTILE,
            ("percentile", Some(Some(percent))) => ObserverKind::Percentile { percent },
            _ => {
                return Err(Error::InvalidArgument(format!(
                    "observer {text:?}, expected min-max, moving-average[:WEIGHT], \
                     percentile[:PERCENT] or mse"
                )));
            }
        };
        kind.check()?;
        Ok(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for kind in super::super::tests::KINDS {
            assert_eq!(kind.to_string().parse::<ObserverKind>().unwrap(), kind);
            let json = serde_json::to_string(&kind).unwrap();
            assert_eq!(serde_json::from_str::<ObserverKind>(&json).unwrap(), kind);
        }
        assert_eq!("percentile".parse::<ObserverKind>().unwrap(), ObserverKind::PERCENTILE);
    }

    #[test]
    fn other_names_and_numbers_are_errors() {
        for text in ["", "minmax", "mse:1", "percentile:", "percentile:x", "min-max:2"] {
            let error = text.parse::<ObserverKind>().unwrap_err().to_string();
            assert!(error.contains("expected min-max"), "{error}");
        }
        for text in ["percentile:0", "percentile:101", "percentile:nan", "moving-average:0"] {
            let error = text.parse::<ObserverKind>().unwrap_err().to_string();
            assert!(error.contains("above 0 and at most"), "{error}");
        }
    }
}
