//! Plain Rust: `pulp` compiles each body for the baseline, for AVX2 and for AVX-512 (NEON is part
//! of the Arm baseline), and LLVM vectorizes it.

use super::{BlockCodes, RowParams, RowRange, Rows};
use crate::quant::{QuantParams, Scheme, ValueRange};
use crate::simd::{LANES, each_lane, fold_lanes, sum_lanes, widest};

/// Smallest and largest element of `row`, and whether all of it is finite.
pub(crate) fn row_range(row: &[f32]) -> RowRange {
    widest!(row_range_body, row, &[f32] => RowRange)
}

#[inline(always)]
fn row_range_body(row: &[f32]) -> RowRange {
    // `x * 0` is 0 for every finite x and NaN otherwise, and a sum keeps NaN.
    let start = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0f32; LANES]);
    let (low, high, poison) = lanes(row, start, |(low, high, poison), chunk| {
        (
            each_lane(|i| if chunk[i] < low[i] { chunk[i] } else { low[i] }),
            each_lane(|i| if chunk[i] > high[i] { chunk[i] } else { high[i] }),
            each_lane(|i| poison[i] + chunk[i] * 0.0),
        )
    });
    let min = fold_lanes(low, |a, b| if b < a { b } else { a });
    let max = fold_lanes(high, larger);
    RowRange { range: ValueRange { min, max }, finite: sum_lanes(poison) == 0.0 }
}

/// The largest magnitude of `row`, and whether all of it is finite.
#[inline(always)]
fn max_abs_body(row: &[f32]) -> (f32, bool) {
    let start = ([0f32; LANES], [0f32; LANES]);
    let (max, poison) = lanes(row, start, |(max, poison), chunk| {
        let abs = each_lane(|i| chunk[i].abs());
        (
            each_lane(|i| if abs[i] > max[i] { abs[i] } else { max[i] }),
            each_lane(|i| poison[i] + chunk[i] * 0.0),
        )
    });
    (fold_lanes(max, larger), sum_lanes(poison) == 0.0)
}

