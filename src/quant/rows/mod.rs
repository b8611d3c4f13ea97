//! The loops over rows of f32: ranges, codes, means, dot products.
//!
//! `portable` holds them all in plain Rust, compiled for every vector width and chosen at run
//! time; `avx512` holds those that every query and key goes through, written with that set's
//! instructions. All of them give the same codes and scales; dot products differ by rounding.
//!
//! A call works on a block of rows, because finding out the width costs as much as a short row.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::{QuantParams, Scheme, ValueRange};

pub(crate) use portable::{accumulate_finite, quantize_row, row_range};

/// Some rows of `depth` f32 each, the same distance apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    depth: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// `count` rows, `stride` elements from one start to the next; 0 repeats one row.
    pub(crate) fn new(data: &'a [f32], count: usize, depth: usize, stride: usize) -> Self {
        assert!(count == 0 || data.len() >= (count - 1) * stride + depth);
        Self { data, count, depth, stride }
    }

    /// Rows that follow each other, `depth` at least 1.
    pub(crate) fn contiguous(data: &'a [f32], depth: usize) -> Self {
        assert!(depth > 0 && data.len().is_multiple_of(depth));
        Self::new(data, data.len() / depth, depth, depth)
    }

    /// How many rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// All rows as one slice: where they lie if they follow each other, else copied to `buffer`.
    pub(crate) fn as_slice<'b>(self, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if self.stride == self.depth || self.count <= 1 {
            return &self.data[..self.count * self.depth];
        }
        buffer.clear();
        self.iter().for_each(|row| buffer.extend_from_slice(row));
        buffer
    }

    /// The rows, first to last.
    #[inline(always)]
    pub(crate) fn iter(self) -> impl Iterator<Item = &'a [f32]> {
        (0..self.count).map(move |row| self.row(row))
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.depth]
    }
}

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

/// Quantizes a block row by row, after subtracting `offset` from each row if there is one.
pub(crate) fn quantize_block(
    rows: Rows<'_>,
    offset: Option<&[f32]>,
    params: RowParams<'_>,
    out: BlockCodes<'_>,
) {
    let count = rows.count();
    assert_eq!(out.codes.len(), count * rows.depth());
    assert!([out.scales.len(), out.zeros.len(), out.sums.len()].iter().all(|&len| len == count));
    assert!(offset.is_none_or(|offset| offset.len() == rows.depth()));
    #[cfg(target_arch = "x86_64")]
    if matches!(params, RowParams::Own(Scheme::Symmetric)) && avx512::is_available() {
        return avx512::quantize_symmetric(rows, offset, out);
    }
    portable::quantize_block(rows, offset, params, out);
}

/// The dot product of `vector` with every row, less `offset` if there is one, in f32, in
/// partial sums.
pub(crate) fn dots(rows: Rows<'_>, offset: Option<&[f32]>, vector: &[f32], out: &mut [f32]) {
    assert_eq!(rows.depth(), vector.len());
    assert_eq!(rows.count(), out.len());
    assert!(offset.is_none_or(|offset| offset.len() == vector.len()));
    #[cfg(target_arch = "x86_64")]
    if avx512::is_available() {
        return avx512::dots(rows, offset, vector, out);
    }
    portable::dots(rows, offset, vector, out);
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

        /// Rows that overlap, less an offset, in every implementation.
        #[test]
        fn implementations_agree(
            data in prop::collection::vec(any_finite(), 90),
            depth in 1usize..40,
            offset in prop::option::of(prop::collection::vec(-2f32..2.0, 40)),
        ) {
            let rows = Rows::new(&data, 6, depth, 10);
            let offset = offset.as_ref().map(|offset| &offset[..depth]);
            let run = |f: &dyn Fn(BlockCodes<'_>)| {
                let mut codes = vec![1i8; 6 * depth];
                let (mut scales, mut zeros, mut sums) = ([9f32; 6], [9i32; 6], [9i32; 6]);
                f(BlockCodes {
                    codes: &mut codes, scales: &mut scales, zeros: &mut zeros, sums: &mut sums,
                });
                (codes, scales, zeros, sums)
            };
            let symmetric = RowParams::Own(Scheme::Symmetric);
            let dispatched = run(&|out| quantize_block(rows, offset, symmetric, out));
            let portable = run(&|out| portable::quantize_block(rows, offset, symmetric, out));
            prop_assert_eq!(&dispatched, &portable);
            for (i, row) in rows.iter().enumerate() {
                let smoothed = row.iter().enumerate().map(|(d, x)| x - offset.map_or(0.0, |o| o[d]));
                let smoothed: Vec<f32> = smoothed.collect();
                let range = row_range(&smoothed).range;
                let params = QuantParams::from_range(Scheme::Symmetric, range).unwrap();
                let expected: Vec<i8> = smoothed.iter().map(|&x| params.quantize(x)).collect();
                prop_assert_eq!(&portable.0[i * depth..(i + 1) * depth], expected);
                prop_assert_eq!(portable.1[i], params.scale());
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
            quantize_block(Rows::contiguous(&values, 19), None, RowParams::Own(scheme), out);
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
        let mut out = [0.0; 2];
        let (two, three) = (a.repeat(2), a.repeat(3));
        dots(Rows::contiguous(&two, 37), None, &a, &mut out);
        assert_eq!(out, [(0..37).map(|i| (i * i) as f32).sum::<f32>(); 2]);
        // Rows that overlap, less an offset: 0, 1, 2.. minus 1, and 2, 3, 4.. minus 1.
        dots(Rows::new(&a, 2, 20, 2), Some(&[1.0; 20]), &[1.0; 20], &mut out);
        assert_eq!(out, [170.0, 210.0]);
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
}
