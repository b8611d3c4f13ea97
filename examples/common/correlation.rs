//! Does a list of similarities agree with what people said?

use statrs::statistics::{Data, OrderStatistics, RankTieBreaker, Statistics};

/// Pearson's and Spearman's correlation with the gold scores, -1 to 1.
///
/// `None` where it is undefined: fewer than two values, or a column that is constant.
#[derive(Debug, Clone, Copy)]
pub struct Correlation {
    pub spearman: Option<f64>,
    pub pearson: Option<f64>,
}

impl Correlation {
    pub fn of(gold: &[f64], similarities: &[f64]) -> Self {
        Self { spearman: spearman(gold, similarities), pearson: pearson(gold, similarities) }
    }
}

/// Pearson's correlation of the ranks; values that are equal share the mean of their ranks.
fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    // `ranks` cannot order NaN.
    if x.iter().chain(y).any(|v| v.is_nan()) {
        return None;
    }
    let ranks = |values: &[f64]| Data::new(values.to_vec()).ranks(RankTieBreaker::Average);
    pearson(&ranks(x), &ranks(y))
}

/// Covariance over the product of the standard deviations.
fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    if is_constant(x) || is_constant(y) {
        return None;
    }
    let correlation = x.covariance(y) / (x.std_dev() * y.std_dev());
    correlation.is_finite().then_some(correlation)
}

/// Compared with each other, because a computed variance of equal values need not be exactly 0.
fn is_constant(values: &[f64]) -> bool {
    values.iter().all(|v| *v == values[0])
}
