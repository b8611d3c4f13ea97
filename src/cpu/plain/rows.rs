//! Codes, dot products and columns of rows.

use super::lanes::{LANES, each_lane, lanes as lanes_or_zeros, sum_lanes};
use super::rotate::rotate;
use crate::cpu::contracts::{BlockCodes, Condition, RowRanges, Rows, Transpose};

/// The largest magnitude of `row`, NaN if it holds one, and whether all of it is finite.
///
/// As integers, whose largest LLVM finds in whole vectors: in numbers, with lanes that are folded at the end, it moved
/// the lanes of every vector to where that end wants them.
#[inline(always)]
pub(crate) fn max_magnitude(row: &[f32]) -> (f32, bool) {
    // Without signs, bits have the order of their numbers, and those of infinity and NaN are above all others.
    let bits = row.iter().fold(0, |largest: u32, x| largest.max(x.abs().to_bits()));
    (f32::from_bits(bits), bits < f32::INFINITY.to_bits())
}

/// Folds a row 16 elements at a time; what is missing in the last 16 repeats its last element,
/// which changes neither a range nor whether all is finite. By value, because LLVM stores an
/// accumulator behind a reference in every step.
#[inline(always)]
pub(crate) fn fold_row<A>(row: &[f32], start: A, step: impl Fn(A, [f32; LANES]) -> A) -> A {
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut folded = start;
    for chunk in chunks {
        folded = step(folded, *chunk);
    }
    if let Some(&last) = tail.last() {
        let mut chunk = [last; LANES];
        chunk[..tail.len()].copy_from_slice(tail);
        folded = step(folded, chunk);
    }
    folded
}

/// A range as [`RowRanges`] has it, of a row.
#[inline(always)]
fn range_of(row: &[f32]) -> (f32, f32) {
    let start = ([SIGN; LANES], [0i32; LANES]);
    let (low, high) = fold_row(row, start, |(low, high), chunk| {
        let bits = each_lane(|i| chunk[i].to_bits());
        (each_lane(|i| low[i].max(bits[i])), each_lane(|i| high[i].max(bits[i] as i32)))
    });
    let low = low.into_iter().fold(SIGN, u32::max);
    let high = high.into_iter().fold(0, i32::max);
    (f32::from_bits(low), f32::from_bits(high as u32))
}

/// The bits of -0.
const SIGN: u32 = 1 << 31;

/// The scale of symmetric codes for magnitudes up to `max`: never 0, never subnormal.
#[inline(always)]
pub(crate) fn symmetric_scale(max: f32) -> f32 {
    if max == 0.0 { 1.0 } else { (max / 127.0).max(f32::MIN_POSITIVE) }
}

/// Scale and zero point of affine codes for numbers from `low` to `high`, which hold 0.
#[inline(always)]
pub(crate) fn affine_params(low: f32, high: f32) -> (f32, i32) {
    let width = high - low;
    if width == 0.0 {
        return (1.0, 0);
    }
    let step = if width.is_finite() { width / 255.0 } else { high / 255.0 - low / 255.0 };
    let scale = step.max(f32::MIN_POSITIVE);
    // At most 255, because the range holds 0.
    (scale, (-low / scale).round_ties_even() as i32 - 128)
}

/// `1.5 * 2^23`: adding it to a number below `2^22` rounds that to an integer, ties to even, and
/// leaves the integer in the low mantissa bits. SSE2 has no rounding instruction; this is as fast
/// everywhere.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Multiplying by a reciprocal takes a quarter to a half of the time of dividing. Its roundings of a number up to 255
/// are off by at most `255 * 2^-23 = 3e-5`, which only this near a tie can give another code.
#[cfg(target_arch = "x86_64")]
pub(crate) const NEAR: f32 = 1e-4;

