//! Mean and percentiles of a stream of numbers.

use super::Summary;
use super::sums::LARGEST_COUNT;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use sketches_ddsketch::{Config, DDSketch};

/// A [`Summary`] with percentiles from a DDSketch (Masson et al. 2019, arXiv:1908.10693).
///
/// The sketch counts numbers in buckets whose bounds grow by a constant factor, so a percentile is
/// right to 1 % of its value. Merging adds counts, which are integers: the percentiles of merged
/// parts are exactly those of one run, which a t-digest does not promise. Memory is bounded by the
/// range of the numbers, not by how many there are.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct Distribution {
    summary: Summary,
    /// None before the first finite number (the bounds of an empty sketch are infinite, which JSON
    /// cannot hold).
    sketch: Option<Sketch>,
}

/// A distribution that was read. The two parts of a whole one count the same numbers.
#[derive(Deserialize)]
struct Unchecked {
    summary: Summary,
    sketch: Option<Sketch>,
}

impl TryFrom<Unchecked> for Distribution {
    type Error = String;

    fn try_from(Unchecked { summary, sketch }: Unchecked) -> Result<Self, String> {
        summary.check()?;
        let counted = sketch.as_ref().map_or(0, |Sketch(sketch)| sketch.count() as u64);
        match summary.finite() == counted {
            true => Ok(Self { summary, sketch }),
            false => Err(format!("percentiles of {counted} numbers, sums of {}", summary.finite())),
        }
    }
}

#[derive(Clone, Serialize)]
#[serde(transparent)]
struct Sketch(DDSketch);

impl<'de> Deserialize<'de> for Sketch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let outline = Outline::deserialize(&value).map_err(D::Error::custom)?;
        outline.check().map_err(D::Error::custom)?;
        Ok(Self(serde_json::from_value(value).map_err(D::Error::custom)?))
    }
}

/// What a sketch writes. Its own reader takes anything, and merging then reads beyond its buckets.
#[derive(Deserialize)]
struct Outline {
    config: Config,
    store: Buckets,
    negative_store: Buckets,
    min: f64,
    max: f64,
    zero_count: u64,
}

/// Counts of the keys from `offset` on; those outside of `min_key..=max_key` are 0.
#[derive(Deserialize)]
struct Buckets {
    bins: Vec<u64>,
    count: u64,
    min_key: i32,
    max_key: i32,
    offset: i32,
    bin_limit: usize,
}

/// Beyond the key of any f64: the logarithm of the largest, in steps of 2 %, is 35,500.
const LARGEST_KEY: i32 = 40_000;

impl Outline {
    fn check(&self) -> Result<(), String> {
        if self.config != Config::new(RELATIVE_ERROR, BUCKETS, SMALLEST) {
            return Err("percentiles of another precision".into());
        }
        if self.min > self.max || !self.min.is_finite() || !self.max.is_finite() {
            return Err(format!("percentiles from {} to {}", self.min, self.max));
        }
        let counts = [self.store.count, self.negative_store.count, self.zero_count];
        if counts.iter().any(|count| *count > LARGEST_COUNT) {
            return Err(format!("percentiles of {counts:?} numbers"));
        }
        self.store.check().and(self.negative_store.check())
    }
}

impl Buckets {
    fn check(&self) -> Result<(), String> {
        let Self { bins, count, min_key, max_key, offset, bin_limit } = self;
        let sum = bins.iter().try_fold(0u64, |sum, bin| sum.checked_add(*bin));
        if *bin_limit != BUCKETS as usize || bins.len() > *bin_limit || sum != Some(*count) {
            return Err(format!("{} buckets of {count} numbers", bins.len()));
        }
        if *count == 0 {
            // As they are made, without any bucket.
            return match (bins.len(), *min_key, *max_key, *offset) {
                (0, i32::MAX, i32::MIN, 0) => Ok(()),
                _ => Err("buckets without a number".into()),
            };
        }
        let keys = [min_key, max_key, offset];
        let in_range = keys.into_iter().all(|key| (-LARGEST_KEY..=LARGEST_KEY).contains(key));
        let of = |key: i32| {
            let place = usize::try_from(key.checked_sub(*offset)?).ok()?;
            (place < bins.len()).then_some(place)
        };
        let places = (of(*min_key), of(*max_key));
        match places {
            (Some(low), Some(high)) if in_range && low <= high => {
                let outside = bins[..low].iter().chain(&bins[high + 1..]);
                match outside.sum::<u64>() {
                    0 => Ok(()),
                    lost => Err(format!("{lost} numbers beyond the buckets")),
                }
            }
            _ => Err(format!("buckets from {min_key} to {max_key} at {offset}")),
        }
    }
}

