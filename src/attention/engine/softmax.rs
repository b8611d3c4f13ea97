//! The softmax over a tile of keys, with running maximum and sum (Milakov and Gimelshein 2018,
//! arXiv:1805.02867), in base 2: scores come multiplied by `log2(e)`.

use crate::cpu::Level;
use crate::cpu::contracts::{CODES, Format, GROUP, Int8Run, Int16Exp, LANES, RUN, Scores};
use crate::cpu::plain::softmax::{exp2, scales_of_runs};
use crate::cpu::plain::widest;
use std::ops::Range;

/// What the softmax of one query has seen so far.
#[derive(Debug, Clone, Copy)]
pub(in crate::attention) struct Running {
    /// The largest score.
    pub max: f32,
    /// The sum of `2^(score - max)`.
    pub sum: f32,
    /// What the sums of values so far must be multiplied by after this tile.
    pub rescale: f32,
}

impl Running {
    pub(in crate::attention) const START: Running =
        Running { max: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0 };
}

impl Probs<'_> {
    /// What they are multiplied in.
    pub(in crate::attention) fn format(&self) -> Format {
        match self {
            Probs::F32 => Format::F32,
            Probs::Bf16(_) => Format::Bf16,
            Probs::Int8 { .. } => Format::Int8,
            Probs::Int16 { .. } => Format::Int16,
        }
    }
}

/// Where the probabilities of a tile go: row-major, rows `stride` elements apart.
pub(in crate::attention) enum Probs<'a> {
    /// In the place of the scores.
    F32,
    /// Rounded to bf16.
    Bf16(&'a mut [u16]),
    /// Rounded to 1/255 of the largest of a run of [`RUN`] keys.
    Int8 {
        codes: &'a mut [u8],
        /// What the codes stand for: all runs of a row before those of the next.
        runs: &'a mut [Int8Run],
    },
    /// Rounded to 1/4096 of the largest of a run of [`RUN`] keys.
    Int16 {
        codes: &'a mut [i16],
        /// The largest score of a run, and what a code of 1 stands for: all runs of a row before those of the
        /// next.
        tops: &'a mut [f32],
        scales: &'a mut [f32],
    },
}

/// Scores of some queries against a tile of keys.
pub(in crate::attention) struct Tile<'a> {
    /// Row-major, rows `stride` elements apart.
    pub scores: &'a mut [f32],
    pub stride: usize,
    /// Keys in the tile; probabilities are written for these, and zeros up to whole groups.
    pub keys: usize,
    /// The keys of the tile that each query sees.
    pub visible: &'a [Range<usize>],
    pub probs: Probs<'a>,
    /// Keys whose values are [large](super::KeyValues::large), counted from the first of the tile.
    pub large: &'a [usize],
}

impl Tile<'_> {
    /// Adds a value that stands beside the others, where a row sees its key, which is counted from the
    /// tile's first. `sums` is `[rows, width]`.
    pub(in crate::attention) fn add_exception(
        &self,
        key: usize,
        value: &[f32],
        running: &[Running],
        sums: &mut [f32],
    ) {
        let width = (sums.len() / running.len().max(1)).max(1);
        for (row, sums) in sums.chunks_exact_mut(width).enumerate() {
            let at = row * self.stride + key;
            let p = match &self.probs {
                Probs::F32 => self.scores[at],
                Probs::Bf16(halves) => f32::from_bits(u32::from(halves[at]) << 16),
                // Not the code, which may have been rounded to 0, while a NaN must be seen.
                Probs::Int8 { .. } | Probs::Int16 { .. } if self.visible[row].contains(&key) => {
                    running[row].probability(self.scores[at])
                }
                Probs::Int8 { .. } | Probs::Int16 { .. } => 0.0,
            };
            if p != 0.0 {
                sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += p * x);
            }
        }
    }
}

