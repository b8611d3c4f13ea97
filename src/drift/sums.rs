//! Sums that go on: over any amount of data in constant memory, in parts that are merged later.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A sum held as two f64 (about 32 digits), so that the order of its terms does not show.
///
/// Terms are added with Knuth's error-free two-sum (Knuth, The Art of Computer Programming 2,
/// 4.2.2; Dekker 1971). The result of merged parts, rounded to f64, is that of one run: the
/// reordering changes it by less than `2^-100` of the sum of absolute values, so the two can differ
/// by the last bit only where the exact sum lies that close to the middle of two f64.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sum {
    high: f64,
    low: f64,
}

/// `a + b` and the rounding error of that sum, exactly.
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_part = sum - a;
    (sum, (a - (sum - b_part)) + (b - b_part))
}

/// `a * b` and its rounding error, exactly.
fn two_product(a: f64, b: f64) -> (f64, f64) {
    let product = a * b;
    (product, a.mul_add(b, -product))
}

impl Sum {
    /// Adds a term. NaN and infinity stay: every later value is NaN or infinite too.
    pub fn add(&mut self, term: f64) {
        *self = self.plus(Sum { high: term, low: 0.0 });
    }

    /// The square of a number, with its rounding error.
    pub fn of_square(x: f64) -> Self {
        let (high, low) = two_product(x, x);
        Self::normal(high, low)
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &Sum) {
        *self = self.plus(*other);
    }

    /// The sum, rounded to f64.
    pub fn value(self) -> f64 {
        self.high + self.low
    }

    /// `self + other`, the accurate variant of double-double addition.
    fn plus(self, other: Sum) -> Sum {
        let (high, high_error) = two_sum(self.high, other.high);
        if !high.is_finite() {
            return Sum { high, low: 0.0 };
        }
        let (low, low_error) = two_sum(self.low, other.low);
        let first = Self::normal(high, high_error + low);
        Self::normal(first.high, first.low + low_error)
    }

    fn normal(high: f64, low: f64) -> Sum {
        if !high.is_finite() {
            return Sum { high, low: 0.0 };
        }
        let (high, low) = two_sum(high, low);
        Sum { high, low }
    }

    /// `self - x^2 / count` of the sum `x`, without losing digits to the subtraction.
    fn minus_square_over(self, x: Sum, count: f64) -> f64 {
        let (square, square_error) = two_product(x.high, x.high);
        let square_error = square_error + 2.0 * x.high * x.low;
        let quotient = square / count;
        let rest = (-quotient).mul_add(count, square) + square_error;
        self.plus(Sum { high: -quotient, low: -rest / count }).value()
    }
}

/// As `[high, low]`; what is not finite as one string.
impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.high.is_finite() {
            true => (self.high, self.low).serialize(serializer),
            false => extended::serialize(&self.high, serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Finite(f64, f64),
            Other(#[serde(with = "extended")] f64),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Finite(high, low) => Sum { high, low },
            Form::Other(high) => Sum { high, low: 0.0 },
        })
    }
}

/// The largest count that is read from a file: up to it counts are exact in f64, and sums of counts
/// do not overflow.
#[cfg_attr(not(feature = "drift"), allow(dead_code))]
pub(super) const LARGEST_COUNT: u64 = 1 << 53;

