//! The range with the smallest mean squared error.

use super::histogram::{Histogram, SIDE};
use crate::quant::{Scheme, ValueRange};

impl Histogram {
    /// The range `[min, max]`, containing 0, with the smallest error of rounding inside and
    /// clipping outside:
    ///
    /// ```text
    /// step^2 / 12 * |{x inside}|  +  sum over x outside of (x - nearest bound)^2
    /// step = r / 127 for [-r, r] (symmetric), (max - min) / 255 (affine)
    /// ```
    ///
    /// Symmetric, every edge of a bin is tried. Affine, the bounds are moved in turns, each to its
    /// best place while the other rests, until neither moves.
    ///
    /// Source: Nagel et al. 2021, arXiv:2106.08295, section 3.1 (MSE range setting); the two parts
    /// of the error: Banner et al. 2019, arXiv:1810.05723, section 4.
    pub fn mse_range(&self, scheme: Scheme) -> ValueRange {
        let total = self.count();
        if total == 0 {
            return ValueRange::EMPTY;
        }
        let width = self.width();
        match scheme {
            Scheme::Symmetric => {
                let both = self.above_zero().zip(self.below_zero()).map(|(a, b)| a + b);
                let tail = Tail::of(both, width);
                let error = |bins: usize| {
                    let inside = total as f64 - tail.count[bins];
                    rounding(bins as f64 * width / 127.0, inside) + tail.clipping(bins)
                };
                let best = best_bound(tail.occupied, error) as f64 * width;
                self.symmetric(best)
            }
            Scheme::Affine => {
                let (above, below) =
                    (Tail::of(self.above_zero(), width), Tail::of(self.below_zero(), width));
                let error = |low: usize, high: usize| {
                    let inside = total as f64 - below.count[low] - above.count[high];
                    rounding((low + high) as f64 * width / 255.0, inside)
                        + below.clipping(low)
                        + above.clipping(high)
                };
                let (mut low, mut high) = (below.occupied, above.occupied);
                loop {
                    let lower = best_bound(below.occupied, |low| error(low, high));
                    let upper = best_bound(above.occupied, |high| error(lower, high));
                    if error(lower, upper) >= error(low, high) {
                        break;
                    }
                    (low, high) = (lower, upper);
                }
                self.affine(low as f64 * width, high as f64 * width)
            }
        }
    }
}

/// The error of rounding `count` values to multiples of `step`.
fn rounding(step: f64, count: f64) -> f64 {
    step * step / 12.0 * count
}

/// The number of bins, from 0 to `occupied`, with the smallest error; the largest among equals.
fn best_bound(occupied: usize, error: impl Fn(usize) -> f64) -> usize {
    let better = |best: (usize, f64), bins| {
        let error = error(bins);
        if error < best.1 { (bins, error) } else { best }
    };
    (0..=occupied).rev().fold((occupied, f64::INFINITY), better).0
}

/// What lies beyond each bound on one side of zero: entry `i` for the bound behind `i` bins.
struct Tail {
    count: Vec<f64>,
    sum: Vec<f64>,
    squares: Vec<f64>,
    width: f64,
    /// Bins up to the last one with a value in it.
    occupied: usize,
}

impl Tail {
    /// `outwards`: the counts of one side, from zero on.
    fn of(outwards: impl Iterator<Item = u64>, width: f64) -> Self {
        let counts: Vec<u64> = outwards.collect();
        let zeros = vec![0.0; SIDE + 1];
        let occupied = counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1);
        let mut tail =
            Self { count: zeros.clone(), sum: zeros.clone(), squares: zeros, width, occupied };
        for bin in (0..SIDE).rev() {
            let count = counts[bin] as f64;
            let middle = (bin as f64 + 0.5) * width;
            // Values spread evenly over the bin have this mean square.
            let square = middle * middle + width * width / 12.0;
            tail.count[bin] = tail.count[bin + 1] + count;
            tail.sum[bin] = tail.sum[bin + 1] + count * middle;
            tail.squares[bin] = tail.squares[bin + 1] + count * square;
        }
        tail
    }

    /// `sum of (x - r)^2` over the values beyond `r`, the edge behind `bins` bins.
    fn clipping(&self, bins: usize) -> f64 {
        let r = bins as f64 * self.width;
        (self.squares[bins] - 2.0 * r * self.sum[bins] + r * r * self.count[bins]).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::QuantParams;
    use statrs::distribution::{ContinuousCDF, Normal};

    /// The quantiles of the normal distribution.
    fn normal(count: usize) -> Vec<f32> {
        let normal = Normal::standard();
        let quantile = |i| normal.inverse_cdf((f64::from(i) + 0.5) / count as f64) as f32;
        (0..count as u32).map(quantile).collect()
    }

    fn error(values: &[f32], scheme: Scheme, range: ValueRange) -> f64 {
        let params = QuantParams::from_range(scheme, range).unwrap();
        let square = |&x: &f32| f64::from(x - params.dequantize(params.quantize(x))).powi(2);
        values.iter().map(square).sum()
    }

    #[test]
    fn no_other_range_has_a_smaller_error_of_real_quantization() {
        let mut skewed = normal(20_000);
        skewed.iter_mut().for_each(|x| *x = if *x > 0.0 { 3.0 * *x * *x } else { *x });
        for values in [normal(20_000), skewed] {
            let mut histogram = Histogram::default();
            histogram.observe(&values);
            for scheme in [Scheme::Symmetric, Scheme::Affine] {
                let best = histogram.mse_range(scheme);
                let least = error(&values, scheme, best);
                let extremes = histogram.extremes();
                assert!(least < error(&values, scheme, extremes), "{scheme} {best:?}");
                for (low, high) in [(0.9, 0.9), (1.1, 1.1), (0.9, 1.0), (1.0, 0.9), (1.0, 1.1)] {
                    let other = ValueRange { min: low * best.min, max: high * best.max };
                    // The formula takes the error of rounding as evenly spread.
                    let found = error(&values, scheme, other);
                    assert!(found > 0.99 * least, "{scheme} {other:?}: {found} < {least}");
                }
            }
        }
    }

    #[test]
    fn the_bound_for_normal_numbers_is_that_of_their_density() {
        // Where the error of the formula, integrated over the normal density, is smallest.
        let mut histogram = Histogram::default();
        histogram.observe(&normal(400_000));
        let best = histogram.mse_range(Scheme::Symmetric).max;
        assert!((best - 3.921).abs() < 0.03, "{best}");
    }
}
