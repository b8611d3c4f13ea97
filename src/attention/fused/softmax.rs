//! The softmax over a tile of keys, with running maximum and sum (Milakov and Gimelshein 2018,
//! arXiv:1805.02867), in base 2: scores come multiplied by `log2(e)`.

use crate::pv::{Int8Row, KEY_GROUP, bf16_bits};
use crate::simd::{LANES, each_lane, fold_lanes, sum_lanes, widest};
use std::ops::Range;

/// What the softmax of one query has seen so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    /// The largest score.
    pub max: f32,
    /// The sum of `2^(score - max)`.
    pub sum: f32,
    /// What the sums of values so far must be multiplied by after this tile.
    pub rescale: f32,
}

impl Running {
    pub(super) const START: Running = Running { max: f32::NEG_INFINITY, sum: 0.0, rescale: 1.0 };
}

/// Where the probabilities of a tile go: row-major, rows `stride` elements apart.
pub(super) enum Probs<'a> {
    /// In the place of the scores.
    F32,
    /// Rounded to bf16.
    Bf16(&'a mut [u16]),
    /// Rounded to 1/255 of the row's largest in the tile.
    Int8 {
        codes: &'a mut [u8],
        /// What the codes of each row stand for.
        rows: &'a mut [Int8Row],
    },
}

/// Scores of some queries against a tile of keys.
pub(super) struct Tile<'a> {
    /// Row-major, rows `stride` elements apart.
    pub scores: &'a mut [f32],
    pub stride: usize,
    /// Keys in the tile; probabilities are written for these, and zeros up to whole groups.
    pub keys: usize,
    /// The keys of the tile that each query sees.
    pub visible: &'a [Range<usize>],
    pub probs: Probs<'a>,
}