/// f64 in JSON, with NaN and the infinities as strings; JSON has no numbers for them.
pub(super) mod extended {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub fn serialize<S: Serializer>(x: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        match x.is_finite() {
            true => x.serialize(serializer),
            false => serializer.collect_str(x),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(f64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(x) => Ok(x),
            Form::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

/// # Errors
/// [`Error::Mismatch`](crate::Error::Mismatch) if slices to compare differ in length.
pub(super) fn same_len(reference: &[f32], candidate: &[f32]) -> crate::Result<()> {
    let (found, expected) = (candidate.len(), reference.len());
    if found != expected {
        return Err(crate::Error::Mismatch(format!(
            "{found} numbers to compare, expected {expected} as in the reference"
        )));
    }
    Ok(())
}

/// Everything that the metrics of a candidate `b` against its reference `a` need, over any amount
/// of data: push slices as they come, merge what others have gathered.
///
/// ```
/// use candle_int8_attention::drift::ErrorSums;
///
/// let mut all = ErrorSums::default();
/// all.push(&[3.0, 4.0], &[3.0, 3.0])?;
/// all.merge(&ErrorSums::of(&[0.0], &[0.0])?);
/// assert_eq!(all.count(), 3);
/// assert_eq!(all.max_abs(), 1.0);
/// assert!((all.sqnr_db() - 10.0 * 25f64.log10()).abs() < 1e-12);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ErrorSums {
    count: u64,
    dot: Sum,
    reference_squares: Sum,
    candidate_squares: Sum,
    error_squares: Sum,
    reference_abs: Sum,
    error_abs: Sum,
    #[serde(with = "extended")]
    max_abs: f64,
}

impl ErrorSums {
    /// The sums of one pair of slices.
    ///
    /// # Errors
    /// Those of [`ErrorSums::push`].
    pub fn of(reference: &[f32], candidate: &[f32]) -> crate::Result<Self> {
        let mut sums = Self::default();
        sums.push(reference, candidate)?;
        Ok(sums)
    }

    /// Adds a pair of slices. They are summed in f64, and the sums of all slices with 32 digits.
    ///
    /// # Errors
    /// [`Error::Mismatch`](crate::Error::Mismatch) if they differ in length; nothing is added then.
    pub fn push(&mut self, reference: &[f32], candidate: &[f32]) -> crate::Result<()> {
        same_len(reference, candidate)?;
        self.push_pairs(reference.iter().copied().zip(candidate.iter().copied()));
        Ok(())
    }

    /// [`ErrorSums::push`] for pairs from anywhere.
    pub fn push_pairs(&mut self, pairs: impl IntoIterator<Item = (f32, f32)>) {
        let (mut count, mut max_abs) = (0u64, 0f64);
        let [mut dot, mut aa, mut bb, mut dd, mut a1, mut d1] = [0f64; 6];
        for (a, b) in pairs {
            let (a, b) = (f64::from(a), f64::from(b));
            let difference = a - b;
            count += 1;
            dot += a * b;
            aa += a * a;
            bb += b * b;
            dd += difference * difference;
            a1 += a.abs();
            d1 += difference.abs();
            max_abs = nan_max(max_abs, difference.abs());
        }
        self.count += count;
        self.dot.add(dot);
        self.reference_squares.add(aa);
        self.candidate_squares.add(bb);
        self.error_squares.add(dd);
        self.reference_abs.add(a1);
        self.error_abs.add(d1);
        self.max_abs = nan_max(self.max_abs, max_abs);
    }

    /// Adds what was gathered elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.dot.merge(&other.dot);
        self.reference_squares.merge(&other.reference_squares);
        self.candidate_squares.merge(&other.candidate_squares);
        self.error_squares.merge(&other.error_squares);
        self.reference_abs.merge(&other.reference_abs);
        self.error_abs.merge(&other.error_abs);
        self.max_abs = nan_max(self.max_abs, other.max_abs);
    }

    /// Refuses what no data add up to: for what was read from a file. NaN is what NaN adds up to.
    #[cfg_attr(not(feature = "drift"), allow(dead_code))]
    pub(super) fn check(&self) -> Result<(), String> {
        let squares = [self.reference_squares, self.candidate_squares, self.error_squares];
        let sizes = squares.into_iter().chain([self.reference_abs, self.error_abs]);
        let sizes = sizes.map(Sum::value).chain([self.max_abs]);
        match sizes.into_iter().find(|size| *size < 0.0) {
            _ if self.count > LARGEST_COUNT => Err(format!("sums of {} elements", self.count)),
            Some(size) => Err(format!("a sum of squares or sizes of {size}")),
            None => Ok(()),
        }
    }

    /// How many elements were compared.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// [`metrics::cosine`](super::metrics::cosine).
    pub fn cosine(&self) -> f64 {
        let dot = self.dot.value();
        let (aa, bb) = (self.reference_squares.value(), self.candidate_squares.value());
        match (aa == 0.0, bb == 0.0) {
            (true, true) => 1.0,
            (true, false) | (false, true) if !dot.is_nan() => 0.0,
            _ => dot / (aa.sqrt() * bb.sqrt()),
        }
    }

    /// [`metrics::relative_l1`](super::metrics::relative_l1).
    pub fn relative_l1(&self) -> f64 {
        let error = self.error_abs.value();
        if error == 0.0 { 0.0 } else { error / self.reference_abs.value() }
    }

    /// [`metrics::rmse`](super::metrics::rmse).
    pub fn rmse(&self) -> f64 {
        match self.count {
            0 => 0.0,
            count => (self.error_squares.value() / count as f64).sqrt(),
        }
    }

    /// [`metrics::max_abs`](super::metrics::max_abs).
    pub fn max_abs(&self) -> f64 {
        self.max_abs
    }

    /// [`metrics::sqnr_db`](super::metrics::sqnr_db).
    pub fn sqnr_db(&self) -> f64 {
        let (signal, noise) = (self.reference_squares.value(), self.error_squares.value());
        if noise == 0.0 { f64::INFINITY } else { 10.0 * (signal / noise).log10() }
    }

    /// `sum((a - b)^2)`, the energy of the error.
    pub fn error_energy(&self) -> f64 {
        self.error_squares.value()
    }
}

/// Mean with its standard error, smallest and largest of a stream of numbers.
///
/// An infinite value (the signal-to-noise ratio of equal data) has no place in a mean: it is
/// counted apart, and the mean is over the others. NaN makes everything NaN.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    count: u64,
    infinite: u64,
    nan: u64,
    sum: Sum,
    squares: Sum,
    #[serde(with = "extended")]
    min: f64,
    #[serde(with = "extended")]
    max: f64,
}

impl Default for Summary {
    fn default() -> Self {
        let (sum, squares) = (Sum::default(), Sum::default());
        let (min, max) = (f64::INFINITY, f64::NEG_INFINITY);
        Self { count: 0, infinite: 0, nan: 0, sum, squares, min, max }
    }
}

impl Summary {
    /// Refuses what no numbers add up to: for what was read from a file.
    #[cfg_attr(not(feature = "drift"), allow(dead_code))]
    pub(super) fn check(&self) -> Result<(), String> {
        let counts = [self.count, self.infinite, self.nan];
        if counts.iter().any(|count| *count > LARGEST_COUNT) {
            return Err(format!("a summary of {counts:?} numbers"));
        }
        let (min, max) = (self.min, self.max);
        let none = self.count + self.infinite == 0;
        let in_order = if none { min > max } else { min <= max };
        if !in_order || self.sum.value().is_nan() && self.count == 0 {
            return Err(format!("a summary of {counts:?} numbers from {min} to {max}"));
        }
        // Rounding of sums that lose much of their size.
        let room = 1e-9 * (min.abs() + max.abs());
        let mean = self.sum.value() / self.count.max(1) as f64;
        let outside = self.count > 0 && (mean < min - room || mean > max + room);
        match outside || (self.count == 0 && self.sum != Sum::default()) {
            true => Err(format!("a summary with the mean {mean} of numbers from {min} to {max}")),
            false => Ok(()),
        }
    }