/// Turns scores into probabilities (not yet divided by their sum), row by row. What a query does
/// not see becomes 0. A NaN score makes the sum of its row NaN.
///
/// In int16 there is room in a row of scores and of codes for a multiple of [`LANES`].
pub(super) fn softmax_tile(level: Level, tile: &mut Tile<'_>, running: &mut [Running]) {
    if let Probs::Int16 { .. } = tile.probs {
        return int16_tile(level, tile, running);
    }
    let padded = tile.keys.next_multiple_of(GROUP);
    for (row, running) in running.iter_mut().enumerate() {
        let Range { start, end } = tile.visible[row].clone();
        let scores = &mut tile.scores[row * tile.stride..][..tile.stride];
        let max = running.advance(level.max(&scores[start..end]), &scores[start..end]);
        let sum = match &mut tile.probs {
            Probs::F32 => {
                scores[..start].fill(0.0);
                scores[end..padded].fill(0.0);
                level.exp_f32(&mut scores[start..end], max)
            }
            Probs::Bf16(probs) => {
                let probs = &mut probs[row * tile.stride..][..padded];
                probs[..start].fill(0);
                probs[end..].fill(0);
                level.exp_bf16(&scores[start..end], max, &mut probs[start..end])
            }
            Probs::Int8 { codes, runs } => {
                let codes = &mut codes[row * tile.stride..][..padded];
                codes[..start].fill(0);
                codes[end..].fill(0);
                let per_row = tile.keys.div_ceil(RUN);
                let runs = &mut runs[row * per_row..][..per_row];
                int8_row(level, (&scores[..end], start), max, codes, runs)
            }
            Probs::Int16 { .. } => unreachable!("a tile of its own"),
        };
        running.add(sum);
    }
}

/// A tile in int16: runs that hold a key which is seen, whole, and zeros in the others. Scores around those
/// that are seen become minus infinity. The largest of all runs come first: reading them right after they
/// were written takes as long as a short row.
fn int16_tile(level: Level, tile: &mut Tile<'_>, running: &mut [Running]) {
    let per_row = tile.keys.div_ceil(RUN).max(1);
    let Tile { scores, stride, visible, probs, .. } = tile;
    let Probs::Int16 { codes, tops, scales } = probs else { unreachable!("a tile in int16") };
    let (stride, runs) = (*stride, running.len() * per_row);
    let (tops, scales) = (&mut tops[..runs], &mut scales[..runs]);
    for part in Part::all(visible, per_row) {
        let tops = &mut tops[part.rows.start * per_row..part.rows.end * per_row];
        part.find_tops(level, (&mut scores[part.rows.start * stride..], stride), tops);
    }
    let of_rows = tops.chunks_exact(per_row).zip(scales.chunks_exact_mut(per_row));
    for (row, ((tops, scales), running)) in of_rows.zip(&mut *running).enumerate() {
        let top = tops.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
        let Range { start, end } = visible[row];
        let max = running.advance(top, &scores[row * stride..][start..end.max(start)]);
        scales.iter_mut().zip(tops).for_each(|(scale, top)| *scale = top - max);
    }
    widest!(scales_of_runs, &mut *scales, &mut [f32] => ());
    for part in Part::all(visible, per_row) {
        let runs = part.rows.start * per_row..part.rows.end * per_row;
        let at = part.rows.start * stride;
        let runs = (&tops[runs.clone()], &scales[runs]);
        let mut sums = [0.0; LANES];
        part.write_codes(level, &scores[at..], (&mut codes[at..], stride), runs, &mut sums);
        let running = running[part.rows].iter_mut();
        running.zip(sums).for_each(|(running, sum)| running.add(sum));
    }
}

/// Rows of a tile that see the same keys, a row alone where there are runs that it does not see: a call for
/// several costs as much as a short row.
struct Part {
    rows: Range<usize>,
    keys: Range<usize>,
    /// From the first run that holds one of these, to the end of the last vector.
    vectors: Range<usize>,
    runs: Range<usize>,
    per_row: usize,
}

