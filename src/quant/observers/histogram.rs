//! Counts of values in bins of equal width, for a stream whose range nobody knows beforehand.

use crate::quant::{Scheme, ValueRange};

/// Bins on each side of zero.
pub(super) const SIDE: usize = 2048;
const BINS: i64 = SIDE as i64;

/// A histogram over `[-2^e, 2^e)` whose `e` grows with the data.
///
/// When a value lies outside, `e` grows and neighbouring bins become one. Because edges stay edges,
/// the counts are those that one pass with the last `e` would have given: they depend neither on
/// the order of the values nor on how they were split and merged. Percentiles and sums inside a
/// bin take its values as evenly spread; a bin is at most 1/1024 of the largest absolute value
/// wide, an eighth of a step of int8.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// `2 * SIDE` counts, lowest values first.
    counts: Vec<u64>,
    exponent: i32,
    extremes: ValueRange,
}

/// Small enough that the first value decides.
const SMALLEST_EXPONENT: i32 = -149;

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; 2 * SIDE], exponent: SMALLEST_EXPONENT, extremes: ValueRange::EMPTY }
    }
}

impl Histogram {
    /// Takes more values into account.
    pub fn observe(&mut self, values: &[f32]) {
        let range = ValueRange::of_finite(values);
        self.extremes = self.extremes.union(range);
        self.grow(exponent_for(range.max_abs()));
        let bins_a_unit = 1.0 / self.width();
        for x in values.iter().filter(|x| x.is_finite()) {
            let bin = (f64::from(*x) * bins_a_unit).floor() as i64;
            self.counts[(bin + BINS) as usize] += 1;
        }
    }

    /// Adds what another observer saw.
    pub fn merge(&mut self, other: &Self) {
        self.extremes = self.extremes.union(other.extremes);
        self.grow(other.exponent);
        let shift = (self.exponent - other.exponent).cast_unsigned();
        for (bin, count) in (-BINS..).zip(&other.counts) {
            self.counts[(shifted(bin, shift) + BINS) as usize] += count;
        }
    }

    /// The smallest and largest value; [`ValueRange::EMPTY`] if nothing was seen.
    pub fn extremes(&self) -> ValueRange {
        self.extremes
    }

    /// How many values were seen.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The range that covers `percent` of the values: symmetric, the smallest `[-r, r]`; affine,
    /// with half of the others below and half above.
    ///
    /// Source: Wu et al. 2020, arXiv:2004.09602, section 3.2 (percentile calibration).
    pub fn percentile_range(&self, scheme: Scheme, percent: f64) -> ValueRange {
        let share = percent / 100.0;
        let total = self.count() as f64;
        match scheme {
            _ if total == 0.0 => ValueRange::EMPTY,
            Scheme::Symmetric => {
                let above = self.above_zero().zip(self.below_zero());
                let top = self.distance_of(share * total, above.map(|(a, b)| a + b));
                self.symmetric(top)
            }
            Scheme::Affine => {
                let inside = (1.0 + share) / 2.0 * total;
                let below: u64 = self.below_zero().sum();
                let above = total - below as f64;
                // From zero outwards, on the side where the bound lies.
                let bound = |target: f64, near: f64, far: &mut dyn Iterator<Item = u64>| {
                    if target <= near { 0.0 } else { self.distance_of(target - near, far) }
                };
                let max = bound(inside, below as f64, &mut self.above_zero());
                let min = bound(inside, above, &mut self.below_zero());
                self.affine(min, max)
            }
        }
    }

    /// Width of a bin.
    pub(super) fn width(&self) -> f64 {
        2f64.powi(self.exponent) / SIDE as f64
    }

    /// Counts from zero upwards.
    pub(super) fn above_zero(&self) -> impl Iterator<Item = u64> {
        self.counts[SIDE..].iter().copied()
    }

    /// Counts from zero downwards.
    pub(super) fn below_zero(&self) -> impl Iterator<Item = u64> {
        self.counts[..SIDE].iter().rev().copied()
    }

    /// `[-bound, bound]`, not wider than what was seen (bins are).
    pub(super) fn symmetric(&self, bound: f64) -> ValueRange {
        let ValueRange { min, max } = self.extremes;
        let bound = (bound as f32).min(min.abs().max(max.abs()));
        ValueRange { min: -bound, max: bound }
    }

    /// From `below` under zero to `above` over it, not wider than what was seen on either side.
    pub(super) fn affine(&self, below: f64, above: f64) -> ValueRange {
        let ValueRange { min, max } = self.extremes;
        ValueRange { min: (-below as f32).max(min.min(0.0)), max: (above as f32).min(max.max(0.0)) }
    }