impl std::fmt::Debug for Sketch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DDSketch of {} numbers", self.0.count())
    }
}

impl Default for Sketch {
    fn default() -> Self {
        Self(DDSketch::new(Config::new(RELATIVE_ERROR, BUCKETS, SMALLEST)))
    }
}

const RELATIVE_ERROR: f64 = 0.01;
/// Enough for 35 decimal orders of magnitude.
const BUCKETS: u32 = 4096;
/// Nearer to zero than this counts as zero.
const SMALLEST: f64 = 1e-15;

impl Distribution {
    /// Adds a number; as [`Summary::push`], what is not finite is counted apart.
    pub fn push(&mut self, x: f64) {
        self.summary.push(x);
        if x.is_finite() {
            self.sketch.get_or_insert_default().0.add(x);
        }
    }

    /// Adds what was gathered elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.summary.merge(&other.summary);
        if let Some(Sketch(theirs)) = &other.sketch {
            let Sketch(ours) = self.sketch.get_or_insert_default();
            // Every sketch of this type has the same configuration, the one thing that can differ;
            // of those that were read it is checked.
            ours.merge(theirs).expect("sketches of one configuration");
        }
    }

    /// Count, mean, standard error, smallest and largest.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// The number below which this share (0 to 1) of the finite numbers lies; 0 if there is none.
    pub fn quantile(&self, share: f64) -> f64 {
        let sketch = self.sketch.as_ref().map(|Sketch(sketch)| sketch);
        sketch.and_then(|s| s.quantile(share.clamp(0.0, 1.0)).ok().flatten()).unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> impl Iterator<Item = f64> {
        (1..=10_000).map(|i| f64::from(i * 7919 % 10_007) * 1e-6)
    }

    #[test]
    fn percentiles_are_right_to_one_percent() {
        let mut all = Distribution::default();
        numbers().for_each(|x| all.push(x));
        let mut sorted: Vec<f64> = numbers().collect();
        sorted.sort_by(f64::total_cmp);
        for share in [0.01, 0.5, 0.9, 0.99, 0.999] {
            let exact = sorted[(share * (sorted.len() - 1) as f64).round() as usize];
            let found = all.quantile(share);
            assert!((found / exact - 1.0).abs() < 0.0101, "{share}: {found}, expected {exact}");
        }
        assert_eq!(all.quantile(0.0), all.summary().min());
        assert_eq!(all.quantile(1.0), all.summary().max());
    }

    #[test]
    fn merged_parts_are_one_run_also_through_json() {
        let mut whole = Distribution::default();
        let mut parts = vec![Distribution::default(); 3];
        for (i, x) in numbers().enumerate() {
            whole.push(x);
            parts[i % 3].push(x);
        }
        let mut merged = Distribution::default();
        for part in parts.iter().rev() {
            let json = serde_json::to_string(part).unwrap();
            merged.merge(&serde_json::from_str(&json).unwrap());
        }
        for share in 0..=100 {
            let share = f64::from(share) / 100.0;
            assert_eq!(whole.quantile(share), merged.quantile(share));
        }
        let figures = |d: &Distribution| {
            let s = d.summary();
            (s.count(), s.mean(), s.standard_error(), s.min(), s.max())
        };
        assert_eq!(figures(&whole), figures(&merged));
    }

    #[test]
    fn nothing_and_infinity_have_percentiles_too() {
        let mut none = Distribution::default();
        assert_eq!(none.quantile(0.5), 0.0);
        none.push(f64::INFINITY);
        none.push(-1.0);
        assert!((none.quantile(0.5) + 1.0).abs() < 0.0101);
        let json = serde_json::to_string(&none).unwrap();
        let back: Distribution = serde_json::from_str(&json).unwrap();
        assert_eq!(back.summary(), none.summary());
    }
}
