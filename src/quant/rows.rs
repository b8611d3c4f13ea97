//! The loops over rows of f32 that quantizing is made of: ranges, codes, means.
//!
//! Codes with a scale a row, which every query and key of the default configuration goes through, and dot
//! products are kernels of a level; the others are plain Rust, compiled for its vectors. All levels give
//! the same bits.
//!
//! A call works on a block of rows, because a call for a level costs as much as a short row.

use super::{QuantParams, Scheme, ValueRange};
use crate::cpu::Level;
use crate::cpu::contracts::{BlockCodes, RowRanges, Rows};
use crate::cpu::plain::lanes::{LANES, each_lane, fold_lanes, sum_lanes};
use crate::cpu::plain::rows::{fold_row, max_magnitude, quantize_row as quantize_row_body};
use crate::cpu::plain::widest;

/// What a pass over a row finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowRange {
    /// Smallest and largest element; meaningless unless `finite`.
    pub range: ValueRange,
    /// Whether every element is finite.
    pub finite: bool,
}

/// How each row of a block finds its scale and zero point.
#[derive(Clone, Copy)]
pub(crate) enum RowParams<'a> {
    /// From its own range.
    Own(Scheme),
    /// Given, one a row.
    Given(&'a [QuantParams]),
}

/// Quantizes a block row by row, with the range of each row where it is known.
pub(crate) fn quantize_block(
    level: Level,
    (rows, ranges): (Rows<'_>, Option<&RowRanges>),
    params: RowParams<'_>,
    out: BlockCodes<'_>,
) {
    match params {
        RowParams::Own(scheme) => level.quantize(scheme == Scheme::Affine, rows, ranges, out),
        RowParams::Given(params) => {
            out.check(rows);
            type Arguments<'a> = (Rows<'a>, &'a [QuantParams], BlockCodes<'a>);
            widest!(quantize_given, (rows, params, out), Arguments<'_> => ());
        }
    }
}

/// Smallest and largest element of `row`, and whether all of it is finite.
pub(crate) fn row_range(row: &[f32]) -> RowRange {
    widest!(row_range_body, row, &[f32] => RowRange)
}

#[inline(always)]
fn row_range_body(row: &[f32]) -> RowRange {
    // `x * 0` is 0 for every finite x and NaN otherwise, and a sum keeps NaN.
    let start = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES], [0f32; LANES]);
    let (low, high, poison) = fold_row(row, start, |(low, high, poison), chunk| {
        (
            each_lane(|i| if chunk[i] < low[i] { chunk[i] } else { low[i] }),
            each_lane(|i| if chunk[i] > high[i] { chunk[i] } else { high[i] }),
            each_lane(|i| poison[i] + chunk[i] * 0.0),
        )
    });
    let min = fold_lanes(low, |a, b| if b < a { b } else { a });
    let max = fold_lanes(high, |a, b| if b > a { b } else { a });
    RowRange { range: ValueRange { min, max }, finite: sum_lanes(poison) == 0.0 }
}

