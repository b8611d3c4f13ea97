//! The softmax of a row.

use super::lanes::{LANES, each_lane, fold_lanes, sum_lanes};
use crate::cpu::contracts::softmax::{
    DISTANCE, DISTANCE_END, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16,
};
use crate::cpu::contracts::{CODES, F32Exp, Int16Exp, RUN, bf16_bits};

/// The coefficients of `f` to `f^5` in the polynomial for `2^f`: minimax in relative error over
/// [-1/2, 1/2], with a constant term of 1, so that `2^0 = 1`.
#[expect(clippy::approx_constant, reason = "minimax, not Taylor: the first is not ln 2")]
const EXP2: [f32; 5] = [6.931_47e-1, 2.402_224_2e-1, 5.550_733_6e-2, 9.671_513e-3, 1.326_472_7e-3];

#[inline(always)]
pub(crate) fn max(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        max = each_lane(|i| larger(max[i], chunk[i]));
    }
    tail.iter().copied().fold(fold_lanes(max, larger), larger)
}

/// `2^x` for `x <= 0`, relative error below 2e-7; exactly 0 below -126, NaN for NaN.
///
/// `2^x = 2^n * 2^f` with `n` the nearest integer; `2^f` is the polynomial of [`EXP2`].
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
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

#[inline(always)]
pub(crate) fn exp_f32(job: F32Exp<'_>) {
    let F32Exp { scores, len, stride, maxes, sums } = job;
    // Not a closure, which may be compiled for the baseline only.
    for ((row, max), sum) in scores.chunks_mut(stride).zip(maxes).zip(sums) {
        *sum = sum_lanes(exp_lanes(&mut row[..len], *max));
    }
}

/// Replaces the scores of a row, a multiple of 16, by `2^(score - max)`; returns the sums of 16 lanes.
///
/// They go by value, because LLVM stores an accumulator behind a reference in every step.
#[inline(always)]
pub(crate) fn exp_lanes(row: &mut [f32], max: f32) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for chunk in row.as_chunks_mut::<LANES>().0 {
        *chunk = each_lane(|i| exp2(chunk[i] - max));
        sums = each_lane(|i| sums[i] + chunk[i]);
    }
    sums
}

#[inline(always)]
pub(crate) fn exp_bf16(row: &[f32], max: f32, probs: &mut [u16]) -> f32 {
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

#[inline(always)]
pub(crate) fn exp_int8(row: &[f32], max: f32, codes: &mut [u8]) -> f32 {
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

/// [`Softmax::exp_int16`](crate::cpu::contracts::Softmax::exp_int16).
#[inline(always)]
pub(crate) fn exp_int16(job: Int16Exp<'_>) {
    let Int16Exp { scores, codes, stride, mut runs } = job;
    for row in 0..scores.rows {
        let codes = &mut codes[row * stride..][..scores.len];
        let of_runs = scores.row(row).chunks(RUN).zip(codes.chunks_mut(RUN));
        for (run, (scores, codes)) in of_runs.enumerate() {
            let top = max(scores);
            runs.set(row, run, (top, exp_run(scores, top_of_run(top), codes)));
        }
    }
}

/// Writes the codes of a run; returns their sum, or NaN.
#[inline(always)]
fn exp_run(scores: &[f32], top: f32, codes: &mut [i16]) -> f32 {
    let (mut counts, mut last) = ([0i32; LANES], [0u32; LANES]);
    let outs = codes.as_chunks_mut::<LANES>().0.iter_mut();
    for (scores, codes) in scores.as_chunks::<LANES>().0.iter().zip(outs) {
        let distances = each_lane(|i| distance(scores[i], top));
        last = each_lane(|i| last[i].max(distances[i]));
        *codes = each_lane(|i| code_of_distance(distances[i] as u16));
        counts = each_lane(|i| counts[i] + i32::from(codes[i]));
    }
    let nan = last.iter().any(|&distance| distance > DISTANCE_END);
    if nan { f32::NAN } else { counts.iter().sum::<i32>() as f32 }
}

/// Any finite number makes the codes of a run that sees nothing 0, without the NaN of `-inf - (-inf)`.
#[inline(always)]
pub(crate) fn top_of_run(top: f32) -> f32 {
    if top == f32::NEG_INFINITY { 0.0 } else { top }
}

/// The bits of a score's distance from the largest; beyond those of every distance for NaN.
#[inline(always)]
fn distance(score: f32, top: f32) -> u32 {
    let distance = top - score;
    let distance = if FARTHEST < distance { FARTHEST } else { distance };
    (distance + DISTANCE).to_bits()
}

#[inline(always)]
fn code_of_distance(distance: u16) -> i16 {
    /// The upper half of a product, rounded.
    #[inline(always)]
    fn multiply(a: i16, b: i16) -> i16 {
        ((i32::from(a) * i32::from(b) + 0x4000) >> 15) as i16
    }
    let f = (distance << (15 - FRACTION) & 0x7fff) as i16;
    let [c0, c1, c2, c3] = EXP2_INT16;
    let q = c0 - multiply(f, c1 - multiply(f, c2 - multiply(f, c3)));
    multiply(q, TOP_INT16 >> (distance >> FRACTION & 15))
}

/// The last elements of a row, filled up with scores whose probability is 0.
#[inline(always)]
pub(crate) fn padded(tail: &[f32]) -> [f32; LANES] {
    let mut chunk = [f32::NEG_INFINITY; LANES];
    chunk[..tail.len()].copy_from_slice(tail);
    chunk
}

#[cfg(test)]
mod tests {
    use super::exp2;

    #[test]
    fn exact_where_it_can_be() {
        assert_eq!(exp2(0.0), 1.0);
        assert_eq!(exp2(-1.0), 0.5);
        assert_eq!(exp2(-126.5), 0.0);
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert!(exp2(f32::NAN).is_nan());
    }
}
