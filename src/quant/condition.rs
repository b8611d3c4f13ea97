//! What is done to rows before they are quantized: a mean is subtracted, rows that stand out are found,
//! and all are rotated.
//!
//! ```text
//! rows of a block -> less their mean -> rotated -> does one stand out? -> again, without it in the mean
//! ```

use super::rotation::Rotation;
use super::smooth::{MeanSums, Smoothing, mean_of_rows};
use crate::cpu::Level;
use crate::cpu::contracts::{Condition, RowRanges, Rows};
use crate::cpu::plain::rows::max_magnitude;
use crate::cpu::plain::widest;
use crate::memory::footprint;

/// Queries that share a mean where smoothing is local ([`Smoothing::Block`]): those that the engine takes at
/// a time.
pub const QUERY_BLOCK: usize = 48;

/// Keys that share a mean where smoothing is local: whole panels of every kernel.
pub const KEY_BLOCK: usize = 64;

/// The choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conditioning {
    pub smoothing: Smoothing,
    pub rotation: Option<Rotation>,
    /// Whether rows that stand out are left out of the mean, and reported.
    pub outliers: bool,
    /// Whether the first row of all stands out whatever it is.
    pub sink: bool,
}

/// A row stands out if its largest magnitude is more than this many times what the others have on
/// average. Among 64 normal rows of 16 to 128 elements the largest reaches 1.7; the first key of a language
/// model reaches 10 and more.
const STANDS_OUT: f32 = 4.0;

/// Which rows take part; all of them without it.
type Part<'a> = Option<&'a dyn Fn(usize) -> bool>;

/// What is known of the rows of a block that were conditioned. The memory is kept for the next block.
#[derive(Default)]
pub(crate) struct Conditioned {
    /// What was subtracted, if anything.
    mean: Vec<f32>,
    smoothed: bool,
    /// The rows that stand out, in the order in which they were found.
    pub outliers: Vec<usize>,
    sums: MeanSums,
    /// The range of each row.
    pub ranges: RowRanges,
    rotation: Option<Rotation>,
    rotated_mean: Vec<f32>,
}

impl Conditioning {
    /// Whether rows are quantized as they are.
    pub(crate) fn is_nothing(&self) -> bool {
        self.smoothing == Smoothing::None && self.rotation.is_none() && !self.outliers
    }