#[inline(always)]
fn quantize_given((rows, params, out): (Rows<'_>, &[QuantParams], BlockCodes<'_>)) {
    let codes = out.codes.chunks_exact_mut(rows.depth().max(1));
    for (row, (values, codes)) in rows.iter().zip(codes).enumerate() {
        if max_magnitude(values).1 {
            out.sums[row] = quantize_with(values, params[row], codes);
            out.scales[row] = params[row].scale();
            out.zeros[row] = i32::from(params[row].zero_point());
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
    type Arguments<'a> = (&'a [f32], QuantParams, &'a mut [i8]);
    widest!(quantize_one, (row, params, codes), Arguments<'_> => i32)
}

#[inline(always)]
fn quantize_one((row, params, codes): (&[f32], QuantParams, &mut [i8])) -> i32 {
    quantize_with(row, params, codes)
}

#[inline(always)]
fn quantize_with(row: &[f32], params: QuantParams, codes: &mut [i8]) -> i32 {
    let scheme = params.scheme();
    let scale_zero = (params.scale(), i32::from(params.zero_point()));
    quantize_row_body(row, scale_zero, (scheme.qmin(), scheme.qmax()), codes)
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
    for row in rows.iter().filter(|row| max_magnitude(row).1) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;
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

        /// Rows that overlap, on every level.
        #[test]
        fn levels_agree(
            data in prop::collection::vec(any_finite(), 90),
            depth in 1usize..40,
            affine: bool,
        ) {
            let rows = Rows::new(&data, 6, depth, 10);
            let run = |f: &dyn Fn(BlockCodes<'_>)| {
                let mut codes = vec![1i8; 6 * depth];
                let (mut scales, mut zeros, mut sums) = ([9f32; 6], [9i32; 6], [9i32; 6]);
                f(BlockCodes {
                    codes: &mut codes, scales: &mut scales, zeros: &mut zeros, sums: &mut sums,
                });
                (codes, scales, zeros, sums)
            };
            let scheme = if affine { Scheme::Affine } else { Scheme::Symmetric };
            let own = RowParams::Own(scheme);
            let levels = runnable();
            let on = |level: Level, ranges: Option<&RowRanges>| {
                run(&|out| quantize_block(level, (rows, ranges), own, out))
            };
            let mut ranges = RowRanges::default();
            for row in rows.iter().map(|row| row_range(row).range) {
                ranges.low.push(row.min.min(0.0));
                ranges.high.push(row.max.max(0.0));
            }
            let portable = on(*levels.last().unwrap(), None);
            for level in levels {
                prop_assert_eq!(&on(level, None), &portable, "{:?}", level);
                prop_assert_eq!(&on(level, Some(&ranges)), &portable, "{:?}", level);
            }
            for (i, row) in rows.iter().enumerate() {
                let params = QuantParams::from_range(scheme, row_range(row).range).unwrap();
                let expected: Vec<i8> = row.iter().map(|&x| params.quantize(x)).collect();
                prop_assert_eq!(portable.3[i], expected.iter().map(|&q| i32::from(q)).sum::<i32>());
                prop_assert_eq!(&portable.0[i * depth..(i + 1) * depth], expected);
                prop_assert_eq!(portable.1[i], params.scale());
                prop_assert_eq!(portable.2[i], i32::from(params.zero_point()));
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
            let rows = Rows::contiguous(&values, 19);
            quantize_block(runnable()[0], (rows, None), RowParams::Own(scheme), out);
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
                    assert_eq!(
                        accumulate_finite(
                            &mut vec![0.0; len],
                            Rows::contiguous(&row, len),
                            &mut Vec::new()
                        ),
                        0
                    );
                }
            }
        }
        assert_eq!(row_range(&[]).range, ValueRange::EMPTY);
        assert!(row_range(&[f32::MAX, f32::MIN]).finite);
    }

    #[test]
    fn dots_and_sums() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        let (two, three) = (a.repeat(2), a.repeat(3));
        for level in runnable() {
            let mut out = [0.0; 2];
            level.dots(Rows::contiguous(&two, 37), Rows::one(&a), &mut out);
            assert_eq!(out, [(0..37).map(|i| (i * i) as f32).sum::<f32>(); 2]);
            // Rows that overlap: 0, 1, 2.. and 2, 3, 4..
            level.dots(Rows::new(&a, 2, 20, 2), Rows::one(&[1.0; 20]), &mut out);
            assert_eq!(out, [190.0, 230.0]);
        }
        let mut sums = vec![1.0; 37];
        assert_eq!(accumulate_finite(&mut sums, Rows::contiguous(&three, 37), &mut Vec::new()), 3);
        assert_eq!(sums[36], 3.0 * 36.0 + 1.0);
        let mut sums = vec![0.0; 17];
        assert_eq!(accumulate_finite(&mut sums, Rows::new(&a, 9, 17, 2), &mut Vec::new()), 9);
        let expected: Vec<f64> = (0..17).map(|i| f64::from(9 * i + 72)).collect();
        assert_eq!(sums, expected);
        // Finite numbers whose sum is not.
        let large = [f32::MAX; 34];
        assert_eq!(accumulate_finite(&mut sums, Rows::contiguous(&large, 17), &mut Vec::new()), 2);
        assert!(sums.iter().all(|sum| *sum > f64::from(f32::MAX)));
    }

    proptest! {
        #[test]
        fn dots_have_the_same_bits_on_every_level_and_one_by_one(
            data in prop::collection::vec(-4f32..4.0, 150),
            (count, depth) in (1usize..20, 0usize..40),
            vectors in prop::collection::vec(-2f32..2.0, 400),
            several in 0usize..10,
        ) {
            let rows = Rows::new(&data, count, depth, 4);
            let on = |level: Level, vectors: Rows<'_>| {
                let mut out = vec![7f32; vectors.count() * count];
                level.dots(rows, vectors, &mut out);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let vectors = Rows::new(&vectors, several, depth, 40);
            let levels = runnable();
            let portable = *levels.last().unwrap();
            let one_by_one = vectors.iter().flat_map(|vector| on(portable, Rows::one(vector)));
            let one_by_one: Vec<u32> = one_by_one.collect();
            for level in levels {
                prop_assert_eq!(&on(level, vectors), &one_by_one, "{:?}", level);
            }
        }
    }
}