/// Turns scores into probabilities (not yet divided by their sum), row by row. What a query does
/// not see becomes 0. A NaN score makes the sum of its row NaN.
pub(super) fn softmax_tile(tile: Tile<'_>, running: &mut [Running]) {
    widest!(softmax_tile_body, (tile, running), (Tile<'_>, &mut [Running]) => ());
}

#[inline(always)]
fn softmax_tile_body((mut tile, running): (Tile<'_>, &mut [Running])) {
    let padded = tile.keys.next_multiple_of(KEY_GROUP);
    for (row, running) in running.iter_mut().enumerate() {
        let Range { start, end } = tile.visible[row].clone();
        let scores = &mut tile.scores[row * tile.stride..][..padded];
        let old = running.max;
        let tile_max = max_body(&scores[start..end]);
        let max = if tile_max > old { tile_max } else { old };
        let nothing_seen = max == f32::NEG_INFINITY;
        if nothing_seen && scores[start..end].iter().any(|x| x.is_nan()) {
            running.sum = f32::NAN;
        }
        // Any finite maximum gives zeros for minus infinity, without the NaN of -inf - (-inf).
        let max_or_zero = if nothing_seen { 0.0 } else { max };
        running.rescale = if max == old { 1.0 } else { exp2(old - max_or_zero) };
        running.max = max;
        let sum = match &mut tile.probs {
            Probs::F32 => {
                scores[..start].fill(0.0);
                scores[end..].fill(0.0);
                exp_f32_body(&mut scores[start..end], max_or_zero)
            }
            Probs::Bf16(probs) => {
                let probs = &mut probs[row * tile.stride..][..padded];
                probs[..start].fill(0);
                probs[end..].fill(0);
                exp_bf16_body(&scores[start..end], max_or_zero, &mut probs[start..end])
            }
            Probs::Int8 { codes, rows } => {
                let codes = &mut codes[row * tile.stride..][..padded];
                codes[..start].fill(0);
                codes[end..].fill(0);
                // The tile's own maximum gives all of its codes a use.
                let (top, scale) = match tile_max == f32::NEG_INFINITY {
                    true => (0.0, 0.0),
                    false => (tile_max, exp2(tile_max - max) / CODES),
                };
                let sum = exp_int8_body(&scores[start..end], top, &mut codes[start..end]);
                rows[row] = Int8Row { scale, codes: sum as u32 };
                sum * scale
            }
        };
        running.sum = running.sum * running.rescale + sum;
    }
}

/// The largest element; NaN does not count.
#[inline(always)]
fn max_body(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        max = each_lane(|i| larger(max[i], chunk[i]));
    }
    tail.iter().copied().fold(fold_lanes(max, larger), larger)
}

/// The coefficients of `f` to `f^5` in the polynomial for `2^f`.
#[expect(clippy::approx_constant, reason = "minimax, not Taylor: the first is not ln 2")]
const EXP2: [f32; 5] = [6.931_47e-1, 2.402_224_2e-1, 5.550_733_6e-2, 9.671_513e-3, 1.326_472_7e-3];

/// `2^x` for `x <= 0`, relative error below 2e-7; exactly 0 below -126, NaN for NaN.
///
/// `2^x = 2^n * 2^f` with `n` the nearest integer: `2^f` is a polynomial of degree 5, minimax in
/// relative error over [-1/2, 1/2] with a constant term of 1, so that `2^0 = 1`.
#[inline(always)]
pub(super) fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    let clamped = if x < -126.0 { -126.0 } else { x };
    let rounded = clamped + ROUND;
    let f = clamped - (rounded - ROUND);
    let [c1, c2, c3, c4, c5] = EXP2;
    let p = ((((c5 * f + c4) * f + c3) * f + c2) * f + c1) * f + 1.0;
    // The integer is in the low mantissa bits of `rounded`; as an exponent it is a power of two.
    let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -126.0 { 0.0 } else { p * power }
}

/// Replaces scores by `2^(score - max)`; returns their sum.
///
/// Sums go by value, because LLVM stores an accumulator behind a reference in every step.
#[inline(always)]
fn exp_f32_body(row: &mut [f32], max: f32) -> f32 {
    let (chunks, tail) = row.as_chunks_mut::<LANES>();
    let mut sums = [0f32; LANES];
    for chunk in chunks {
        *chunk = each_lane(|i| exp2(chunk[i] - max));
        sums = each_lane(|i| sums[i] + chunk[i]);
    }
    let rest = padded(tail);
    let mut rest = each_lane(|i| exp2(rest[i] - max));
    sums = each_lane(|i| sums[i] + rest[i]);
    tail.swap_with_slice(&mut rest[..tail.len()]);
    sum_lanes(sums)
}

/// Writes `2^(score - max)` rounded to bf16; returns the sum of the rounded ones, so that the
/// probabilities sum to 1 after the division.
#[inline(always)]
fn exp_bf16_body(row: &[f32], max: f32, probs: &mut [u16]) -> f32 {
    let ((chunks, tail), (outs, out_tail)) =
        (row.as_chunks::<LANES>(), probs.as_chunks_mut::<LANES>());
    let mut sums = [0f32; LANES];
    for (chunk, out) in chunks.iter().zip(outs) {
        *out = each_lane(|i| bf16_bits(exp2(chunk[i] - max)));
        sums = each_lane(|i| sums[i] + f32::from_bits(u32::from(out[i]) << 16));
    }
    let rest = padded(tail);
    let rest = each_lane(|i| bf16_bits(exp2(rest[i] - max)));
    sums = each_lane(|i| sums[i] + f32::from_bits(u32::from(rest[i]) << 16));
    out_tail.copy_from_slice(&rest[..out_tail.len()]);
    sum_lanes(sums)
}

/// The code of a probability as large as the largest.
const CODES: f32 = 255.0;

/// Writes `2^(score - max)` as codes; returns their sum, so that the probabilities sum to 1 after
/// the division. The sum is exact up to 65,793 keys.
#[inline(always)]
fn exp_int8_body(row: &[f32], max: f32, codes: &mut [u8]) -> f32 {
    const ROUND: f32 = 8_388_608.0; // 2^23: the integer is in the low bits of the sum.
    let ((chunks, tail), (outs, out_tail)) =
        (row.as_chunks::<LANES>(), codes.as_chunks_mut::<LANES>());
    let mut sums = [0f32; LANES];
    for (chunk, out) in chunks.iter().zip(outs) {
        let rounded = each_lane(|i| exp2(chunk[i] - max) * CODES + ROUND);
        *out = each_lane(|i| rounded[i].to_bits() as u8);
        sums = each_lane(|i| sums[i] + (rounded[i] - ROUND));
    }
    let rest = padded(tail);
    let rounded = each_lane(|i| exp2(rest[i] - max) * CODES + ROUND);
    sums = each_lane(|i| sums[i] + (rounded[i] - ROUND));
    let rest = each_lane(|i| rounded[i].to_bits() as u8);
    out_tail.copy_from_slice(&rest[..out_tail.len()]);
    sum_lanes(sums)
}

/// The last elements of a row, filled up with scores whose probability is 0.
#[inline(always)]
fn padded(tail: &[f32]) -> [f32; LANES] {
    let mut chunk = [f32::NEG_INFINITY; LANES];
    chunk[..tail.len()].copy_from_slice(tail);
    chunk
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pv::ValueFormat;

    const FORMATS: [ValueFormat; 3] = [ValueFormat::F32, ValueFormat::Bf16, ValueFormat::Int8];

    #[test]
    fn exp2_is_within_its_stated_error() {
        let mut worst = 0f64;
        for i in 0..=1_260_000 {
            let x = -(i as f32) * 1e-4;
            let (found, exact) = (f64::from(exp2(x)), f64::exp2(f64::from(x)));
            worst = worst.max((found / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-1.0), 0.5);
        assert_eq!(exp2(-126.5), 0.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }

    /// Scores through tiles of some size, as one row of probabilities that sum to 1.
    fn softmax(
        scores: &[f32],
        visible: Range<usize>,
        tile: usize,
        format: ValueFormat,
    ) -> Vec<f32> {
        let mut running = [Running::START];
        let mut all: Vec<f32> = Vec::new();
        for (index, keys) in scores.chunks(tile).enumerate() {
            let start = index * tile;
            let clamp = |x: usize| x.clamp(start, start + keys.len()) - start;
            let mut buffer = keys.to_vec();
            buffer.resize(keys.len().next_multiple_of(KEY_GROUP), 123.0);
            let stride = buffer.len();
            let (mut halves, mut codes) = (vec![0x7fc0u16; stride], vec![77u8; stride]);
            let mut rows = [Int8Row::default()];
            let probs = match format {
                ValueFormat::F32 => Probs::F32,
                ValueFormat::Bf16 => Probs::Bf16(&mut halves),
                ValueFormat::Int8 => Probs::Int8 { codes: &mut codes, rows: &mut rows },
            };
            let inside = clamp(visible.start)..clamp(visible.end);
            let (scores, visible) = (&mut buffer, std::slice::from_ref(&inside));
            let job = Tile { scores, stride, keys: keys.len(), visible, probs };
            softmax_tile(job, &mut running);
            all.iter_mut().for_each(|p| *p *= running[0].rescale);
            let half = |&h: &u16| f32::from_bits(u32::from(h) << 16);
            let written: Vec<f32> = match format {
                ValueFormat::F32 => buffer,
                ValueFormat::Bf16 => halves.iter().map(half).collect(),
                ValueFormat::Int8 => {
                    let sum: u32 = codes.iter().map(|&code| u32::from(code)).sum();
                    assert!(running[0].sum.is_nan() || rows[0].codes == sum, "{sum} {rows:?}");
                    codes.iter().map(|&code| f32::from(code) * rows[0].scale).collect()
                }
            };
            assert!(written[keys.len()..].iter().all(|&p| p == 0.0), "zeros fill the last group");
            all.extend(&written[..keys.len()]);
        }
        all.iter().map(|p| p / running[0].sum).collect()
    }

    #[test]
    fn tiles_and_ranges_give_the_softmax() {
        let scores: Vec<f32> = (0..77).map(|i| ((i * 37) % 61) as f32 / 3.0 - 10.0).collect();
        for visible in [0..77, 0..1, 5..70, 33..34, 76..77] {
            let seen = |i: usize| visible.contains(&i);
            let term = |i: usize| if seen(i) { f64::from(scores[i]).exp2() } else { 0.0 };
            let sum: f64 = (0..77).map(term).sum();
            let largest = (0..77).map(term).fold(0.0, f64::max) / sum;
            for tile in [77, 100, 1, 2, 16, 17, 32] {
                for format in FORMATS {
                    let found = softmax(&scores, visible.clone(), tile, format);
                    for (i, p) in found.iter().enumerate() {
                        let exact = term(i) / sum;
                        let off = (f64::from(*p) - exact).abs();
                        let bound = match format {
                            ValueFormat::F32 => 1e-6 * exact,
                            ValueFormat::Bf16 => 0.004 * exact,
                            // Half a code, in this one and in each that the sum is made of. The
                            // largest probability bounds what a code stands for.
                            ValueFormat::Int8 => {
                                0.51 / 255.0 * largest * (1.0 + exact * visible.len() as f64)
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
        for format in FORMATS {
            let masked = softmax(&[-inf, 1.0, -inf, 1.0], 0..4, 2, format);
            assert_eq!(masked, [0.0, 0.5, 0.0, 0.5]);
            // Nothing to see: 0 / 0, which the caller turns into zeros by the sum.
            assert!(softmax(&[-inf; 3], 0..3, 2, format).iter().all(|p| p.is_nan()));
            for scores in [[f32::NAN, 1.0, 2.0], [f32::NAN, -inf, -inf], [-inf, -inf, f32::NAN]] {
                for tile in [1, 3] {
                    assert!(softmax(&scores, 0..3, tile, format).iter().any(|p| p.is_nan()));
                }
            }
            let unseen = softmax(&[f32::NAN, 1.0, 1.0, f32::NAN], 1..3, 4, format);
            assert_eq!(unseen, [0.0, 0.5, 0.5, 0.0]);
        }
    }
}
