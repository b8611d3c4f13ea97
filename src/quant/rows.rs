//! The loops over rows of f32, compiled once for every vector width and chosen at run time.
//!
//! They are plain Rust: `pulp` compiles each body for the baseline, for AVX2 and for AVX-512
//! (NEON is part of the Arm baseline), and LLVM vectorizes it. Every width gives the same bits:
//! sums have a fixed order, and nothing is fused.
//!
//! A call works on a block of rows, because finding out the width costs as much as a short row.

use super::{QuantParams, Range, Scheme};
use crate::simd::{LANES, each_lane, fold_lanes, sum_lanes, widest};

/// What a pass over a row finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowRange {
    /// Smallest and largest element; meaningless unless `finite`.
    pub range: Range,
    /// Whether every element is finite.
    pub finite: bool,
}

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
    RowRange { range: Range { min, max }, finite: sum_lanes(poison) == 0.0 }
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

/// How each row of a block finds its scale and zero point.
pub(crate) enum RowParams<'a> {
    /// From its own range.
    Own(Scheme),
    /// Given, one a row.
    Given(&'a [QuantParams]),
}

/// Codes of a block of rows.
pub(crate) struct BlockCodes<'a> {
    /// `[rows, depth]`.
    pub codes: &'a mut [i8],
    /// One a row. NaN for a row that holds NaN or infinity; its codes are 0.
    pub scales: &'a mut [f32],
    /// One a row.
    pub zeros: &'a mut [i32],
    /// The sum of the codes of each row.
    pub sums: &'a mut [i32],
}

/// Quantizes `[rows, depth]` values, `depth` at least 1, row by row.
pub(crate) fn quantize_block(
    values: &[f32],
    depth: usize,
    params: RowParams<'_>,
    out: BlockCodes<'_>,
) {
    assert_eq!(values.len(), out.codes.len());
    widest!(
        quantize_block_body,
        (values, depth, params, out),
        (&[f32], usize, RowParams<'_>, BlockCodes<'_>) => ()
    );
}

#[inline(always)]
fn quantize_block_body(
    (values, depth, params, out): (&[f32], usize, RowParams<'_>, BlockCodes<'_>),
) {
    let rows = values.chunks_exact(depth).zip(out.codes.chunks_exact_mut(depth));
    for (row, (values, codes)) in rows.enumerate() {
        let (finite, params) = match params {
            RowParams::Own(Scheme::Symmetric) => {
                let (max, finite) = max_abs_body(values);
                let range = Range { min: -max, max };
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

/// `out = rows - offset` for every row of a `[rows, offset.len()]` block.
pub(crate) fn subtract(rows: &[f32], offset: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), out.len());
    widest!(subtract_body, (rows, offset, out), (&[f32], &[f32], &mut [f32]) => ());
}

#[inline(always)]
fn subtract_body((rows, offset, out): (&[f32], &[f32], &mut [f32])) {
    let width = offset.len().max(1);
    for (row, out) in rows.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        for ((out, x), o) in out.iter_mut().zip(row).zip(offset) {
            *out = x - o;
        }
    }
}

/// Adds the finite rows of a `[rows, sums.len()]` block to the f64 sums of their columns; returns
/// how many they are.
pub(crate) fn accumulate_finite(sums: &mut [f64], rows: &[f32]) -> usize {
    widest!(accumulate_finite_body, (sums, rows), (&mut [f64], &[f32]) => usize)
}

#[inline(always)]
fn add_row(sums: &mut [f64], row: &[f32]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += f64::from(x);
    }
}

#[inline(always)]
fn accumulate_finite_body((sums, rows): (&mut [f64], &[f32])) -> usize {
    let width = sums.len().max(1);
    // Sums of finite f32 cannot overflow f64: if they are finite, so were all rows.
    let mut all = sums.to_vec();
    for row in rows.chunks_exact(width) {
        add_row(&mut all, row);
    }
    if all.iter().all(|sum| sum.is_finite()) {
        sums.copy_from_slice(&all);
        return rows.len() / width;
    }
    let mut finite = 0;
    for row in rows.chunks_exact(width) {
        if max_abs_body(row).1 {
            add_row(sums, row);
            finite += 1;
        }
    }
    finite
}

