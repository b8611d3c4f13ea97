//! Orders and extremes that do not lose NaN: it is the worst of all, and must be seen.

use std::cmp::Ordering;

/// From low to high, where low is bad: NaN comes first.
pub fn ascending(a: f64, b: f64) -> Ordering {
    b.is_nan().cmp(&a.is_nan()).then(a.total_cmp(&b))
}

/// The largest of some values; NaN if one is NaN (`f64::max` would drop it), 0 if there is none.
pub fn largest(values: impl Iterator<Item = f64>) -> f64 {
    let higher = |a: f64, b: f64| if a.is_nan() || a >= b { a } else { b };
    values.reduce(higher).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_is_the_worst_wherever_it_stands() {
        for (values, expected) in
            [(&[][..], 0.0), (&[-2.0, -1.0], -1.0), (&[1.0, f64::INFINITY, 2.0], f64::INFINITY)]
        {
            assert_eq!(largest(values.iter().copied()), expected);
        }
        for values in [[f64::NAN, 1.0, 2.0], [1.0, -f64::NAN, 2.0], [1.0, 2.0, f64::NAN]] {
            assert!(largest(values.into_iter()).is_nan());
            let mut sorted = values;
            sorted.sort_by(|a, b| ascending(*a, *b));
            assert!(sorted[0].is_nan() && sorted[1..] == [1.0, 2.0], "{sorted:?}");
        }
    }
}
