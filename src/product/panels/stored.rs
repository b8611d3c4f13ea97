//! Rows of f32 times a matrix as it is stored: `[R, K] x [K, C] -> [R, C]`.
//!
//! A decode step reads every value once and waits for memory, so values stay as small as they are
//! stored and are widened in registers, once for up to six rows of probabilities.

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
    /// Unless there is a number of `lhs` for every row of the matrix, in every row of sums.
    pub(crate) fn accumulate(&self, level: Level, lhs: &[f32], stride: usize, sums: &mut [f32]) {
        let width = self.vectors * LANES;
        if width == 0 || sums.is_empty() || self.rows == 0 {
            return;
        }
        let rows = sums.len() / width;
        assert_eq!(sums.len(), rows * width);
        assert!(stride >= self.rows && lhs.len() >= (rows - 1) * stride + self.rows);
        let sums = sums.as_mut_ptr();
        let panel = Panel {
            rows,
            vectors: self.vectors,
            groups: self.rows,
            lhs: lhs.as_ptr().cast(),
            lhs_stride: stride * size_of::<f32>(),
            matrix: self.bytes.as_ptr(),
            matrix_stride: self.stride,
            runs: std::ptr::null(),
            runs_stride: 0,
            row_scales: std::ptr::null(),
            row_scales_stride: 0,
            column_scales: std::ptr::null(),
            column_scales_stride: 0,
            sums,
            sums_stride: width,
            start: sums,
            start_stride: width,
        };
        // SAFETY: `new` checked that all rows of the matrix are there, and the rest was just asserted.
        unsafe { level.multiply_stored(self.form, panel) };
    }
}