    /// How many finite numbers were pushed.
    #[cfg_attr(not(feature = "drift"), allow(dead_code))]
    pub(super) fn finite(&self) -> u64 {
        self.count
    }

    /// Adds a number.
    pub fn push(&mut self, x: f64) {
        if x.is_nan() {
            self.nan += 1;
            return;
        }
        self.min = self.min.min(x);
        self.max = self.max.max(x);
        if x.is_infinite() {
            self.infinite += 1;
            return;
        }
        self.count += 1;
        self.sum.add(x);
        self.squares.merge(&Sum::of_square(x));
    }

    /// Adds what was gathered elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.infinite += other.infinite;
        self.nan += other.nan;
        self.sum.merge(&other.sum);
        self.squares.merge(&other.squares);
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    /// How many numbers were pushed, of whatever kind.
    pub fn count(&self) -> u64 {
        self.count + self.infinite + self.nan
    }

    /// How many of them were infinite.
    pub fn infinite(&self) -> u64 {
        self.infinite
    }

    /// The mean of the finite numbers; infinite if all are, 0 if there is none at all.
    pub fn mean(&self) -> f64 {
        match (self.nan, self.count, self.infinite) {
            (1.., _, _) => f64::NAN,
            (0, 0, 0) => 0.0,
            (0, 0, _) => self.max,
            (0, count, _) => self.sum.value() / count as f64,
        }
    }