/// `clamp(round(x / scale) + zero, qmin, qmax)` for a row of finite numbers, ties to even; returns the
/// sum of the codes. Infinities saturate; NaN gives an unspecified code.
#[inline(always)]
pub(crate) fn quantize_row(
    row: &[f32],
    (scale, zero): (f32, i32),
    (qmin, qmax): (i8, i8),
    codes: &mut [i8],
) -> i32 {
    let low = (i32::from(qmin) - zero) as f32;
    let high = (i32::from(qmax) - zero) as f32;
    let bias = zero - ROUND.to_bits() as i32;
    let mut sum = 0i32;
    for (code, &x) in codes.iter_mut().zip(row) {
        // Clamping first is the same, as the bounds are integers. Multiplying by 1 / scale would
        // save little (the division hides behind the rest) and round differently at ties.
        let steps = x / scale;
        let steps = if steps > low { steps } else { low };
        let steps = if steps < high { steps } else { high };
        let q = ((steps + ROUND).to_bits() as i32).wrapping_add(bias);
        *code = q as i8;
        sum = sum.wrapping_add(q);
    }
    sum
}

/// [`RowKernels::quantize`](crate::cpu::contracts::RowKernels::quantize).
#[inline(always)]
pub(crate) fn quantize(
    affine: bool,
    rows: Rows<'_>,
    ranges: Option<&RowRanges>,
    out: BlockCodes<'_>,
) {
    quantize_by(affine, rows, ranges, out, |row, params, limits, codes| {
        quantize_row(row, params, limits, codes)
    });
}

/// The same with another [`quantize_row`].
#[inline(always)]
pub(crate) fn quantize_by(
    affine: bool,
    rows: Rows<'_>,
    ranges: Option<&RowRanges>,
    out: BlockCodes<'_>,
    quantize_row: impl Fn(&[f32], (f32, i32), (i8, i8), &mut [i8]) -> i32,
) {
    let codes = out.codes.chunks_exact_mut(rows.depth().max(1));
    for (row, (values, codes)) in rows.iter().zip(codes).enumerate() {
        let (low, high) = match ranges {
            None => range_of(values),
            Some(ranges) => (ranges.low[row], ranges.high[row]),
        };
        if !(low.is_finite() && high.is_finite()) {
            codes.fill(0);
            (out.scales[row], out.zeros[row], out.sums[row]) = (f32::NAN, 0, 0);
            continue;
        }
        let (params, limits) = match affine {
            true => (affine_params(low, high), (-128, 127)),
            false => ((symmetric_scale(high.max(-low)), 0), (-127, 127)),
        };
        (out.scales[row], out.zeros[row]) = params;
        out.sums[row] = quantize_row(values, params, limits, codes);
    }
}

/// [`RowKernels::condition`](crate::cpu::contracts::RowKernels::condition).
#[inline(always)]
pub(crate) fn condition(job: Condition<'_>) {
    let depth = job.rows.depth();
    let values = job.values.chunks_exact_mut(depth);
    for (index, (row, values)) in job.rows.iter().zip(values).enumerate() {
        match job.mean {
            None => values.copy_from_slice(row),
            Some(mean) => {
                for ((out, x), mean) in values.iter_mut().zip(row).zip(mean) {
                    *out = x - mean;
                }
            }
        }
        if job.rotate {
            rotate(depth, values);
        }
        (job.ranges.low[index], job.ranges.high[index]) = range_of(values);
    }
}

/// [`RowKernels::dots`](crate::cpu::contracts::RowKernels::dots).
#[inline(always)]
pub(crate) fn dots(rows: Rows<'_>, vectors: Rows<'_>, out: &mut [f32]) {
    for (vector, out) in vectors.iter().zip(out.chunks_exact_mut(rows.count().max(1))) {
        for (row, out) in rows.iter().zip(out) {
            let mut sums = [0f32; LANES];
            for at in (0..row.len()).step_by(LANES) {
                let (x, y) = (lanes_or_zeros(row, at), lanes_or_zeros(vector, at));
                sums = each_lane(|i| x[i] * y[i] + sums[i]);
            }
            *out = sum_lanes(sums);
        }
    }
}

#[inline(always)]
pub(crate) fn transpose(job: Transpose<'_>) {
    let Transpose { rows, factor, columns, width } = job;
    for first in (0..rows.count()).step_by(LANES) {
        let mut sixteen = [&rows.data()[..0]; LANES];
        for (i, row) in sixteen.iter_mut().enumerate() {
            *row = rows.row((first + i).min(rows.count() - 1));
        }
        for (k, column) in columns.chunks_mut(width).take(rows.depth()).enumerate() {
            for (place, row) in column[first..].iter_mut().zip(&sixteen) {
                *place = (row[k] * factor).to_ne_bytes();
            }
        }
    }
}
