//! The softmax over a tile of keys, with running maximum and sum (Milakov and Gimelshein 2018,
//! arXiv:1805.02867), in base 2: scores come multiplied by `log2(e)`.

use super::int16_tile::{settle, write_codes};
use super::part::Part;
use super::tile::{Probs, Running, Tile};
use crate::cpu::Level;
use crate::cpu::contracts::{CODES, F32Exp, GROUP, Int8Run, LANES, RUN};
use crate::cpu::plain::softmax::exp2;
use std::ops::Range;

/// Turns scores into probabilities (not yet divided by their sum). What a query does not see becomes 0. A
/// NaN score makes the sum of its row NaN.
///
/// In f32 and int16 there is room in a row of scores and of codes for a multiple of [`LANES`], and in f32 for as many
/// scores more.
pub(super) fn softmax_tile(level: Level, tile: &mut Tile<'_>, running: &mut [Running]) {
    match tile.probs {
        Probs::F32 { .. } => return f32_tile(level, tile, running),
        Probs::Int16(_) => {
            write_codes(level, tile);
            return settle(tile, running);
        }
        Probs::Bf16(_) | Probs::Int8 { .. } => {}
    }
    let padded = tile.keys.next_multiple_of(GROUP);
    for (row, running) in running.iter_mut().enumerate() {
        let Range { start, end } = tile.visible[row].clone();
        let scores = &mut tile.scores[row * tile.stride..][..tile.stride];
        let max = running.advance(level.max(&scores[start..end]), &scores[start..end]);
        let sum = match &mut tile.probs {
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
            Probs::F32 { .. } | Probs::Int16(_) => unreachable!("a tile of its own"),
        };
        running.add(sum);
    }
}

