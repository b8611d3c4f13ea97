//! The softmax over a tile whose probabilities become int16.

use super::part::Part;
use super::tile::{Probs, Running, Tile, Words};
use crate::cpu::Level;
use crate::cpu::contracts::softmax::SCALE_INT16;
use crate::cpu::contracts::{Int16Exp, RUN, Scores};
use crate::cpu::plain::lanes::{LANES, each_lane, lanes};
use crate::cpu::plain::softmax::exp2;
use crate::cpu::plain::widest;

/// Codes of a tile: of runs that hold a key which is seen, whole, and zeros in the others. Scores around those
/// that are seen become minus infinity.
pub(super) fn write_codes(level: Level, tile: &mut Tile<'_>) {
    let Tile { scores, stride, keys, visible, probs, .. } = tile;
    let Probs::Int16(words) = probs else { unreachable!("a tile in int16") };
    for part in Part::all(visible, *keys, (usize::MAX, RUN)) {
        let scores = &mut scores[part.rows.start * *stride..];
        part.write_codes(level, (scores, *stride), words, visible.len());
    }
}

/// [`write_codes`] of a tile of which every row sees every key.
pub(super) fn write_all(level: Level, tile: &mut Tile<'_>) {
    let Tile { scores, stride, keys, visible, probs, .. } = tile;
    let Probs::Int16(words) = probs else { unreachable!("a tile in int16") };
    let (rows, stride_of_codes, len) = (visible.len(), words.stride, keys.next_multiple_of(LANES));
    if len > *keys {
        let rows = scores.chunks_mut(*stride).take(rows);
        rows.for_each(|row| row[*keys..len].fill(f32::NEG_INFINITY));
    }
    let (codes, runs) = words.at_row(0, rows);
    let scores = Scores { data: scores, rows, len, stride: *stride };
    level.exp_int16(Int16Exp { scores, codes, stride: stride_of_codes, runs });
}

impl Part {
    /// The codes of its rows, of so many in all, 0 where nothing is seen. Scores are those from its first row on.
    fn write_codes(
        &self,
        level: Level,
        (scores, stride): (&mut [f32], usize),
        words: &mut Words<'_>,
        all: usize,
    ) {
        let Self { rows, vectors, .. } = self;
        let stride_of_codes = words.stride;
        let (codes, mut runs) = words.at_row(rows.start, all);
        self.hide_others(scores, stride);
        self.clear_others(codes, stride_of_codes);
        for run in (0..self.runs.start).chain(self.runs.end..self.per_row) {
            (0..rows.len()).for_each(|row| runs.set(row, run, (f32::NEG_INFINITY, 0.0)));
        }
        if let Some(scores) = self.scores(scores, stride) {
            let (codes, runs) = (&mut codes[vectors.start..], runs.at(0, self.runs.start));
            level.exp_int16(Int16Exp { scores, codes, stride: stride_of_codes, runs });
        }
    }
}

/// The runs of all rows of a tile, and what the softmax keeps of the rows.
struct Settle<'a> {
    running: &'a mut [Running],
    tops: &'a [f32],
    counts: &'a [f32],
    scales: &'a mut [f32],
}

