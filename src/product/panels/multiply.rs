//! The products with a packed matrix: a panel after the other, each by the kernel of its level.

use super::pack::PackedMatrix;
use super::rounded::Int16Rows;
use crate::cpu::contracts::{Format, GROUP, Int8Run, LANES, Panel, PanelProduct, RUN};
use std::mem::MaybeUninit;
use std::ops::Range;

/// What sums start from.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Zeros.
    Zero,
    /// The same numbers for all rows, padded to whole vectors.
    Row(&'a [f32]),
}

impl PackedMatrix {
    /// `out[r, c] += sum_j lhs[r, j] * matrix[j, c]` for `j` in `rows`, `out` row-major with
    /// [`PackedMatrix::width`] columns; `lhs[r * stride]` belongs to the first of `rows`.
    ///
    /// `rows` starts at a multiple of [`GROUP`]. Each row of `lhs` is filled up with zeros to
    /// another one.
    pub(crate) fn accumulate_f32(
        &self,
        rows: Range<usize>,
        lhs: &[f32],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.product.format, Format::F32);
        self.accumulate(rows, lhs, stride, out);
    }

    /// [`PackedMatrix::accumulate_f32`] for bf16.
    pub(crate) fn accumulate_bf16(
        &self,
        rows: Range<usize>,
        lhs: &[u16],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.product.format, Format::Bf16);
        self.accumulate(rows, lhs, stride, out);
    }

    /// [`PackedMatrix::accumulate_f32`] for int8 codes; `runs` says what they stand for: [`RUN`]
    /// elements each, all runs of a row before those of the next. `rows` starts at a multiple of [`RUN`].
    pub(crate) fn accumulate_int8(
        &self,
        rows: Range<usize>,
        lhs: &[u8],
        stride: usize,
        runs: &[Int8Run],
        out: &mut [f32],
    ) {
        assert_eq!(self.product.format, Format::Int8);
        self.accumulate_runs(rows, (lhs, stride), (runs, &[]), out);
    }

    /// [`PackedMatrix::accumulate_int8`] for int16; `scales` says what a 1 on the left side stands for, in a run of all
    /// rows before those of the next.
    pub(crate) fn accumulate_int16(
        &self,
        rows: Range<usize>,
        lhs: &[i16],
        stride: usize,
        scales: &[f32],
        out: &mut [f32],
    ) {
        assert_eq!(self.product.format, Format::Int16);
        self.accumulate_runs(rows, (lhs, stride), (&[], scales), out);
    }

    /// Every panel of an integer format: of what the left side stands for, that of the format is there.
    fn accumulate_runs<T>(
        &self,
        rows: Range<usize>,
        (lhs, stride): (&[T], usize),
        (runs, scales): (&[Int8Run], &[f32]),
        out: &mut [f32],
    ) {
        let width = self.width();
        if out.is_empty() || rows.is_empty() {
            return;
        }
        let (count, per_row) = (out.len() / width, rows.len().div_ceil(RUN));
        assert!(rows.start.is_multiple_of(RUN) && out.len() == count * width);
        assert_eq!(count * per_row, runs.len() + scales.len(), "{per_row} scales in each row");
        let known = self.run_scales.as_ref().expect("integers");
        for panel in self.panels() {
            let of_columns = known.from(rows.start / RUN, panel.start);
            assert!(of_columns.len() >= (per_row - 1) * known.stride() + panel.len());
            let sums = out[panel.start..].as_mut_ptr();
            let job = Panel {
                row_scales: scales.as_ptr(),
                row_scales_stride: 1,
                row_scales_step: count,
                column_scales: of_columns.as_ptr(),
                column_scales_stride: known.stride(),
                sums,
                sums_stride: width,
                start: sums,
                start_stride: width,
                ..self.job(&panel, &rows, (lhs, stride, count), runs)
            };
            // SAFETY: `job` checked the left side and the matrix, and in int8 its runs; the panel's columns
            // are in every row of sums and of scales, as just asserted. `put` bounds the integers of the
            // matrix; the caller those of the left side.
            unsafe { self.level.multiply(self.product.format, job) };
        }
    }

    /// Every panel of a float format.
    fn accumulate<T>(&self, rows: Range<usize>, lhs: &[T], stride: usize, out: &mut [f32]) {
        let width = self.width();
        if out.is_empty() {
            return;
        }
        let count = out.len() / width;
        assert_eq!(out.len(), count * width);
        for panel in self.panels() {
            let sums = out[panel.start..].as_mut_ptr();
            let job = Panel {
                sums,
                sums_stride: width,
                start: sums,
                start_stride: width,
                ..self.job(&panel, &rows, (lhs, stride, count), &[])
            };
            // SAFETY: `job` checked the left side and the matrix; the panel's columns are in every row of
            // sums, whose width is that of all panels.
            unsafe { self.level.multiply(self.product.format, job) };
        }
    }

    /// `out[r, c - columns.start] = start[r, c - columns.start] + sum_k lhs[r, k] * matrix[k, c]` over the
    /// whole depth in f32, for `rows` rows of `lhs` and of `out` and the vectors of `columns`, whose
    /// start is a multiple of [`PackedMatrix::panel_width`]; the matrix was put in columns. What follows the last column in its vector
    /// is overwritten.
    ///
    /// # Panics
    /// Where there is no room for that, or the format is another.
    pub(crate) fn multiply(
        &self,
        columns: Range<usize>,
        (lhs, stride, rows): (&[f32], usize, usize),
        start: Start<'_>,
        (out, out_stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        assert!(self.product.format == Format::F32 && self.aligned);
        assert!(columns.start.is_multiple_of(self.panel_width()) && columns.end <= self.columns);
        let width = columns.len().next_multiple_of(LANES);
        if rows == 0 || width == 0 {
            return;
        }
        assert!(out_stride >= width && out.len() >= (rows - 1) * out_stride + width);
        let (start, start_stride) = match start {
            Start::Zero => (std::ptr::null(), 0),
            Start::Row(row) => {
                assert!(row.len() >= width);
                (row.as_ptr(), 0)
            }
        };
        for panel in self.panels_in(columns.clone()) {
            let at = panel.start - columns.start;
            let vectors = panel.len().min(width - at) / LANES;
            let job = Panel {
                vectors,
                sums: out.as_mut_ptr().wrapping_add(at).cast(),
                sums_stride: out_stride,
                start: if start.is_null() { start } else { start.wrapping_add(at) },
                start_stride,
                ..self.job(&panel, &(0..self.depth), (lhs, stride, rows), &[])
            };
            // SAFETY: `job` checked the left side and the matrix; whole vectors of sums and of starts
            // are in every row, as just asserted.
            unsafe { self.level.multiply(self.product.format, job) };
        }
    }

    /// [`PackedMatrix::multiply`] in int16, from the numbers `start` on, which are the same for all rows.
    ///
    /// # Panics
    /// Where there is no room for that, or the format or the depth is another.
    pub(crate) fn multiply_int16(
        &self,
        columns: Range<usize>,
        lhs: &Int16Rows,
        start: &[f32],
        (out, out_stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        assert!(self.product.format == Format::Int16 && self.aligned);
        assert!(columns.start.is_multiple_of(self.panel_width()) && columns.end <= self.columns);
        assert_eq!(lhs.depth(), self.depth);
        let (rows, (codes, stride)) = (lhs.count(), lhs.codes());
        let width = columns.len().next_multiple_of(LANES);
        if rows == 0 || width == 0 {
            return;
        }
        assert!(out_stride >= width && out.len() >= (rows - 1) * out_stride + width);
        // Sums are added to what is there.
        for out in out.chunks_mut(out_stride).take(rows) {
            out[..width].write_copy_of_slice(&start[..width]);
        }
        if self.depth == 0 {
            return;
        }
        let (known, per_row) = (self.run_scales.as_ref().expect("int16"), lhs.runs());
        for panel in self.panels_in(columns.clone()) {
            let at = panel.start - columns.start;
            let vectors = panel.len().min(width - at) / LANES;
            let of_columns = known.from(0, panel.start);
            assert!(of_columns.len() >= (per_row - 1) * known.stride() + vectors * LANES);
            let sums = out.as_mut_ptr().wrapping_add(at).cast();
            let job = Panel {
                vectors,
                row_scales: lhs.scales().as_ptr(),
                row_scales_stride: per_row,
                row_scales_step: 1,
                column_scales: of_columns.as_ptr(),
                column_scales_stride: known.stride(),
                sums,
                sums_stride: out_stride,
                start: sums,
                start_stride: out_stride,
                ..self.job(&panel, &(0..self.depth), (codes, stride, rows), &[])
            };
            // SAFETY: `job` checked the left side and the matrix; whole vectors of sums, which were written
            // above, are in every row, and of scales in every run, as just asserted; rows have a scale for every
            // run. `put_runs` bounds the integers of the matrix, `Int16Rows` those of the left side.
            unsafe { self.level.multiply(self.product.format, job) };
        }
    }

    /// The left side and the matrix of a panel.
    ///
    /// # Panics
    /// Unless whole groups are in every one of `count` rows of `lhs`, with a run for all of them in int8.
    fn job<T>(
        &self,
        panel: &Range<usize>,
        rows: &Range<usize>,
        (lhs, stride, count): (&[T], usize, usize),
        runs: &[Int8Run],
    ) -> Panel {
        let PanelProduct { format, group, .. } = *self.product;
        let groups = rows.len().div_ceil(group);
        let runs_stride = if format == Format::Int8 { rows.len().div_ceil(RUN) } else { 0 };
        assert!(rows.start.is_multiple_of(GROUP) && rows.end <= self.depth, "{rows:?}");
        assert!(size_of::<T>() == format.size() && runs.len() == count * runs_stride);
        assert!(stride >= groups * group && lhs.len() >= (count - 1) * stride + groups * group);
        let at = self.panel_start(panel, rows.start);
        Panel {
            rows: count,
            vectors: panel.len() / LANES,
            groups,
            lhs: lhs.as_ptr().cast(),
            lhs_stride: stride * size_of::<T>(),
            // SAFETY: the buffer holds all groups of all panels, and `rows` are inside.
            matrix: unsafe { self.bytes.as_ptr().add(at) },
            matrix_stride: panel.len() * group * format.size(),
            runs: runs.as_ptr(),
            runs_stride,
            row_scales: std::ptr::null(),
            row_scales_stride: 0,
            row_scales_step: 0,
            column_scales: std::ptr::null(),
            column_scales_stride: 0,
            sums: std::ptr::null_mut(),
            sums_stride: 0,
            start: std::ptr::null(),
            start_stride: 0,
        }
    }
}
