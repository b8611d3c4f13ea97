//! The sets of numbers that are shown together.

use super::{ErrorSums, metrics};
use crate::Error;
use crate::drift::sums::nan_max;
use serde::{Deserialize, Serialize};

/// How far a candidate is from its reference; each field is the function of [`metrics`] that has
/// its name.
///
/// In JSON an infinite ratio (equal tensors) becomes `null`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Drift {
    /// [`metrics::cosine`]
    pub cosine: f64,
    /// [`metrics::relative_l1`]
    pub relative_l1: f64,
    /// [`metrics::rmse`]
    pub rmse: f64,
    /// [`metrics::max_abs`]
    pub max_abs: f64,
    /// [`metrics::sqnr_db`]
    #[serde(deserialize_with = "null_is_infinite")]
    pub sqnr_db: f64,
}

/// `serde_json` writes infinity as `null`; the ratio of equal tensors must survive a round trip.
fn null_is_infinite<'de, D: serde::Deserializer<'de>>(source: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(source)?.unwrap_or(f64::INFINITY))
}

impl Drift {
    /// All metrics of `candidate` against `reference`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the lengths differ.
    pub fn of_outputs(reference: &[f32], candidate: &[f32]) -> crate::Result<Self> {
        Ok(Self::from(&ErrorSums::of(reference, candidate)?))
    }
}

impl From<&ErrorSums> for Drift {
    fn from(sums: &ErrorSums) -> Self {
        Self {
            cosine: sums.cosine(),
            relative_l1: sums.relative_l1(),
            rmse: sums.rmse(),
            max_abs: sums.max_abs(),
            sqnr_db: sums.sqnr_db(),
        }
    }
}

/// How far rows of probabilities are from their reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ProbabilityDrift {
    /// Rows that were compared: those whose reference is not all zeros.
    pub rows: usize,
    /// Mean over rows of [`metrics::kl_divergence`], in nats.
    pub mean_kl: f64,
    /// The row with the largest [`metrics::kl_divergence`].
    pub max_kl: f64,
    /// Mean over rows of [`metrics::total_variation`].
    pub mean_total_variation: f64,
    /// Share of rows with [`metrics::same_top1`].
    pub top1_agreement: f64,
}

impl ProbabilityDrift {
    /// Compares row by row, `row_len` probabilities a row.
    ///
    /// A row whose reference is all zeros belongs to a query that may see no key (a fully masked
    /// row); it is left out. Without any row to compare, everything is 0 and the agreement 1.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the lengths differ, [`Error::InvalidArgument`] unless they are a multiple of
    /// `row_len`, and that is not 0.
    pub fn of_rows(reference: &[f32], candidate: &[f32], row_len: usize) -> crate::Result<Self> {
        let (found, expected) = (candidate.len(), reference.len());
        if found != expected {
            let problem = format!("{found} probabilities, expected {expected} as in the reference");
            return Err(Error::Mismatch(problem));
        }
        if row_len == 0 || !expected.is_multiple_of(row_len) {
            let problem =
                format!("{expected} probabilities in rows of {row_len}, expected whole rows");
            return Err(Error::InvalidArgument(problem));
        }
        let mut sum = Self {
            rows: 0,
            mean_kl: 0.0,
            max_kl: 0.0,
            mean_total_variation: 0.0,
            top1_agreement: 0.0,
        };
        for (p, q) in reference.chunks_exact(row_len).zip(candidate.chunks_exact(row_len)) {
            if p.iter().all(|&p| p == 0.0) {
                continue;
            }
            let kl = metrics::kl_divergence(p, q)?;
            sum.rows += 1;
            sum.mean_kl += kl;
            sum.max_kl = nan_max(sum.max_kl, kl);
            sum.mean_total_variation += metrics::total_variation(p, q)?;
            sum.top1_agreement += f64::from(u8::from(metrics::same_top1(p, q)?));
        }
        Ok(sum.divided_by_rows())
    }