/// A tile in f32: the largest of each row, then the exponentials of some rows at once. Their sum has the same bits
/// wherever the keys lie in the tile.
fn f32_tile(level: Level, tile: &mut Tile<'_>, running: &mut [Running]) {
    let Tile { scores, stride, keys, visible, probs, .. } = tile;
    let Probs::F32 { maxes } = probs else { unreachable!("a tile in f32") };
    let stride = *stride;
    for (row, (running, max)) in running.iter_mut().zip(&mut **maxes).enumerate() {
        let seen = &scores[row * stride..][visible[row].clone()];
        *max = running.advance(level.max(seen), seen);
    }
    for part in Part::all(visible, *keys, (LANES, 1)) {
        let scores = &mut scores[part.rows.start * stride..];
        part.hide_others(scores, stride);
        part.clear_others(scores, stride);
        let mut sums = [0.0; LANES];
        if !part.vectors.is_empty() {
            let (len, sums) = (part.vectors.len(), &mut sums[..part.rows.len()]);
            let (scores, maxes) = (&mut scores[part.vectors.start..], &maxes[part.rows.clone()]);
            level.exp_f32(F32Exp { scores, len, stride, maxes, sums });
        }
        running[part.rows].iter_mut().zip(sums).for_each(|(running, sum)| running.add(sum));
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

#[cfg(test)]
mod tests {
    use super::super::tile::Words;
    use super::*;
    use crate::cpu::contracts::Format;
    use crate::cpu::contracts::softmax::{ERROR_BF16, ERROR_F32, ERROR_INT16};
    use crate::cpu::plain::lanes::sum_lanes;
    use crate::cpu::runnable;

    /// Those that a level multiplies.
    fn formats(level: Level) -> impl Iterator<Item = Format> {
        let all = [Format::F32, Format::Bf16, Format::Int8, Format::Int16];
        all.into_iter().filter(move |&format| level.panels(format).is_some())
    }

    /// Replaces scores, 16 or a multiple of them, by `2^(score - max)`; returns their sum.
    fn exp_f32(level: Level, scores: &mut [f32], max: f32) -> f32 {
        let (len, mut sums) = (scores.len(), [f32::NAN]);
        level.exp_f32(F32Exp { scores, len, stride: len, maxes: &[max], sums: &mut sums });
        sums[0]
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
        let xs: Vec<f32> = (0..1_250_000).map(|i| -(i as f32) * 1e-4).collect();
        for level in runnable() {
            let (mut f32s, mut bf16s) = (xs.clone(), vec![0; xs.len()]);
            exp_f32(level, &mut f32s, 0.0);
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

    #[test]
    fn exp2_of_special_numbers() {
        let inf = f32::INFINITY;
        for level in runnable() {
            for len in 1..70 {
                let mut scores = vec![-inf; len];
                assert_eq!(level.max(&scores), -inf);
                scores.fill(0.0);
                scores[len / 2] = f32::NAN;
                assert_eq!(level.max(&scores), if len == 1 { -inf } else { 0.0 });
                let with_bf16 = level.panels(Format::Bf16).is_some();
                assert!(!with_bf16 || level.exp_bf16(&scores, 0.0, &mut vec![0; len]).is_nan());
                let below = vec![-2e30; len];
                assert_eq!(level.max(&below), -2e30);
                if with_bf16 {
                    assert_eq!(level.exp_bf16(&below, 0.0, &mut vec![1; len]), 0.0);
                }
            }
        }
    }

    #[test]
    fn exp2_in_f32_of_rows_together_is_that_of_each() {
        let special = [f32::NEG_INFINITY, f32::NAN, -2e30, 0.0];
        for (rows, vectors) in (1..=16).flat_map(|rows| [1, 2, 5].map(|vectors| (rows, vectors))) {
            let (len, stride) = (16 * vectors, 16 * vectors + 24);
            let some = |i: usize| ((i * 7919) % 1013) as f32 / -60.0;
            let mut data: Vec<f32> = (0..rows * stride).map(some).collect();
            data[..4].copy_from_slice(&special);
            data[(rows - 1) * stride..][..len].fill(f32::NEG_INFINITY);
            let maxes: Vec<f32> = (0..rows).map(|row| row as f32 / 7.0).collect();
            let mut expected = data.clone();
            let each = expected.chunks_mut(stride).zip(&maxes);
            let each = each.map(|(row, max)| {
                row[..len].iter_mut().for_each(|x| *x = exp2(*x - max));
                let lanes = std::array::from_fn(|i| row[i..len].iter().step_by(LANES).sum());
                sum_lanes(lanes)
            });
            let each: Vec<f32> = each.collect();
            for level in runnable() {
                let (mut found, mut sums) = (data.clone(), vec![7.0; rows]);
                let (scores, maxes, sums_of) = (&mut found, &maxes, &mut sums);
                level.exp_f32(F32Exp { scores, len, stride, maxes, sums: sums_of });
                let bits = |all: &[f32]| all.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let same =
                    |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                assert!(found.iter().zip(&expected).all(|(a, b)| same(*a, *b)), "{level:?}");
                assert_eq!(bits(&sums[1..]), bits(&each[1..]), "{level:?} {rows} {len}");
                assert!(same(sums[0], each[0]));
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
            buffer.resize(keys.len().next_multiple_of(LANES) + LANES, 123.0);
            let stride = buffer.len();
            let (mut halves, mut codes) = (vec![0x7fc0u16; stride], vec![77u8; stride]);
            let (mut words, mut scales) = (vec![77; stride], vec![7.0; keys.len().div_ceil(RUN)]);
            let (mut tops, mut counts, mut maxes) = (scales.clone(), scales.clone(), [7.0]);
            let mut runs = vec![Int8Run::default(); keys.len().div_ceil(RUN)];
            let probs = match format {
                Format::F32 => Probs::F32 { maxes: &mut maxes },
                Format::Bf16 => Probs::Bf16(&mut halves),
                Format::Int8 => Probs::Int8 { codes: &mut codes, runs: &mut runs },
                Format::Int16 => {
                    let (codes, tops, counts) = (&mut words, &mut tops, &mut counts);
                    Probs::Int16(Words { codes, stride, tops, counts, scales: &mut scales })
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
