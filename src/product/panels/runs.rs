//! Integer values: one scale a channel and run of [`RUN`] rows.
//!
//! ```text
//! value = scale[run, channel] * code        |code| <= 8191 in int16, 127 in int8
//! ```
//!
//! A scale that belongs to a run alone makes a large value coarsen its own run only, and codes of a run do
//! not depend on other rows. Within a run, a row that is far larger than the others is an outlier: it would
//! leave them few codes, so it is kept beside, as rows are that are not finite.

use crate::cpu::contracts::{Format, INT16_MATRIX, LANES, RUN};
use crate::cpu::plain::lanes::{each_lane, fold_lanes, lanes};
use crate::cpu::plain::widest;
use crate::memory::footprint;

/// Outliers of a run, at most.
const OUTLIERS: usize = 4;

/// What codes stand for. Padded with zeros to whole vectors.
pub(super) struct RunScales {
    /// The largest code.
    most: f32,
    /// An outlier is larger than the largest row that is none by more than this. Those that are not cost the
    /// others four bits of their thirteen at most, and two of seven in int8; they are more work beside the
    /// product than they are worth.
    far: f32,
    width: usize,
    /// `[runs, width]`.
    scales: Vec<f32>,
    /// `1 / scale` of the run that was observed last.
    inverses: Vec<f32>,
}

footprint!(RunScales: scales, inverses);

impl RunScales {
    /// Of no rows yet; `None` for a format that has no scales.
    pub(super) fn new(format: Format) -> Option<Self> {
        let (most, far) = match format {
            Format::Int8 => (f32::from(i8::MAX), 4.0),
            Format::Int16 => (f32::from(INT16_MATRIX), 16.0),
            Format::F32 | Format::Bf16 => return None,
        };
        Some(Self { most, far, width: 0, scales: Vec::new(), inverses: Vec::new() })
    }

    /// Room for others.
    pub(super) fn reset(&mut self, depth: usize, columns: usize) {
        self.width = columns.next_multiple_of(LANES);
        self.scales.clear();
        self.scales.resize(depth.div_ceil(RUN) * self.width, 0.0);
        self.inverses.clear();
        self.inverses.resize(self.width, 0.0);
    }

    /// Finds the scales of a run from its row-major rows, which are finite; returns the largest magnitude.
    pub(super) fn observe(&mut self, run: usize, rows: &[f32], columns: usize) -> f32 {
        let scales = &mut self.scales[run * self.width..][..self.width];
        let job = Observe { rows, columns, most: self.most, scales, inverses: &mut self.inverses };
        widest!(observe, job, Observe<'_> => f32)
    }

    /// The outliers among up to [`RUN`] finite rows of `columns`, in no order; `most` is the largest magnitude.
    pub(super) fn outliers(&self, rows: &[f32], columns: usize, most: f32) -> Vec<usize> {
        outliers(rows, columns, most, self.far)
    }

    /// Of the run that was observed last.
    pub(super) fn inverses(&self) -> &[f32] {
        &self.inverses
    }

    /// All scales from a run and column on.
    pub(super) fn from(&self, run: usize, column: usize) -> &[f32] {
        &self.scales[run * self.width + column..]
    }

    /// Elements from one run to the next.
    pub(super) fn stride(&self) -> usize {
        self.width
    }
}

struct Observe<'a> {
    rows: &'a [f32],
    columns: usize,
    most: f32,
    scales: &'a mut [f32],
    inverses: &'a mut [f32],
}

#[inline(always)]
fn observe(job: Observe<'_>) -> f32 {
    let mut largest_of_all = [0f32; LANES];
    let outs = job.scales.chunks_exact_mut(LANES).zip(job.inverses.chunks_exact_mut(LANES));
    for (i, (scales, inverses)) in outs.enumerate() {
        let known = i * LANES..job.columns.min((i + 1) * LANES);
        let mut largest = [0f32; LANES];
        for row in job.rows.chunks_exact(job.columns) {
            let x = lanes(&row[known.clone()], 0);
            largest = each_lane(|c| if x[c].abs() > largest[c] { x[c].abs() } else { largest[c] });
        }
        largest_of_all = each_lane(|c| largest_of_all[c].max(largest[c]));
        // Neither a scale nor its inverse may be 0, subnormal or infinite.
        let scale = each_lane(|c| (largest[c] / job.most).max(f32::MIN_POSITIVE));
        scales.copy_from_slice(&scale);
        inverses.copy_from_slice(&each_lane(|c| 1.0 / scale[c]));
    }
    fold_lanes(largest_of_all, f32::max)
}