    /// Conditions a block of rows into `values`, `[rows, D]`. `takes_part` says which rows have a part in the mean
    /// and may stand out, if not all of them; `head_mean` is that of all rows of the head, where it is that one which is subtracted; `first`, whether
    /// these are the first of all rows.
    pub(crate) fn apply(
        &self,
        level: Level,
        rows: Rows<'_>,
        (takes_part, first): (Part<'_>, bool),
        head_mean: Option<&[f32]>,
        (out, values): (&mut Conditioned, &mut [f32]),
    ) {
        out.outliers.clear();
        let sink = first && self.sink && rows.count() > 1 && rows.depth() > 0;
        if sink && max_magnitude(rows.row(0)).1 {
            out.outliers.push(0);
        }
        out.smoothed = self.smoothing != Smoothing::None;
        out.rotation = self.rotation;
        if let Some(mean) = head_mean {
            out.mean.clear();
            out.mean.extend_from_slice(mean);
        }
        // One in four at most, so that what is done for each of them stays bounded.
        let most = (rows.count() / 4).max(1) + out.outliers.len();
        loop {
            if self.smoothing == Smoothing::Block {
                out.find_mean(rows, takes_part);
            }
            out.condition(level, rows, values);
            if !self.outliers || out.outliers.len() == most || rows.depth() == 0 {
                return;
            }
            match out.find_outlier(takes_part) {
                Some(row) => out.outliers.push(row),
                None => return,
            }
            // Without a mean of their own the rows stay as they are.
            if self.smoothing != Smoothing::Block {
                while out.outliers.len() < most
                    && let Some(row) = out.find_outlier(takes_part)
                {
                    out.outliers.push(row);
                }
                return;
            }
        }
    }
}

footprint!(Conditioned: mean, outliers, sums, ranges, rotated_mean);

/// All rows of a head, conditioned.
#[cfg_attr(not(feature = "drift"), allow(dead_code))]
pub(crate) struct ConditionedHead {
    /// `[S, D]`.
    pub values: Vec<f32>,
    /// The rows that stand out.
    pub outliers: Vec<usize>,
    /// What was subtracted from each block, `[blocks, D]`.
    means: Vec<f32>,
    block: usize,
    rotation: Option<Rotation>,
}

impl ConditionedHead {
    /// Of rows `[S, D]`, all of which take part, in the blocks of queries or of keys.
    pub(crate) fn new(
        level: Level,
        conditioning: &Conditioning,
        matrix: &[f32],
        depth: usize,
        block: usize,
    ) -> Self {
        let mut head = Self {
            values: vec![0.0; matrix.len()],
            outliers: Vec::new(),
            means: Vec::new(),
            block,
            rotation: conditioning.rotation,
        };
        let mean = (conditioning.smoothing == Smoothing::Head).then(|| mean_of_rows(matrix, depth));
        let mut rows = Conditioned::default();
        let blocks = matrix.chunks(block * depth.max(1));
        let values = head.values.chunks_mut(block * depth.max(1));
        for (index, (matrix, values)) in blocks.zip(values).enumerate() {
            let all = Rows::contiguous(matrix, depth);
            conditioning.apply(
                level,
                all,
                (None, index == 0),
                mean.as_deref(),
                (&mut rows, values),
            );
            head.outliers.extend(rows.outliers.iter().map(|row| index * block + row));
            head.means.extend(rows.mean().unwrap_or(&vec![0.0; depth]));
        }
        head
    }

    /// Turns conditioned rows `[S, D]` back into rows as they were.
    #[cfg_attr(not(feature = "drift"), allow(dead_code))]
    pub(crate) fn undo(&self, values: &mut [f32], depth: usize) {
        if let Some(rotation) = self.rotation {
            rotation.apply_whole(values);
        }
        let blocks = values.chunks_mut(self.block * depth.max(1));
        for (block, mean) in blocks.zip(self.means.chunks_exact(depth.max(1))) {
            for row in block.chunks_exact_mut(depth) {
                row.iter_mut().zip(mean).for_each(|(x, mean)| *x += mean);
            }
        }
    }
}

impl Conditioned {
    /// Nothing was done.
    pub(crate) fn clear(&mut self) {
        self.outliers.clear();
        self.smoothed = false;
    }

    /// What was subtracted from every row; `None` without smoothing.
    pub(crate) fn mean(&self) -> Option<&[f32]> {
        self.smoothed.then_some(&self.mean)
    }

    /// The same, rotated as the rows are.
    pub(crate) fn rotated_mean(&mut self, level: Level) -> Option<&[f32]> {
        if !self.smoothed {
            return None;
        }
        self.rotated_mean.clone_from(&self.mean);
        if let Some(rotation) = self.rotation {
            rotation.apply_on(level, &mut self.rotated_mean);
        }
        Some(&self.rotated_mean)
    }

    /// The mean of the rows that take part and do not stand out.
    fn find_mean(&mut self, rows: Rows<'_>, takes_part: Part<'_>) {
        self.sums.start(rows.depth());
        if takes_part.is_none() && self.outliers.is_empty() {
            self.sums.add(rows);
            return self.sums.finish(&mut self.mean);
        }
        let takes_part = |row: usize| takes_part.is_none_or(|takes_part| takes_part(row));
        let counts = |row: usize| takes_part(row) && !self.outliers.contains(&row);
        let mut start = 0;
        while start < rows.count() {
            let run = (start..rows.count()).take_while(|&row| counts(row)).count();
            if run > 0 {
                self.sums.add(rows.part(start..start + run));
            }
            start += run + 1;
        }
        self.sums.finish(&mut self.mean);
    }