/// The dot product of `vector` with every row of a `[out.len(), vector.len()]` block, in f32, 16
/// partial sums wide.
pub(crate) fn dots(rows: &[f32], vector: &[f32], out: &mut [f32]) {
    widest!(dots_body, (rows, vector, out), (&[f32], &[f32], &mut [f32]) => ());
}

#[inline(always)]
fn dots_body((rows, vector, out): (&[f32], &[f32], &mut [f32])) {
    for (row, out) in rows.chunks_exact(vector.len().max(1)).zip(out) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_finite() -> impl Strategy<Value = f32> {
        prop_oneof![
            prop::num::f32::NORMAL | prop::num::f32::ZERO | prop::num::f32::SUBNORMAL,
            -4f32..4.0,
            (-600i32..600).prop_map(|ties| ties as f32 / 2.0),
        ]
    }

    proptest! {
        #[test]
        fn row_functions_equal_the_scalar_definition(
            row in prop::collection::vec(any_finite(), 0..100),
            scale in prop_oneof![Just(1f32), Just(0.5), 1e-3f32..10.0],
            zero_point in -128i32..128,
        ) {
            let found = row_range(&row);
            prop_assert!(found.finite);
            prop_assert_eq!(found.range.min, row.iter().copied().fold(f32::INFINITY, f32::min));
            prop_assert_eq!(found.range.max, row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            for params in
                [QuantParams::affine(scale, zero_point).unwrap(), QuantParams::symmetric(scale).unwrap()]
            {
                let mut codes = vec![0x55; row.len()];
                let sum = quantize_row(&row, params, &mut codes);
                let expected: Vec<i8> = row.iter().map(|&x| params.quantize(x)).collect();
                prop_assert_eq!(sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>());
                prop_assert_eq!(codes, expected);
            }
        }

        #[test]
        fn a_block_equals_its_rows(
            rows in prop::collection::vec(prop::collection::vec(any_finite(), 19), 0..5),
            bad in prop::option::of(0usize..95),
            affine: bool,
        ) {
            let mut values = rows.concat();
            if let Some(x) = bad.and_then(|at| values.get_mut(at)) {
                *x = f32::NAN;
            }
            let scheme = if affine { Scheme::Affine } else { Scheme::Symmetric };
            let n = rows.len();
            let (mut codes, mut scales) = (vec![1i8; n * 19], vec![0f32; n]);
            let (mut zeros, mut sums) = (vec![9i32; n], vec![9i32; n]);
            let out = BlockCodes {
                codes: &mut codes, scales: &mut scales, zeros: &mut zeros, sums: &mut sums,
            };
            quantize_block(&values, 19, RowParams::Own(scheme), out);
            for (i, row) in values.chunks_exact(19).enumerate() {
                if row.iter().any(|x| x.is_nan()) {
                    prop_assert!(scales[i].is_nan() && zeros[i] == 0 && sums[i] == 0);
                    continue;
                }
                let params = QuantParams::from_range(scheme, row_range(row).range).unwrap();
                let expected: Vec<i8> = row.iter().map(|&x| params.quantize(x)).collect();
                prop_assert_eq!(&codes[i * 19..(i + 1) * 19], expected);
                prop_assert_eq!(scales[i], params.scale());
                prop_assert_eq!(zeros[i], i32::from(params.zero_point()));
            }
        }
    }

    #[test]
    fn one_bad_element_anywhere_is_seen() {
        for len in [1, 15, 16, 17, 40] {
            for at in 0..len {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = vec![1.0; len];
                    row[at] = bad;
                    assert!(!row_range(&row).finite, "{bad} at {at} of {len}");
                    assert_eq!(accumulate_finite(&mut vec![0.0; len], &row), 0);
                }
            }
        }
        assert_eq!(row_range(&[]).range, Range::EMPTY);
        assert!(row_range(&[f32::MAX, f32::MIN]).finite);
    }

    #[test]
    fn dots_sums_and_differences() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let mut out = [0.0; 2];
        dots(&a.repeat(2), &a, &mut out);
        assert_eq!(out, [(0..37).map(|i| (i * i) as f32).sum::<f32>(); 2]);
        let mut sums = vec![1.0; 37];
        assert_eq!(accumulate_finite(&mut sums, &a.repeat(3)), 3);
        assert_eq!(sums[36], 3.0 * 36.0 + 1.0);
        let mut rows = vec![1.0; 74];
        subtract(&a.repeat(2), &a, &mut rows);
        assert_eq!(rows, vec![0.0; 74]);
    }
}
