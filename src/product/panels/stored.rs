//! Rows times a matrix as it is stored: `[R, K] x [K, C] -> [R, C]`.
//!
//! A decode step reads every value once and waits for memory, so values stay as small as they are
//! stored and are widened in registers, once for up to six rows of probabilities.

use super::rounded::Int16Rows;
use crate::cpu::Level;
use crate::cpu::contracts::{LANES, Panel, Stored};

/// A matrix where it lies: rows of whole vectors, the same number of bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct StoredMatrix<'a> {
    form: Stored,
    bytes: &'a [u8],
    rows: usize,
    vectors: usize,
    stride: usize,
}

impl<'a> StoredMatrix<'a> {
    /// `rows` rows of `columns` numbers, a multiple of 16, from one to the next `stride` bytes.
    ///
    /// # Panics
    /// Unless they are inside of `bytes`.
    pub(crate) fn new(
        form: Stored,
        bytes: &'a [u8],
        (rows, columns): (usize, usize),
        stride: usize,
    ) -> Self {
        assert!(columns.is_multiple_of(LANES), "{columns} columns, expected whole vectors");
        let before = rows.checked_sub(1).map_or(Some(0), |before| before.checked_mul(stride));
        let width = if rows == 0 { 0 } else { columns * form.size() };
        let needed = before.and_then(|before| before.checked_add(width));
        assert!(needed.is_some_and(|needed| bytes.len() >= needed));
        Self { form, bytes, rows, vectors: columns / LANES, stride }
    }

    /// The same in f32: `stride` numbers from one row to the next.
    pub(crate) fn of_f32(
        numbers: &'a [f32],
        (rows, columns): (usize, usize),
        stride: usize,
    ) -> Self {
        // SAFETY: the same memory, read as bytes.
        let bytes = unsafe {
            std::slice::from_raw_parts(numbers.as_ptr().cast::<u8>(), size_of_val(numbers))
        };
        Self::new(Stored::F32, bytes, (rows, columns), stride.checked_mul(4).expect("in memory"))
    }

    /// `sums[r, c] += sum_j lhs[r, j] * matrix[j, c]`, `sums` row-major with as many columns as the
    /// matrix; rows of `lhs` are `stride` apart.
    ///
    /// # Panics
    /// Unless there is a number of `lhs` for every row of the matrix, in every row of sums; and for int8.
    pub(crate) fn accumulate(&self, level: Level, lhs: &[f32], stride: usize, sums: &mut [f32]) {
        assert_ne!(self.form, Stored::Int8);
        let Some(panel) = self.panel(sums) else { return };
        let needed = (panel.rows - 1) * stride + self.rows;
        assert!(stride >= self.rows && lhs.len() >= needed);
        let lhs_stride = stride * size_of::<f32>();
        let panel = Panel { lhs: lhs.as_ptr().cast(), lhs_stride, ..panel };
        // SAFETY: `new` checked that all rows of the matrix are there, `panel` the sums, and the left side was
        // just asserted.
        unsafe { level.multiply_stored(self.form, panel) };
    }

    /// The same for int8, whose left side is rounded to 16 bits: run by run, each sum exact until it is scaled.
    ///
    /// # Panics
    /// Unless there is a number of `lhs` for every row of the matrix, in every row of sums; and for another form.
    pub(crate) fn accumulate_int16(&self, level: Level, lhs: &Int16Rows, sums: &mut [f32]) {
        assert_eq!(self.form, Stored::Int8);
        let Some(panel) = self.panel(sums) else { return };
        assert_eq!((lhs.count(), lhs.depth()), (panel.rows, self.rows));
        let (codes, stride) = lhs.codes();
        let panel = Panel {
            lhs: codes.as_ptr().cast(),
            lhs_stride: stride * size_of::<i16>(),
            row_scales: lhs.scales().as_ptr(),
            row_scales_stride: lhs.runs(),
            row_scales_step: 1,
            ..panel
        };
        // SAFETY: `new` checked that all rows of the matrix are there, `panel` the sums; rows of the left side
        // are whole groups, with a scale for every run.
        unsafe { level.multiply_stored(self.form, panel) };
    }