    /// Standard error of the mean, `sqrt(sum((x - mean)^2) / (n - 1) / n)`; 0 below two numbers.
    ///
    /// The spread of numbers that differ by less than 1e-12 of their size is lost in the 32 digits
    /// of their squares: push their difference from a constant instead.
    pub fn standard_error(&self) -> f64 {
        match (self.nan, self.count) {
            (1.., _) => f64::NAN,
            (0, 0 | 1) => 0.0,
            (0, count) => {
                let n = count as f64;
                let squares = self.squares.minus_square_over(self.sum, n).max(0.0);
                (squares / (n - 1.0) / n).sqrt()
            }
        }
    }

    /// The smallest number; 0 if there is none.
    pub fn min(&self) -> f64 {
        self.extreme(self.min)
    }

    /// The largest number; 0 if there is none.
    pub fn max(&self) -> f64 {
        self.extreme(self.max)
    }

    fn extreme(&self, found: f64) -> f64 {
        match (self.nan, self.count + self.infinite) {
            (1.., _) => f64::NAN,
            (0, 0) => 0.0,
            _ => found,
        }
    }
}

/// `max(x, y)`, but NaN wins (`f64::max` would drop it).
pub(super) fn nan_max(x: f64, y: f64) -> f64 {
    if x.is_nan() || y.is_nan() { f64::NAN } else { x.max(y) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Terms whose f64 sum depends on their order.
    fn terms() -> Vec<f64> {
        (0..1000).map(|i| f64::from(i * 7919 % 1000 - 500).powi(5) * 1e-3 + 0.1).collect()
    }

    #[test]
    fn the_order_of_the_terms_does_not_show() {
        let forward = terms();
        let mut backward = forward.clone();
        backward.reverse();
        let naive = |terms: &[f64]| terms.iter().sum::<f64>();
        assert_ne!(naive(&forward), naive(&backward), "the test's data must be hard enough");
        let sum = |terms: &[f64]| {
            let mut all = Sum::default();
            for part in terms.chunks(7) {
                let mut partial = Sum::default();
                part.iter().for_each(|&x| partial.add(x));
                all.merge(&partial);
            }
            all.value()
        };
        assert_eq!(sum(&forward), sum(&backward));
    }

    #[test]
    fn the_standard_error_survives_a_large_mean() {
        let mut summary = Summary::default();
        [1e9 + 1.0, 1e9 + 2.0, 1e9 + 3.0, 1e9 + 4.0].into_iter().for_each(|x| summary.push(x));
        // Variance 5/3 of four numbers.
        assert!((summary.standard_error() - (5.0f64 / 12.0).sqrt()).abs() < 1e-15);
        assert_eq!((summary.min(), summary.max()), (1e9 + 1.0, 1e9 + 4.0));
    }

    #[test]
    fn infinite_values_are_counted_apart_and_nan_is_not_hidden() {
        let mut summary = Summary::default();
        [40.0, f64::INFINITY, 50.0].into_iter().for_each(|x| summary.push(x));
        assert_eq!((summary.mean(), summary.count(), summary.infinite()), (45.0, 3, 1));
        assert_eq!(summary.max(), f64::INFINITY);
        summary.push(f64::NAN);
        for value in [summary.mean(), summary.standard_error(), summary.min(), summary.max()] {
            assert!(value.is_nan());
        }
        let empty = Summary::default();
        assert_eq!((empty.mean(), empty.standard_error(), empty.min()), (0.0, 0.0, 0.0));
    }

    #[test]
    fn sums_survive_json_whatever_they_hold() {
        for term in [0.1, f64::NAN, f64::INFINITY] {
            let mut sum = Sum::default();
            sum.add(1e20);
            sum.add(term);
            let json = serde_json::to_string(&sum).unwrap();
            let back: Sum = serde_json::from_str(&json).unwrap();
            assert_eq!(back.high.to_bits(), sum.high.to_bits(), "{json}");
            assert_eq!(back.low.to_bits(), sum.low.to_bits(), "{json}");
        }
        let empty = serde_json::to_string(&Summary::default()).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&empty).unwrap(), Summary::default());
    }
}