    /// How far from zero `target` values lie inside, of those counted in `outwards`.
    fn distance_of(&self, target: f64, outwards: impl Iterator<Item = u64>) -> f64 {
        let mut inside = 0.0;
        let mut distance = 0.0;
        for (bin, count) in outwards.enumerate() {
            let count = count as f64;
            if count > 0.0 && inside + count >= target {
                return (bin as f64 + (target - inside) / count) * self.width();
            }
            if count > 0.0 {
                distance = (bin + 1) as f64 * self.width();
            }
            inside += count;
        }
        distance
    }

    /// Makes room for values below `2^exponent`.
    fn grow(&mut self, exponent: i32) {
        if exponent <= self.exponent {
            return;
        }
        let shift = (exponent - self.exponent).cast_unsigned();
        let mut wider = vec![0; 2 * SIDE];
        for (bin, count) in (-BINS..).zip(&self.counts) {
            wider[(shifted(bin, shift) + BINS) as usize] += count;
        }
        self.counts = wider;
        self.exponent = exponent;
    }
}

/// The bin that bin `bin` becomes a part of when bins are `2^shift` times as wide.
fn shifted(bin: i64, shift: u32) -> i64 {
    bin >> shift.min(63)
}

/// The smallest `e` with `x < 2^e`.
fn exponent_for(x: f32) -> i32 {
    if x == 0.0 {
        return SMALLEST_EXPONENT;
    }
    // f64 holds every f32 as a normal number.
    let biased = (f64::from(x).to_bits() >> 52) & 0x7ff;
    biased as i32 - 1023 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f32]) -> Histogram {
        let mut histogram = Histogram::default();
        histogram.observe(values);
        histogram
    }

    #[test]
    fn exponents_are_just_large_enough() {
        for (x, exponent) in [(1.0, 1), (0.999, 0), (1.5, 1), (2.0, 2), (f32::MAX, 128)] {
            assert_eq!(exponent_for(x), exponent, "{x}");
        }
        assert_eq!(exponent_for(f32::from_bits(1)), -148);
        assert_eq!(exponent_for(0.0), SMALLEST_EXPONENT);
    }

    #[test]
    fn counts_do_not_depend_on_the_order() {
        let values = [1e-30, -1e-30, 0.3, -0.3, 7.0, -1000.0, 0.0, 1e-3];
        let whole = of(&values);
        let mut one_by_one = Histogram::default();
        values.iter().for_each(|&x| one_by_one.observe(&[x]));
        let mut backwards = Histogram::default();
        values.iter().rev().for_each(|&x| backwards.merge(&of(&[x])));
        assert_eq!(whole, one_by_one);
        assert_eq!(whole, backwards);
        assert_eq!(whole.count(), 8);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_values() {
        // 1, 2, .. 1000 and -1 .. -500.
        let values: Vec<f32> =
            (1..=1000).map(|i| i as f32).chain((1..=500).map(|i| -(i as f32))).collect();
        let histogram = of(&values);
        let bin = histogram.width() as f32;
        let close = |found: f32, expected: f32| (found - expected).abs() <= bin + 1.0;
        let symmetric = |percent| histogram.percentile_range(Scheme::Symmetric, percent);
        // 1,000 of the 1,500 absolute values are at most 500.
        assert!(close(symmetric(100.0 * 2.0 / 3.0).max, 500.0));
        assert!(close(symmetric(90.0).max, 850.0));
        assert_eq!(symmetric(100.0).max, 1000.0);
        let affine = |percent| histogram.percentile_range(Scheme::Affine, percent);
        // 5 % on either side: 75 values.
        assert!(close(affine(90.0).max, 925.0) && close(affine(90.0).min, -425.0));
        assert_eq!(affine(100.0), ValueRange { min: -500.0, max: 1000.0 });
    }

    #[test]
    fn one_sided_data_have_one_sided_ranges() {
        let positive: Vec<f32> = (0..1000).map(|i| 1.0 + i as f32 / 1000.0).collect();
        let range = of(&positive).percentile_range(Scheme::Affine, 98.0);
        assert_eq!(range.min, 0.0);
        assert!((range.max - 1.99).abs() < 0.002, "{range:?}");
        let negative: Vec<f32> = positive.iter().map(|x| -x).collect();
        let range = of(&negative).percentile_range(Scheme::Affine, 98.0);
        assert_eq!(range.max, 0.0);
        assert!((range.min + 1.99).abs() < 0.002, "{range:?}");
    }
}