    /// What is the same for every left side; `None` where there is nothing to multiply.
    ///
    /// # Panics
    /// Unless the sums are whole rows.
    fn panel(&self, sums: &mut [f32]) -> Option<Panel> {
        let width = self.vectors * LANES;
        if width == 0 || sums.is_empty() || self.rows == 0 {
            return None;
        }
        let rows = sums.len() / width;
        assert_eq!(sums.len(), rows * width);
        let sums = sums.as_mut_ptr();
        Some(Panel {
            rows,
            vectors: self.vectors,
            groups: self.rows,
            lhs: std::ptr::null(),
            lhs_stride: 0,
            matrix: self.bytes.as_ptr(),
            matrix_stride: self.stride,
            runs: std::ptr::null(),
            runs_stride: 0,
            row_scales: std::ptr::null(),
            row_scales_stride: 0,
            row_scales_step: 0,
            column_scales: std::ptr::null(),
            column_scales_stride: 0,
            sums,
            sums_stride: width,
            start: sums,
            start_stride: width,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::contracts::{RUN, Rows};
    use crate::cpu::runnable;
    use proptest::prelude::*;
    use proptest::test_runner::{RngAlgorithm, TestRng};

    /// Every level against the definition, to the bit; codes of their whole range, in rows that lie apart.
    fn check(rows: usize, keys: usize, vectors: usize, seed: [u8; 32]) {
        let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let (width, stride) = (vectors * LANES, vectors * LANES + 48);
        let lhs: Vec<f32> = (0..rows * keys).map(|_| rng.random_range(-1f32..1.0)).collect();
        let codes: Vec<i8> = (0..keys * stride).map(|_| rng.random::<i8>()).collect();
        let start: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-9f32..9.0)).collect();
        let mut rounded = Int16Rows::default();
        rounded.put(Rows::new(&lhs, rows, keys, keys));
        let (left, left_stride) = rounded.codes();
        let mut expected = start.clone();
        for (at, sum) in expected.iter_mut().enumerate() {
            let (row, column) = (at / width, at % width);
            for run in 0..rounded.runs() {
                let product = |key: usize| {
                    let (left, code) =
                        (left[row * left_stride + key], codes[key * stride + column]);
                    i32::from(left) * i32::from(code)
                };
                let exact: i32 = (run * RUN..keys.min((run + 1) * RUN)).map(product).sum();
                *sum += exact as f32 * rounded.scales()[row * rounded.runs() + run];
            }
        }
        let bytes: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
        let matrix = StoredMatrix::new(Stored::Int8, &bytes, (keys, width), stride);
        for level in runnable() {
            let mut sums = start.clone();
            matrix.accumulate_int16(level, &rounded, &mut sums);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&sums), bits(&expected), "{level:?} {rows} {keys} {width}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn int8_is_the_definition_on_every_level(
            rows in 1usize..14, keys in 1usize..300, vectors in 1usize..10, seed: [u8; 32],
        ) {
            check(rows, keys, vectors, seed);
        }
    }

    /// The largest integers on both sides, for whole runs.
    #[test]
    fn no_sum_overflows() {
        let mut rounded = Int16Rows::default();
        rounded.put(Rows::one(&[1.0; 2 * RUN]));
        let bytes = [i8::MIN as u8; 2 * RUN * LANES];
        let matrix = StoredMatrix::new(Stored::Int8, &bytes, (2 * RUN, LANES), LANES);
        for level in runnable() {
            let mut sums = [0f32; LANES];
            matrix.accumulate_int16(level, &rounded, &mut sums);
            assert_eq!(sums, [-128.0 * 2.0 * RUN as f32; LANES], "{level:?}");
        }
    }
}