    fn divided_by_rows(self) -> Self {
        if self.rows == 0 {
            return Self { top1_agreement: 1.0, ..self };
        }
        let rows = self.rows as f64;
        Self {
            mean_kl: self.mean_kl / rows,
            mean_total_variation: self.mean_total_variation / rows,
            top1_agreement: self.top1_agreement / rows,
            ..self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_carry_every_metric() {
        let drift = Drift::of_outputs(&[3.0, 4.0], &[3.0, 3.0]).unwrap();
        assert_eq!(drift.max_abs, 1.0);
        assert!((drift.relative_l1 - 1.0 / 7.0).abs() < 1e-15);
        assert!((drift.rmse - 0.5f64.sqrt()).abs() < 1e-15);
        assert!((drift.sqnr_db - 10.0 * 25f64.log10()).abs() < 1e-12);
        assert!((drift.cosine - 21.0 / (5.0 * 18f64.sqrt())).abs() < 1e-15);
    }

    #[test]
    fn equal_tensors_survive_json() {
        let drift = Drift::of_outputs(&[1.0], &[1.0]).unwrap();
        assert_eq!(drift.sqnr_db, f64::INFINITY);
        let json = serde_json::to_string(&drift).unwrap();
        assert!(json.contains("\"sqnr_db\":null"), "{json}");
        assert_eq!(serde_json::from_str::<Drift>(&json).unwrap(), drift);
    }

    #[test]
    fn rows_are_averaged_and_masked_rows_left_out() {
        let p = [0.5, 0.25, 0.125, 0.125, 0.0, 0.0, 0.0, 0.0, 0.75, 0.25, 0.0, 0.0];
        let q = [0.25, 0.25, 0.375, 0.125, 0.0, 0.0, 0.0, 0.0, 0.625, 0.25, 0.125, 0.0];
        let drift = ProbabilityDrift::of_rows(&p, &q, 4).unwrap();
        assert_eq!(drift.rows, 2);
        let (first, second) = (0.209_247_054_196_458_9, 0.136_741_167_595_465_95);
        assert!((drift.mean_kl - (first + second) / 2.0).abs() < 1e-12, "{drift:?}");
        assert!((drift.max_kl - first).abs() < 1e-12);
        assert!((drift.mean_total_variation - (0.25 + 0.125) / 2.0).abs() < 1e-15);
        assert_eq!(drift.top1_agreement, 0.5);
    }

    #[test]
    fn outputs_of_different_length_are_an_error() {
        let drift = Drift::of_outputs(&[1.0], &[]);
        assert!(matches!(drift, Err(Error::Mismatch(_))), "{drift:?}");
    }

    #[test]
    fn rows_that_do_not_fit_are_an_error() {
        let drift = ProbabilityDrift::of_rows(&[0.5; 4], &[0.5; 2], 2);
        assert!(matches!(drift, Err(Error::Mismatch(_))), "{drift:?}");
        for row_len in [0, 3, 5] {
            let drift = ProbabilityDrift::of_rows(&[0.5; 4], &[0.5; 4], row_len);
            assert!(matches!(drift, Err(Error::InvalidArgument(_))), "{drift:?}");
        }
    }

    #[test]
    fn nothing_to_compare_is_no_drift() {
        for rows in [&[][..], &[0.0; 8][..]] {
            let drift = ProbabilityDrift::of_rows(rows, rows, 4).unwrap();
            assert_eq!((drift.rows, drift.mean_kl, drift.top1_agreement), (0, 0.0, 1.0));
        }
    }

    #[test]
    fn nan_is_not_hidden() {
        let drift = Drift::of_outputs(&[1.0, 2.0, 3.0], &[1.0, f32::NAN, 3.0]).unwrap();
        for value in [drift.cosine, drift.relative_l1, drift.rmse, drift.max_abs, drift.sqnr_db] {
            assert!(value.is_nan(), "{drift:?}");
        }
        let drift = ProbabilityDrift::of_rows(&[0.5; 4], &[f32::NAN, 0.5, 0.5, 0.5], 2).unwrap();
        assert!(drift.mean_kl.is_nan() && drift.max_kl.is_nan());
        assert_eq!(drift.top1_agreement, 0.5);
    }
}