impl Part {
    /// All rows in order, in parts of up to [`LANES`].
    fn all(visible: &[Range<usize>], per_row: usize) -> impl Iterator<Item = Part> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let seen = visible.get(start)?;
            let keys = if seen.is_empty() { 0..0 } else { seen.clone() };
            let runs = keys.start / RUN..keys.end.div_ceil(RUN);
            let vectors = runs.start * RUN..keys.end.next_multiple_of(LANES);
            let most = if runs == (0..per_row) { LANES } else { 1 };
            let alike = visible[start..].iter().take(most).take_while(|other| *other == seen);
            let rows = start..start + alike.count();
            start = rows.end;
            Some(Part { rows, keys, vectors, runs, per_row })
        })
    }

    /// Its scores, from the first row of a tile on; `None` where nothing is seen.
    fn scores<'a>(&self, scores: &'a [f32], stride: usize) -> Option<Scores<'a>> {
        let Self { rows, vectors, .. } = self;
        let (data, rows, len) = (&scores[vectors.start..], rows.len(), vectors.len());
        (len > 0).then_some(Scores { data, rows, len, stride })
    }

    /// Those of its runs that are seen.
    fn seen(&self) -> Range<usize> {
        self.runs.start..(self.rows.len() - 1) * self.per_row + self.runs.end
    }

    /// The largest score of each run, minus infinity where none is seen.
    fn find_tops(&self, level: Level, (scores, stride): (&mut [f32], usize), tops: &mut [f32]) {
        let Self { rows, keys, vectors, .. } = self;
        for row in scores.chunks_mut(stride).take(rows.len()) {
            row[vectors.start..keys.start].fill(f32::NEG_INFINITY);
            row[keys.end..vectors.end].fill(f32::NEG_INFINITY);
        }
        let seen = self.seen();
        tops[..seen.start].fill(f32::NEG_INFINITY);
        tops[seen.end..].fill(f32::NEG_INFINITY);
        if let Some(scores) = self.scores(scores, stride) {
            level.max_of_runs(scores, &mut tops[seen]);
        }
    }

    /// The codes of its rows, 0 where nothing is seen, and the sums of what they stand for.
    fn write_codes(
        &self,
        level: Level,
        scores: &[f32],
        (codes, stride): (&mut [i16], usize),
        (tops, scales): (&[f32], &[f32]),
        sums: &mut [f32; LANES],
    ) {
        let Self { rows, vectors, .. } = self;
        for row in codes.chunks_mut(stride).take(rows.len()) {
            row[..vectors.start].fill(0);
            row[vectors.end..].fill(0);
        }
        if let Some(scores) = self.scores(scores, stride) {
            let (codes, sums) = (&mut codes[vectors.start..], &mut sums[..rows.len()]);
            let (tops, scales) = (&tops[self.seen()], &scales[self.seen()]);
            level.exp_int16(Int16Exp { scores, codes, tops, scales, sums });
        }
    }
}

/// Writes codes for the scores from `start` on, and what they stand for, run by run; returns the
/// sum of what they stand for.
fn int8_row(
    level: Level,
    (scores, start): (&[f32], usize),
    max: f32,
    codes: &mut [u8],
    runs: &mut [Int8Run],
) -> f32 {
    let mut sum = 0.0;
    for (i, run) in runs.iter_mut().enumerate() {
        let end = (i * RUN + RUN).min(scores.len());
        let keys = (i * RUN).max(start).min(end)..end;
        // The run's own maximum gives all of its codes a use.
        let run_max = level.max(&scores[keys.clone()]);
        let (top, scale) = match run_max == f32::NEG_INFINITY {
            true => (0.0, 0.0),
            false => (run_max, exp2(run_max - max) / CODES),
        };
        let codes = level.exp_int8(&scores[keys.clone()], top, &mut codes[keys]);
        *run = Int8Run { scale, codes: codes as u32 };
        sum += codes * scale;
    }
    sum
}

impl Running {
    /// What `score` adds to the sum.
    fn probability(&self, score: f32) -> f32 {
        exp2(score - self.max_or_zero())
    }