    fn condition(&mut self, level: Level, rows: Rows<'_>, values: &mut [f32]) {
        self.ranges.resize(rows.count());
        if rows.depth() == 0 {
            return;
        }
        assert!(self.rotation.is_none_or(|rotation| rotation.depth() == rows.depth()));
        level.condition(Condition {
            rows,
            mean: self.smoothed.then_some(&self.mean),
            rotate: self.rotation.is_some(),
            values,
            ranges: &mut self.ranges,
        });
    }

    /// The row with the largest magnitude, if it stands out among those that take part.
    fn find_outlier(&self, takes_part: Part<'_>) -> Option<usize> {
        if takes_part.is_none() && self.outliers.is_empty() && self.are_alike() {
            return None;
        }
        let takes_part = |row: usize| takes_part.is_none_or(|takes_part| takes_part(row));
        let (mut count, mut sum, mut largest) = (0usize, 0f64, (0f32, None));
        let everywhere = self.outliers.is_empty();
        for (row, magnitude) in self.ranges.magnitudes().enumerate() {
            let counts = everywhere || !self.outliers.contains(&row);
            if magnitude.is_finite() && counts && takes_part(row) {
                count += 1;
                sum += f64::from(magnitude);
                if magnitude > largest.0 {
                    largest = (magnitude, Some(row));
                }
            }
        }
        let others = (sum - f64::from(largest.0)) / count.saturating_sub(1).max(1) as f64;
        let stands_out = count > 1 && f64::from(largest.0) > limit(count) * others;
        largest.1.filter(|_| stands_out)
    }