/// Folds a row 16 elements at a time; what is missing in the last 16 repeats its last element,
/// which changes neither a range nor whether all is finite. By value, because LLVM stores an
/// accumulator behind a reference in every step.
#[inline(always)]
fn lanes<A>(row: &[f32], start: A, step: impl Fn(A, [f32; LANES]) -> A) -> A {
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

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// [`super::quantize_block`]; the lengths are checked there.
pub(super) fn quantize_block(
    rows: Rows<'_>,
    offset: Option<&[f32]>,
    params: RowParams<'_>,
    out: BlockCodes<'_>,
) {
    widest!(
        quantize_block_body,
        (rows, offset, params, out),
        (Rows<'_>, Option<&[f32]>, RowParams<'_>, BlockCodes<'_>) => ()
    );
}

#[inline(always)]
fn quantize_block_body(
    (rows, offset, params, out): (Rows<'_>, Option<&[f32]>, RowParams<'_>, BlockCodes<'_>),
) {
    let codes = out.codes.chunks_exact_mut(rows.depth().max(1));
    let mut smoothed = vec![0.0; if offset.is_some() { rows.depth() } else { 0 }];
    for (row, (values, codes)) in rows.iter().zip(codes).enumerate() {
        let values = match offset {
            Some(offset) => {
                let from = values.iter().zip(offset);
                smoothed.iter_mut().zip(from).for_each(|(to, (x, o))| *to = x - o);
                smoothed.as_slice()
            }
            None => values,
        };
        let (finite, params) = match params {
            RowParams::Own(Scheme::Symmetric) => {
                let (max, finite) = max_abs_body(values);
                let range = ValueRange { min: -max, max };
                (finite, QuantParams::from_finite_range(Scheme::Symmetric, range))
            }
            RowParams::Own(scheme) => {
                let found = row_range_body(values);
                (found.finite, QuantParams::from_finite_range(scheme, found.range))
            }
            RowParams::Given(params) => (max_abs_body(values).1, params[row]),
        };
        if finite {
            out.sums[row] = quantize_row_body((values, params, codes));
            out.scales[row] = params.scale();
            out.zeros[row] = i32::from(params.zero_point());
        } else {
            codes.fill(0);
            (out.sums[row], out.scales[row], out.zeros[row]) = (0, f32::NAN, 0);
        }
    }
}

/// `clamp(round(x / scale) + zero_point)` for a row of finite numbers; returns the sum of the
/// codes. Infinities saturate; NaN gives an unspecified code.
pub(crate) fn quantize_row(row: &[f32], params: QuantParams, codes: &mut [i8]) -> i32 {
    assert_eq!(row.len(), codes.len());
    widest!(quantize_row_body, (row, params, codes), (&[f32], QuantParams, &mut [i8]) => i32)
}

/// `1.5 * 2^23`: adding it to a number below `2^22` rounds that to an integer, ties to even, and
/// leaves the integer in the low mantissa bits. SSE2 has no rounding instruction; this is as fast
/// everywhere.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn quantize_row_body((row, params, codes): (&[f32], QuantParams, &mut [i8])) -> i32 {
    let zero = i32::from(params.zero_point());
    let low = (i32::from(params.scheme().qmin()) - zero) as f32;
    let high = (i32::from(params.scheme().qmax()) - zero) as f32;
    let bias = zero - ROUND.to_bits() as i32;
    let scale = params.scale();
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

/// Adds the finite rows of a block to the f64 sums of their columns; returns how many they are.
/// `block` is memory for the sums of this block.
pub(crate) fn accumulate_finite(sums: &mut [f64], rows: Rows<'_>, block: &mut Vec<f32>) -> usize {
    assert_eq!(sums.len(), rows.depth());
    block.clear();
    block.resize(sums.len(), 0.0);
    type Arguments<'a> = (&'a mut [f64], Rows<'a>, &'a mut [f32]);
    widest!(accumulate_finite_body, (sums, rows, block.as_mut_slice()), Arguments<'_> => usize)
}

/// Sums of a block are in f32, which is enough: smoothing is exact whatever it subtracts.
#[inline(always)]
fn accumulate_finite_body((sums, rows, block): (&mut [f64], Rows<'_>, &mut [f32])) -> usize {
    let mut at = 0;
    // Sums stay in registers, which LLVM manages with 4 of them and not with 8.
    while at + 4 * LANES <= block.len() {
        at = sum_columns::<4>(rows, at, block);
    }
    if at + 2 * LANES <= block.len() {
        at = sum_columns::<2>(rows, at, block);
    }
    if at + LANES <= block.len() {
        at = sum_columns::<1>(rows, at, block);
    }
    let rest = &mut block[at..];
    for row in rows.iter() {
        rest.iter_mut().zip(&row[at..]).for_each(|(sum, x)| *sum += x);
    }
    // A sum is finite only if all its elements are; finite ones may overflow, which is found out.
    if block.iter().all(|sum| sum.is_finite()) {
        sums.iter_mut().zip(block).for_each(|(sum, x)| *sum += f64::from(*x));
        return rows.count();
    }
    let mut finite = 0;
    for row in rows.iter().filter(|row| max_abs_body(row).1) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        finite += 1;
    }
    finite
}

/// Writes the sums of `16 * N` columns from `at` on; returns where they end.
#[inline(always)]
fn sum_columns<const N: usize>(rows: Rows<'_>, at: usize, out: &mut [f32]) -> usize {
    let end = at + N * LANES;
    let mut sums = [[0f32; LANES]; N];
    for row in rows.iter() {
        let chunks = row[at..end].as_chunks::<LANES>().0;
        for (sums, chunk) in sums.iter_mut().zip(chunks) {
            *sums = each_lane(|i| sums[i] + chunk[i]);
        }
    }
    out[at..end].copy_from_slice(sums.as_flattened());
    end
}

/// [`super::dots`]; the lengths are checked there.
pub(super) fn dots(rows: Rows<'_>, offset: Option<&[f32]>, vector: &[f32], out: &mut [f32]) {
    match offset {
        Some(offset) => widest!(
            smooth_dots_body,
            (rows, offset, vector, out),
            (Rows<'_>, &[f32], &[f32], &mut [f32]) => ()
        ),
        None => widest!(dots_body, (rows, vector, out), (Rows<'_>, &[f32], &mut [f32]) => ()),
    }
}

#[inline(always)]
fn dots_body((rows, vector, out): (Rows<'_>, &[f32], &mut [f32])) {
    for (row, out) in rows.iter().zip(out) {
        *out = dot_body(row, vector);
    }
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        sums = each_lane(|i| sums[i] + x[i] * y[i]);
    }
    let tail: f32 = a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum();
    sum_lanes(sums) + tail
}

#[inline(always)]
fn smooth_dots_body((rows, offset, vector, out): (Rows<'_>, &[f32], &[f32], &mut [f32])) {
    let ((offsets, offset_tail), (vectors, vector_tail)) =
        (offset.as_chunks::<LANES>(), vector.as_chunks::<LANES>());
    for (row, out) in rows.iter().zip(out) {
        let (chunks, row_tail) = row.as_chunks::<LANES>();
        let mut sums = [0f32; LANES];
        for ((x, o), y) in chunks.iter().zip(offsets).zip(vectors) {
            sums = each_lane(|i| sums[i] + (x[i] - o[i]) * y[i]);
        }
        let tails = row_tail.iter().zip(offset_tail).zip(vector_tail);
        let tail: f32 = tails.map(|((x, o), y)| (x - o) * y).sum();
        *out = sum_lanes(sums) + tail;
    }
}