    /// Any finite maximum gives zeros for minus infinity, without the NaN of -inf - (-inf).
    fn max_or_zero(&self) -> f32 {
        if self.max == f32::NEG_INFINITY { 0.0 } else { self.max }
    }

    /// Takes in the maximum of a tile; returns what to subtract from its scores.
    fn advance(&mut self, tile_max: f32, scores: &[f32]) -> f32 {
        let old = self.max;
        self.max = if tile_max > old { tile_max } else { old };
        if self.max == f32::NEG_INFINITY && scores.iter().any(|x| x.is_nan()) {
            self.sum = f32::NAN;
        }
        let subtract = self.max_or_zero();
        // Of a row that has seen nothing there is nothing to rescale.
        let same = self.max == old || old == f32::NEG_INFINITY;
        self.rescale = if same { 1.0 } else { exp2(old - subtract) };
        subtract
    }

    /// Takes in the sum of a tile.
    fn add(&mut self, sum: f32) {
        self.sum = self.sum * self.rescale + sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::contracts::softmax::{ERROR_BF16, ERROR_F32, ERROR_INT16};
    use crate::cpu::runnable;

    /// Those that a level multiplies.
    fn formats(level: Level) -> impl Iterator<Item = Format> {
        let all = [Format::F32, Format::Bf16, Format::Int8, Format::Int16];
        all.into_iter().filter(move |&format| level.panels(format).is_some())
    }

    /// Every level that multiplies bf16.
    fn with_bf16() -> impl Iterator<Item = Level> {
        runnable().into_iter().filter(|level| level.panels(Format::Bf16).is_some())
    }

    fn from_bf16(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[test]
    fn exp2_is_within_its_stated_error() {
        let xs: Vec<f32> = (0..=1_250_000).map(|i| -(i as f32) * 1e-4).collect();
        for level in runnable() {
            let (mut f32s, mut bf16s) = (xs.clone(), vec![0; xs.len()]);
            level.exp_f32(&mut f32s, 0.0);
            let with_bf16 = level.panels(Format::Bf16).is_some();
            if with_bf16 {
                level.exp_bf16(&xs, 0.0, &mut bf16s);
            }
            for ((x, in_f32), in_bf16) in xs.iter().zip(f32s).zip(bf16s) {
                let exact = f64::from(*x).exp2();
                let off = |found: f32| (f64::from(found) / exact - 1.0).abs();
                assert!(off(in_f32) < ERROR_F32, "{x} {in_f32}");
                // Half a unit in the last place of 8 bits is at most 2^-8 of the number.
                let in_bf16 = from_bf16(in_bf16);
                assert!(!with_bf16 || off(in_bf16) < ERROR_BF16 + 1.0 / 256.0, "{x} {in_bf16}");
            }
        }
    }

    /// bf16 keeps too little to see the error before rounding, but the mean over many does.
    #[test]
    fn exp2_in_bf16_is_right_on_average() {
        let xs: Vec<f32> = (0..100_000).map(|i| -(i as f32) * 1.237e-5).collect();
        let exact: f64 = xs.iter().map(|x| f64::from(*x).exp2()).sum();
        for level in with_bf16() {
            let found = f64::from(level.exp_bf16(&xs, 0.0, &mut vec![0; xs.len()]));
            assert!((found / exact - 1.0).abs() < ERROR_BF16, "{found} {exact}");
        }
    }

    /// Scores of every distance from the largest, with codes and sum.
    fn exp_int16(level: Level, scores: &[f32], max: f32) -> (Vec<i16>, Vec<f32>, f32) {
        let mut tops = vec![f32::NAN; scores.len().div_ceil(RUN)];
        let (mut codes, mut sum) = (vec![-1; scores.len()], [-1.0]);
        let scores = Scores { data: scores, rows: 1, len: scores.len(), stride: scores.len() };
        level.max_of_runs(scores, &mut tops);
        for (top, scores) in tops.iter().zip(scores.data.chunks(RUN)) {
            assert_eq!(*top, scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
        let mut scales: Vec<f32> = tops.iter().map(|top| top - max).collect();
        scales_of_runs(&mut scales);
        let (tops, codes_out) = (&tops, &mut codes);
        level.exp_int16(Int16Exp {
            scores,
            codes: codes_out,
            tops,
            scales: &scales,
            sums: &mut sum,
        });
        (codes, scales, sum[0])
    }

    #[test]
    fn exp2_in_int16_is_within_its_stated_error_and_the_same_on_every_level() {
        // A score of 0 in every run, so that codes are those of the numbers themselves.
        let mut scores: Vec<f32> = (0..200_000).map(|i| -(i as f32) * 8e-5).collect();
        scores.iter_mut().step_by(RUN).for_each(|x| *x = 0.0);
        let first = exp_int16(runnable()[0], &scores, 3.0);
        for level in runnable() {
            let (codes, scales, sum) = exp_int16(level, &scores, 3.0);
            assert!((&codes, &scales, sum) == (&first.0, &first.1, first.2), "{level:?}");
            for (i, (code, x)) in codes.iter().zip(&scores).enumerate() {
                let exact = f64::from(*x).exp2() * 4096.0;
                let off = (f64::from(*code) - exact).abs();
                assert!(off <= 0.51 + exact * ERROR_INT16, "{x} {code} {exact}");
                assert_eq!(scales[i / RUN], 0.125 / 4096.0);
            }
            let exact: f64 = codes.iter().map(|&code| f64::from(code) * 0.125 / 4096.0).sum();
            assert!((f64::from(sum) / exact - 1.0).abs() < 1e-5, "{sum} {exact}");
        }
    }

    /// Any number of runs and vectors, any special number in any place.
    #[test]
    fn int16_has_the_same_bits_on_every_level() {
        let special = [f32::NEG_INFINITY, 0.0, -1e30, 1e30, -0.0, 1e-40, f32::NAN, f32::INFINITY];
        for len in (1..80).chain([512, 1040, 2064]).map(|vectors| 16 * vectors) {
            let some = |i: usize| ((i * 7919) % 1009) as f32 / 50.0 - 12.0;
            let mut scores: Vec<f32> = (0..len).map(some).collect();
            for (k, number) in special.into_iter().enumerate() {
                let all: Vec<_> = runnable()
                    .into_iter()
                    .map(|level| {
                        let (codes, runs, sum) = exp_int16(level, &scores, 9.0);
                        let runs: Vec<u32> = runs.iter().map(|x| x.to_bits()).collect();
                        (codes, runs, sum)
                    })
                    .collect();
                for (codes, runs, sum) in &all {
                    if all[0].2.is_nan() {
                        assert!(sum.is_nan(), "{len} {k}");
                        assert!(codes.iter().all(|code| (0..=4096).contains(code)));
                    } else {
                        let same = (codes, runs, sum.to_bits());
                        assert!(same == (&all[0].0, &all[0].1, all[0].2.to_bits()), "{len} {k}");
                    }
                }
                scores[(k * 37) % len] = number;
            }
        }
    }

    /// Rows of whole runs and of parts of one, with something behind each.
    #[test]
    fn int16_of_rows_together_is_that_of_each() {
        let of = |rows| [1usize, 4, 5, 12].map(|vectors| (rows, 16 * vectors));
        for (rows, len) in (1..=16).flat_map(of) {
            let (runs, stride) = (len.div_ceil(RUN), len + 24);
            let some = |i: usize| ((i * 7919) % 1013) as f32 / 60.0 - 12.0;
            let mut data: Vec<f32> = (0..rows * stride).map(some).collect();
            data[rows / 2 * stride] = f32::NAN;
            data[..5].fill(f32::NEG_INFINITY);
            let scores = Scores { data: &data, rows, len, stride };
            for level in runnable() {
                let apart = (0..rows).map(|row| exp_int16(level, scores.row(row), 5.0));
                let apart: Vec<_> = apart.collect();
                let scales: Vec<f32> = apart.iter().flat_map(|row| row.1.clone()).collect();
                let mut tops = vec![0.0; rows * runs];
                level.max_of_runs(scores, &mut tops);
                let (mut codes, mut sums) = (vec![-1; data.len()], vec![-1.0; rows]);
                let (tops, scales) = (&tops, &scales);
                level.exp_int16(Int16Exp {
                    scores,
                    codes: &mut codes,
                    tops,
                    scales,
                    sums: &mut sums,
                });
                for (row, (expected, _, sum)) in apart.into_iter().enumerate() {
                    assert_eq!(codes[row * stride..][..len], expected, "{level:?} {row}");
                    let same = sums[row].to_bits() == sum.to_bits();
                    assert!(same || (row == rows / 2 && sum.is_nan() && sums[row].is_nan()));
                }
            }
        }
    }

    #[test]
    fn exp2_of_special_numbers() {
        let inf = f32::INFINITY;
        for level in runnable() {
            for len in 1..70 {
                let mut scores = vec![-inf; len];
                assert_eq!(level.max(&scores), -inf);
                assert_eq!(level.exp_f32(&mut scores, 1.0), 0.0);
                assert_eq!(scores, vec![0.0; len]);
                scores[len / 2] = f32::NAN;
                assert_eq!(level.max(&scores), if len == 1 { -inf } else { 0.0 });
                let with_bf16 = level.panels(Format::Bf16).is_some();
                assert!(!with_bf16 || level.exp_bf16(&scores, 0.0, &mut vec![0; len]).is_nan());
                assert!(level.exp_f32(&mut scores, 0.0).is_nan());
                assert!(scores[len / 2].is_nan());
                let below = vec![-2e30; len];
                assert_eq!(level.max(&below), -2e30);
                if with_bf16 {
                    assert_eq!(level.exp_bf16(&below, 0.0, &mut vec![1; len]), 0.0);
                }
            }
        }
    }

    /// Scores through tiles of some size, as one row of probabilities that sum to 1.
    fn softmax(
        level: Level,
        scores: &[f32],
        visible: Range<usize>,
        tile: usize,
        format: Format,
    ) -> Vec<f32> {
        let mut running = [Running::START];
        let mut all: Vec<f32> = Vec::new();
        for (index, keys) in scores.chunks(tile).enumerate() {
            let start = index * tile;
            let clamp = |x: usize| x.clamp(start, start + keys.len()) - start;
            let mut buffer = keys.to_vec();
            buffer.resize(keys.len().next_multiple_of(LANES), 123.0);
            let stride = buffer.len();
            let (mut halves, mut codes) = (vec![0x7fc0u16; stride], vec![77u8; stride]);
            let (mut words, mut scales) = (vec![77; stride], vec![7.0; keys.len().div_ceil(RUN)]);
            let mut tops = scales.clone();
            let mut runs = vec![Int8Run::default(); keys.len().div_ceil(RUN)];
            let probs = match format {
                Format::F32 => Probs::F32,
                Format::Bf16 => Probs::Bf16(&mut halves),
                Format::Int8 => Probs::Int8 { codes: &mut codes, runs: &mut runs },
                Format::Int16 => {
                    Probs::Int16 { codes: &mut words, tops: &mut tops, scales: &mut scales }
                }
            };
            let inside = clamp(visible.start)..clamp(visible.end);
            let (scores, visible) = (&mut buffer, std::slice::from_ref(&inside));
            let mut job = Tile { scores, stride, keys: keys.len(), visible, probs, large: &[] };
            softmax_tile(level, &mut job, &mut running);
            all.iter_mut().for_each(|p| *p *= running[0].rescale);
            let written: Vec<f32> = match format {
                Format::F32 => buffer,
                Format::Bf16 => halves.iter().map(|&half| from_bf16(half)).collect(),
                Format::Int8 => {
                    let whole = keys.len().next_multiple_of(GROUP);
                    let real = codes[..whole].chunks(RUN).zip(&runs).flat_map(|(codes, run)| {
                        let sum: u32 = codes.iter().map(|&code| u32::from(code)).sum();
                        assert!(running[0].sum.is_nan() || run.codes == sum, "{sum} {run:?}");
                        codes.iter().map(|&code| f32::from(code) * run.scale)
                    });
                    real.collect()
                }
                Format::Int16 => {
                    let runs = words.chunks(RUN).zip(&scales);
                    let real = runs
                        .flat_map(|(words, scale)| words.iter().map(move |&word| (word, scale)));
                    real.map(|(word, scale)| f32::from(word) * scale).collect()
                }
            };
            let written = &written[..keys.len().next_multiple_of(GROUP)];
            assert!(written[keys.len()..].iter().all(|&p| p == 0.0), "zeros fill the last group");
            all.extend(&written[..keys.len()]);
        }
        all.iter().map(|p| p / running[0].sum).collect()
    }

    #[test]
    fn tiles_and_ranges_give_the_softmax() {
        let scores: Vec<f32> = (0..77).map(|i| ((i * 37) % 61) as f32 / 3.0 - 10.0).collect();
        let every = |visible: Range<usize>| {
            runnable().into_iter().map(move |level| (level, visible.clone()))
        };
        for (level, visible) in [0..77, 0..1, 5..70, 33..34, 76..77].into_iter().flat_map(every) {
            let seen = |i: usize| visible.contains(&i);
            let term = |i: usize| if seen(i) { f64::from(scores[i]).exp2() } else { 0.0 };
            let sum: f64 = (0..77).map(term).sum();
            let largest = (0..77).map(term).fold(0.0, f64::max) / sum;
            for tile in [77, 100, 1, 2, 16, 17, 32] {
                for format in formats(level) {
                    let found = softmax(level, &scores, visible.clone(), tile, format);
                    for (i, p) in found.iter().enumerate() {
                        let exact = term(i) / sum;
                        let off = (f64::from(*p) - exact).abs();
                        let bound = match format {
                            Format::F32 => 1e-6 * exact,
                            Format::Bf16 => 0.004 * exact,
                            // Half a code, in this one and in each that the sum is made of. The
                            // largest probability bounds what a code stands for.
                            Format::Int8 => {
                                0.51 / 255.0 * largest * (1.0 + exact * visible.len() as f64)
                            }
                            Format::Int16 => {
                                let half = 0.51 / 4096.0 * largest;
                                half * (1.0 + exact * visible.len() as f64)
                                    + 2.0 * ERROR_INT16 * exact
                            }
                        };
                        let what = (&visible, tile, format, i);
                        assert!(off <= bound, "{what:?}: {p} {exact}");
                    }
                    let sum: f32 = found.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5, "{visible:?} {tile} {format:?}: {sum}");
                }
            }
        }
    }

    #[test]
    fn infinities_and_nan() {
        let inf = f32::INFINITY;
        let every = |level| formats(level).map(move |format| (level, format));
        for (level, format) in runnable().into_iter().flat_map(every) {
            let masked = softmax(level, &[-inf, 1.0, -inf, 1.0], 0..4, 2, format);
            assert_eq!(masked, [0.0, 0.5, 0.0, 0.5]);
            // Nothing to see: 0 / 0, which the caller turns into zeros by the sum.
            assert!(softmax(level, &[-inf; 3], 0..3, 2, format).iter().all(|p| p.is_nan()));
            for scores in [[f32::NAN, 1.0, 2.0], [f32::NAN, -inf, -inf], [-inf, -inf, f32::NAN]] {
                for tile in [1, 3] {
                    assert!(softmax(level, &scores, 0..3, tile, format).iter().any(|p| p.is_nan()));
                }
            }
            let unseen = softmax(level, &[f32::NAN, 1.0, 1.0, f32::NAN], 1..3, 4, format);
            assert_eq!(unseen, [0.0, 0.5, 0.5, 0.0]);
        }
    }
}