    /// Whether the largest magnitude is near even the smallest, as it mostly is: then none stands out.
    fn are_alike(&self) -> bool {
        let (least, most) = widest!(ends_of_magnitudes, &self.ranges, &RowRanges => (f32, f32));
        f64::from(most) <= limit(self.ranges.low.len()) * f64::from(least)
    }
}

/// How many times the mean of the others a row of `count` is larger that stands out. One of them that lies far
/// from the others draws their mean towards it, which leaves it only `count - 1` times as far from that as the
/// others.
fn limit(count: usize) -> f64 {
    f64::from(STANDS_OUT.min(0.7 * count.saturating_sub(1) as f32))
}

/// The smallest magnitude of a row and the largest; NaN is the largest.
#[inline(always)]
fn ends_of_magnitudes(ranges: &RowRanges) -> (f32, f32) {
    // As bits they have the same order, and NaN is above infinity.
    let all = ranges.magnitudes().map(f32::to_bits);
    let (least, most) = all.fold((u32::MAX, 0), |(least, most), x| (least.min(x), most.max(x)));
    (f32::from_bits(least), f32::from_bits(most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;

    const BLOCK: Conditioning =
        Conditioning { smoothing: Smoothing::Block, rotation: None, outliers: true, sink: false };

    /// Rows of two elements.
    fn condition(rows: &[[f32; 2]], parts: &[bool]) -> (Conditioned, Vec<f32>) {
        let mut values = vec![7.0; 2 * rows.len()];
        let mut out = Conditioned::default();
        let takes_part = |row: usize| parts.is_empty() || parts[row];
        let rows = Rows::contiguous(rows.as_flattened(), 2);
        BLOCK.apply(runnable()[0], rows, (Some(&takes_part), false), None, (&mut out, &mut values));
        (out, values)
    }

    #[test]
    fn what_takes_no_part_leaves_no_trace_in_the_mean() {
        for hidden in [0.0, 1e4, f32::MAX, f32::NAN, f32::INFINITY] {
            let rows = [[1.0, 2.0], [hidden, hidden], [3.0, 4.0], [2.0, 3.5], [2.0, 2.5]];
            let (found, values) = condition(&rows, &[true, false, true, true, true]);
            assert_eq!(found.mean(), Some([2.0, 3.0].as_slice()), "{hidden}");
            assert!(found.outliers.is_empty());
            assert_eq!(values[..2], [-1.0, -1.0]);
        }
    }

    #[test]
    fn rows_that_stand_out_are_found_and_left_out_of_the_mean() {
        let normal = |row: usize| [1.0 + (row % 3) as f32, -((row % 5) as f32)];
        for count in [3usize, 4, 7, 16, 64] {
            let mut rows: Vec<_> = (0..count).map(normal).collect();
            let mean = condition(&rows, &[]).0.mean().unwrap().to_vec();
            assert!(count < 4 || condition(&rows, &[]).0.outliers.is_empty(), "{count}");
            rows[count / 2] = [3e4, 0.0];
            let (found, _) = condition(&rows, &[]);
            assert_eq!(found.outliers, [count / 2], "{count}");
            let near = |i: usize| (found.mean().unwrap()[i] - mean[i]).abs() < 2.0;
            assert!(near(0) && near(1), "{count}: {:?} {mean:?}", found.mean());
        }
        // Of two rows that differ, one is the mean of the block.
        assert_eq!(condition(&[[1.0, 2.0], [5.0, 2.0]], &[]).0.outliers.len(), 1);
        assert!(condition(&[[1.0, 2.0]], &[]).0.outliers.is_empty());
        assert!(condition(&[[1.0, 2.0]; 9], &[]).0.outliers.is_empty());
    }

    /// Any depth, rows apart from each other, with a mean and without, rotated or not, on every level.
    #[test]
    fn one_pass_is_a_mean_subtracted_a_rotation_and_the_ranges() {
        let wave = |i: usize| (i as f32 * 0.37).sin() * 3.0 + (i % 11) as f32 / 8.0;
        for depth in [1usize, 2, 5, 15, 16, 17, 31, 32, 48, 64, 80, 96, 127, 128, 200, 256, 300] {
            for (count, special) in [(1, 0.0), (3, f32::NAN), (16, f32::MAX), (35, f32::INFINITY)] {
                let mut data: Vec<f32> = (0..count * (depth + 3)).map(wave).collect();
                data[count / 2 * (depth + 3) + depth / 3] += special;
                let rows = Rows::new(&data, count, depth, depth + 3);
                let mean: Vec<f32> = (0..depth).map(|i| wave(7 * i)).collect();
                for (mean, rotate) in
                    [(None, false), (None, true), (Some(&mean[..]), false), (Some(&mean[..]), true)]
                {
                    for level in runnable() {
                        check_condition(level, rows, mean, rotate);
                    }
                }
            }
        }
    }

    fn check_condition(level: Level, rows: Rows<'_>, mean: Option<&[f32]>, rotate: bool) {
        let (count, depth) = (rows.count(), rows.depth());
        let (mut values, mut ranges) = (vec![7.0; count * depth], RowRanges::default());
        level.condition(Condition { rows, mean, rotate, values: &mut values, ranges: &mut ranges });
        let magnitudes: Vec<f32> = ranges.magnitudes().collect();
        for (i, row) in rows.iter().enumerate() {
            let less = |i: usize| mean.map_or(0.0, |mean| mean[i]);
            let mut expected: Vec<f32> = (0..depth).map(|i| row[i] - less(i)).collect();
            if rotate {
                let portable = *runnable().last().unwrap();
                Rotation::new(depth).apply_on(portable, &mut expected);
            }
            let found = &values[i * depth..(i + 1) * depth];
            let same =
                |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(found.iter().zip(&expected).all(same), "{level:?} {depth} {count} {i}");
            let at = (level, depth, count, i);
            if !expected.iter().all(|x| x.is_finite()) {
                assert!(!magnitudes[i].is_finite(), "{at:?}");
                continue;
            }
            let low = expected.iter().copied().fold(-0.0, f32::min);
            let high = expected.iter().copied().fold(0.0, f32::max);
            assert_eq!((ranges.low[i], ranges.high[i]), (low, high), "{at:?}");
            assert_eq!(magnitudes[i], high.max(-low), "{at:?}");
        }
    }

    #[test]
    fn a_mean_that_overflows_is_no_mean() {
        let (_, values) = condition(&[[f32::MAX, 1.0]; 8], &[]);
        assert!(values.iter().all(|x| x.is_finite()), "{values:?}");
    }
}