/// Takes in the runs of a tile whose codes are written, and finds what a code of 1 stands for in each:
/// `2^(top - max) / 4096`. A sum is that of the runs in their order, each the exact sum of its codes times that.
pub(super) fn settle(tile: &mut Tile<'_>, running: &mut [Running]) {
    let Probs::Int16(words) = &mut tile.probs else { unreachable!("a tile in int16") };
    let len = running.len() * tile.keys.div_ceil(RUN);
    let (tops, counts, scales) =
        (&words.tops[..len], &words.counts[..len], &mut words.scales[..len]);
    widest!(settle_rows, Settle { running, tops, counts, scales }, Settle<'_> => ());
}

#[inline(always)]
fn settle_rows(job: Settle<'_>) {
    let Settle { running, tops, counts, scales } = job;
    let rows = running.len();
    for (first, running) in (0..rows).step_by(LANES).zip(running.chunks_mut(LANES)) {
        let mut before = [Running::START; LANES];
        before[..running.len()].copy_from_slice(running);
        let old = each_lane(|i| before[i].max);
        let mut max = old;
        for tops in tops.chunks_exact(rows) {
            let tops = lanes(tops, first);
            max = each_lane(|i| if tops[i] > max[i] { tops[i] } else { max[i] });
        }
        let none = f32::NEG_INFINITY;
        // Any finite number makes the scales of a row that has seen nothing 0.
        let from = each_lane(|i| if max[i] == none { 0.0 } else { max[i] });
        // Of a row that has seen nothing there is nothing to rescale.
        let same = each_lane(|i| max[i] == old[i] || old[i] == none);
        let rescale = each_lane(|i| if same[i] { 1.0 } else { exp2(old[i] - from[i]) });
        let mut sums = [0f32; LANES];
        let runs = tops.chunks_exact(rows).zip(counts.chunks_exact(rows));
        for ((tops, counts), scales) in runs.zip(scales.chunks_exact_mut(rows)) {
            let (tops, counts) = (lanes(tops, first), lanes(counts, first));
            let all = each_lane(|i| exp2(tops[i] - from[i]) * SCALE_INT16);
            scales[first..][..running.len()].copy_from_slice(&all[..running.len()]);
            sums = each_lane(|i| sums[i] + counts[i] * all[i]);
        }
        for (i, running) in running.iter_mut().enumerate() {
            let sum = before[i].sum * rescale[i] + sums[i];
            *running = Running { max: max[i], sum, rescale: rescale[i] };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::contracts::Int16Runs;
    use crate::cpu::contracts::softmax::ERROR_INT16;
    use crate::cpu::runnable;

    /// The codes of some scores, and of their runs the tops and the counts.
    fn exp_int16(level: Level, scores: &[f32]) -> (Vec<i16>, Vec<f32>, Vec<f32>) {
        let runs = scores.len().div_ceil(RUN);
        let (mut codes, mut tops, mut counts) =
            (vec![-1; scores.len()], vec![7.0; runs], vec![-1.0; runs]);
        let stride = scores.len();
        let job = Int16Exp {
            scores: Scores { data: scores, rows: 1, len: scores.len(), stride },
            codes: &mut codes,
            stride,
            runs: Int16Runs { tops: &mut tops, counts: &mut counts, stride: 1 },
        };
        level.exp_int16(job);
        for ((top, count), (scores, codes)) in
            tops.iter().zip(&counts).zip(scores.chunks(RUN).zip(codes.chunks(RUN)))
        {
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(*top, largest);
            let nan = scores.iter().any(|x| x.is_nan()) || largest == f32::INFINITY;
            let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
            assert!(if nan { count.is_nan() } else { *count == sum as f32 }, "{count} {sum}");
        }
        (codes, tops, counts)
    }

    #[test]
    fn exp2_in_int16_is_within_its_stated_error_and_the_same_on_every_level() {
        // A score of 0 in every run, so that codes are those of the numbers themselves.
        let mut scores: Vec<f32> = (0..200_000).map(|i| -(i as f32) * 8e-5).collect();
        scores.iter_mut().step_by(RUN).for_each(|x| *x = 0.0);
        let first = exp_int16(runnable()[0], &scores);
        for level in runnable() {
            let found = exp_int16(level, &scores);
            assert!(found == first, "{level:?}");
            for (code, x) in found.0.iter().zip(&scores) {
                let exact = f64::from(*x).exp2() * 4096.0;
                let off = (f64::from(*code) - exact).abs();
                assert!(off <= 0.51 + exact * ERROR_INT16, "{x} {code} {exact}");
            }
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
                let all = runnable().into_iter().map(|level| exp_int16(level, &scores));
                let all: Vec<_> = all.collect();
                for (codes, _, counts) in &all {
                    assert!(codes.iter().all(|code| (0..=4096).contains(code)));
                    let runs = counts.iter().zip(codes.chunks(RUN));
                    for (run, (count, codes)) in runs.enumerate() {
                        let first = &all[0].0[run * RUN..][..codes.len()];
                        assert!(count.is_nan() || codes == first, "{len} {k}");
                    }
                }
                scores[(k * 37) % len] = number;
            }
        }
    }

    /// Rows of whole runs and of parts of one, with something behind each, their codes elsewhere.
    #[test]
    fn int16_of_rows_together_is_that_of_each() {
        let of = |rows| [1usize, 4, 5, 12].map(|vectors| (rows, 16 * vectors));
        for (rows, len) in (1..=19).flat_map(of) {
            let (count, stride, stride_of_codes) = (len.div_ceil(RUN), len + 24, len + 7);
            let some = |i: usize| ((i * 7919) % 1013) as f32 / 60.0 - 12.0;
            let mut data: Vec<f32> = (0..rows * stride).map(some).collect();
            data[rows / 2 * stride] = f32::NAN;
            data[..5].fill(f32::NEG_INFINITY);
            let scores = Scores { data: &data, rows, len, stride };
            for level in runnable() {
                // One row more than there are has a place.
                let mut codes = vec![-1; rows * stride_of_codes];
                let (mut tops, mut counts) =
                    (vec![7.0; (rows + 1) * count], vec![7.0; (rows + 1) * count]);
                let runs = Int16Runs { tops: &mut tops, counts: &mut counts, stride: rows + 1 };
                level.exp_int16(Int16Exp {
                    scores,
                    codes: &mut codes,
                    stride: stride_of_codes,
                    runs,
                });
                for row in 0..rows {
                    let (expected, of_runs, sums) = exp_int16(level, scores.row(row));
                    let found = &codes[row * stride_of_codes..][..stride_of_codes];
                    assert_eq!(found[..len], expected, "{level:?} {row}");
                    assert!(found[len..].iter().all(|&code| code == -1));
                    for (run, (top, sum)) in of_runs.into_iter().zip(sums).enumerate() {
                        let at = run * (rows + 1) + row;
                        assert_eq!(tops[at], top);
                        assert!(counts[at] == sum || (counts[at].is_nan() && sum.is_nan()));
                    }
                }
                let behind = |all: &[f32]| all.chunks(rows + 1).all(|run| run[rows] == 7.0);
                assert!(behind(&tops) && behind(&counts), "{level:?} {rows} {len}");
            }
        }
    }

    /// What the softmax keeps of rows is what [`Running`] does with each by itself.
    #[test]
    fn rows_settled_together_are_those_of_each() {
        for (rows, runs) in [(1, 1), (3, 8), (16, 2), (17, 3), (48, 8)] {
            let some = |i: usize| ((i * 7919) % 1013) as f32 / 60.0 - 12.0;
            let mut tops: Vec<f32> = (0..rows * runs).map(some).collect();
            tops.iter_mut().step_by(7).for_each(|top| *top = f32::NEG_INFINITY);
            let mut counts: Vec<f32> = (0..rows * runs).map(|i| (i * 31 % 4097) as f32).collect();
            (tops[rows / 2], counts[rows / 3]) = (f32::INFINITY, f32::NAN);
            let max =
                |row: usize| if row.is_multiple_of(5) { f32::NEG_INFINITY } else { some(3 * row) };
            let before = |row: usize| Running { max: max(row), sum: row as f32, rescale: 7.0 };
            let mut found: Vec<Running> = (0..rows).map(before).collect();
            let mut scales = vec![7.0; rows * runs];
            let (running, tops, counts) = (&mut found[..], &tops[..], &counts[..]);
            settle_rows(Settle { running, tops, counts, scales: &mut scales });
            for (row, found) in found.into_iter().enumerate() {
                let of_row = |all: &[f32]| all.iter().copied().skip(row).step_by(rows).collect();
                let (tops, counts, scales): (Vec<f32>, Vec<f32>, Vec<f32>) =
                    (of_row(tops), of_row(counts), of_row(&scales));
                let mut expected = before(row);
                let from =
                    expected.advance(tops.iter().copied().fold(f32::NEG_INFINITY, f32::max), &[]);
                let all: Vec<f32> = tops.iter().map(|top| exp2(top - from) * SCALE_INT16).collect();
                let bits = |x: &f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
                let bits = |all: &[f32]| all.iter().map(bits).collect::<Vec<_>>();
                assert_eq!(bits(&scales), bits(&all));
                expected.add(counts.iter().zip(&all).map(|(count, scale)| count * scale).sum());
                let of = |x: Running| bits(&[x.max, x.sum, x.rescale]);
                assert_eq!(of(found), of(expected), "{rows} {runs} {row}");
            }
        }
    }
}