/// The code of a value of a run, in the lowest bits; to nearest, ties to even. Of the largest value that was
/// observed it is the largest code.
#[inline(always)]
pub(super) fn code(x: f32, inverse: f32) -> u32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: the integer is in the low bits of the sum.
    (x * inverse + ROUND).to_bits()
}

fn outliers(rows: &[f32], columns: usize, most: f32, far: f32) -> Vec<usize> {
    // Rows that are no outliers are smaller than the largest of all by as much. Mostly five that are not are
    // the first five.
    let is_near = |row: &&[f32]| row.iter().fold(false, |near, x| near | (x.abs() * far >= most));
    if rows.chunks_exact(columns).filter(is_near).take(OUTLIERS + 1).count() > OUTLIERS {
        return Vec::new();
    }
    let mut sizes = [0f32; RUN];
    widest!(largest_of_rows, (rows, columns, &mut sizes), (&[f32], usize, &mut [f32; RUN]) => ());
    let mut found = Vec::new();
    let mut count = 0;
    let mut before = f32::INFINITY;
    for taken in 0..=OUTLIERS {
        let (at, size) = largest(&sizes);
        if size == 0.0 {
            break;
        }
        if taken > 0 && before > far * size {
            count = taken;
        }
        found.push(at);
        (before, sizes[at]) = (size, 0.0);
    }
    found.truncate(count);
    found
}

#[inline(always)]
fn largest_of_rows((rows, columns, sizes): (&[f32], usize, &mut [f32; RUN])) {
    for (size, row) in sizes.iter_mut().zip(rows.chunks_exact(columns)) {
        *size = crate::cpu::plain::rows::max_magnitude(row).0;
    }
}

fn largest(sizes: &[f32; RUN]) -> (usize, f32) {
    let largest = sizes.iter().fold(0f32, |a, &b| if b > a { b } else { a });
    (sizes.iter().position(|&size| size == largest).unwrap_or(0), largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_to_nearest() {
        let xs = [0.5, 1.5, -0.5, -2.5, 126.6, 8190.6, -8191.2];
        assert_eq!(xs.map(|x| code(x, 1.0) as i16), [0, 2, 0, -2, 127, 8191, -8191]);
    }

    #[test]
    fn scales_of_any_size_take_the_largest_to_the_largest_code() {
        for largest in [f32::MAX, 1.0, 3e-30, f32::MIN_POSITIVE * 8192.0, 0.0] {
            for format in [Format::Int8, Format::Int16] {
                let mut scales = RunScales::new(format).unwrap();
                scales.reset(2 * RUN, 3);
                scales.observe(1, &[0.0, largest, 1.0, -largest, 0.0, 0.5], 3);
                let code = f32::from(code(largest, scales.inverses()[0]) as i16);
                assert_eq!(code, if largest == 0.0 { 0.0 } else { scales.most }, "{largest}");
                let again = f64::from(scales.from(1, 0)[0]) * f64::from(code);
                let off = (again - f64::from(largest)).abs();
                assert!(off <= f64::from(largest) * 1e-6, "{largest} {again}");
                assert_eq!(scales.from(0, 0)[..3], [0.0; 3]);
            }
        }
    }

    #[test]
    fn outliers_are_the_few_rows_that_are_far_larger_than_the_rest() {
        let of = |rows: &[f32]| {
            let both: Vec<f32> = rows.iter().flat_map(|&x| [x / 3.0, -x]).collect();
            let mut found = outliers(&both, 2, rows.iter().fold(0.0, |a, b| b.abs().max(a)), 16.0);
            found.sort_unstable();
            found
        };
        assert_eq!(of(&[1.0, 2.0, 30.0, 1.5]), [0usize; 0]);
        assert_eq!(of(&[1.0, 2.0, 33.0, 1.5]), [2]);
        assert_eq!(of(&[1e4, 1.0, -9e3, 1.0, 8e3, 5e3, 0.0]), [0, 2, 4, 5]);
        // More than a few are no outliers.
        assert_eq!(of(&[1e4, 1.0, 1e4, 1e4, 1e4, 1e4]), [0usize; 0]);
        // An outlier of outliers goes, whatever the rest is.
        assert_eq!(of(&[1e9, 1e4, 1e4, 1e4, 1e4, 1e4, 1.0]), [0]);
        assert_eq!(of(&[0.0, 5.0, 0.0]), [0usize; 0]);
        assert_eq!(of(&[]), [0usize; 0]);
    }
}
