//! The softmax over a tile whose probabilities become int16.

use super::part::Part;
use super::tile::{Probs, Running, Tile};
use crate::cpu::Level;
use crate::cpu::contracts::{Int16Exp, LANES, RUN};
use crate::cpu::plain::softmax::scales_of_runs;
use crate::cpu::plain::widest;
use std::ops::Range;

/// A tile in int16: runs that hold a key which is seen, whole, and zeros in the others. Scores around those
/// that are seen become minus infinity. The largest of all runs come first: reading them right after they
/// were written takes as long as a short row.
pub(super) fn int16_tile(level: Level, tile: &mut Tile<'_>, running: &mut [Running]) {
    let per_row = tile.keys.div_ceil(RUN).max(1);
    let Tile { scores, stride, keys, visible, probs, .. } = tile;
    let Probs::Int16 { codes, tops, scales } = probs else { unreachable!("a tile in int16") };
    let (stride, runs) = (*stride, running.len() * per_row);
    let (tops, scales) = (&mut tops[..runs], &mut scales[..runs]);
    for part in Part::all(visible, *keys, RUN) {
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
    for part in Part::all(visible, *keys, RUN) {
        let runs = part.rows.start * per_row..part.rows.end * per_row;
        let at = part.rows.start * stride;
        let runs = (&tops[runs.clone()], &scales[runs]);
        let mut sums = [0.0; LANES];
        part.write_codes(level, &scores[at..], (&mut codes[at..], stride), runs, &mut sums);
        let running = running[part.rows].iter_mut();
        running.zip(sums).for_each(|(running, sum)| running.add(sum));
    }
}

impl Part {
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
        self.clear_others(codes, stride);
        if let Some(scores) = self.scores(scores, stride) {
            let (codes, sums) = (&mut codes[vectors.start..], &mut sums[..rows.len()]);
            let (tops, scales) = (&tops[self.seen()], &scales[self.seen()]);
            level.exp_int16(Int16Exp { scores, codes, tops, scales, sums });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::contracts::Scores;
    use crate::cpu::contracts::softmax::ERROR_INT16;
    use crate::cpu::runnable;

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
}
