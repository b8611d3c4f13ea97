//! A matrix in the order a kernel reads it, and the products with it.

use super::LARGEST;
use super::channels::{Channels, Dequantize, code, dequantize};
use super::runs::{RunScales, code16, outliers};
use crate::cpu::Level;
use crate::cpu::contracts::{
    Format, GROUP, Int8Run, LANES, Panel, PanelProduct, RUN, Rows, bf16_bits,
};
use crate::cpu::plain::{each_lane, lanes, widest};
use crate::memory::{AlignedBytes, Footprint};
use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::ops::{BitOr, Range, Shl};

/// Rows whose int8 sums are on the stack at a time.
const INT8_ROWS: usize = 24;

/// A matrix `[K, C]` for products `[M, K] x [K, C]`: the values of a head (K keys, C channels), its keys
/// transposed (K channels, C keys), or the weights of a linear layer, transposed.
///
/// Rows with a number beyond [`LARGEST`] or NaN take no part in the product and are kept beside, so that sums
/// are finite, and a NaN of a masked key does not leak through `0 * NaN`.
pub(crate) struct PackedMatrix {
    level: Level,
    product: &'static PanelProduct,
    bytes: AlignedBytes,
    depth: usize,
    columns: usize,
    /// Whether all panels but the last are as wide as can be, so that they start where one expects;
    /// otherwise they are as even as can be.
    aligned: bool,
    /// What stands for a row that is not there: zeros, or the offsets of int8 columns.
    fill: Vec<f32>,
    /// Of int8 only.
    channels: Option<Channels>,
    /// Of int16 only.
    run_scales: Option<RunScales>,
    exceptions: Vec<(usize, Vec<f32>)>,
}

/// What sums start from.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Zeros.
    Zero,
    /// The same numbers for all rows, padded to whole vectors.
    Row(&'a [f32]),
}

impl PackedMatrix {
    /// Room for `depth` rows of `columns` numbers: for int8, [`PackedMatrix::observe`] has to see all
    /// of them; then [`PackedMatrix::put`] or [`PackedMatrix::put_columns`] fills it.
    ///
    /// # Panics
    /// For a format that the machine does not multiply, and a matrix larger than the address space.
    pub(crate) fn new(level: Level, format: Format, depth: usize, columns: usize) -> Self {
        let product = level.panels(format).expect("a format that the machine multiplies");
        let mut packed = Self {
            level,
            product,
            bytes: AlignedBytes::zeroed(0),
            depth,
            columns,
            aligned: false,
            fill: Vec::new(),
            channels: None,
            run_scales: (product.format == Format::Int16).then(|| RunScales::new(0, 0)),
            exceptions: Vec::new(),
        };
        packed.reset(depth, columns);
        packed
    }

    /// Room for other numbers, in the place of those that are there. Padded columns may hold
    /// anything: their sums are dropped.
    pub(crate) fn reset(&mut self, depth: usize, columns: usize) {
        let PanelProduct { format, group, .. } = *self.product;
        let padded =
            depth.checked_next_multiple_of(group).zip(columns.checked_next_multiple_of(LANES));
        let bytes = padded
            .and_then(|(depth, columns)| depth.checked_mul(columns)?.checked_mul(format.size()));
        self.bytes.grow(bytes.expect("a matrix larger than the address space"));
        (self.depth, self.columns, self.aligned) = (depth, columns, false);
        self.fill.clear();
        self.fill.resize(columns, 0.0);
        self.channels = (format == Format::Int8).then(|| Channels::new(columns));
        if let Some(scales) = &mut self.run_scales {
            scales.reset(depth, columns);
        }
        self.exceptions.clear();
    }

    /// Room for columns that are put as rows, and of which parts are multiplied.
    pub(crate) fn reset_columns(&mut self, depth: usize, columns: usize) {
        self.reset(depth, columns);
        self.aligned = true;
    }

    /// The level that it is packed for.
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// How it is stored.
    pub(crate) fn format(&self) -> Format {
        self.product.format
    }

    /// K.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// C.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Columns, padded to whole vectors: the stride of the sums.
    pub(crate) fn width(&self) -> usize {
        self.columns.next_multiple_of(LANES)
    }

    /// Columns in a panel, at most; columns that are asked for start at a multiple of this.
    pub(crate) fn panel_width(&self) -> usize {
        self.product.vectors * LANES
    }

    /// The rows with a number beyond [`LARGEST`] or NaN, with what they add to the sums for a 1 on the
    /// left side.
    pub(crate) fn exceptions(&self) -> &[(usize, Vec<f32>)] {
        &self.exceptions
    }

    /// Whether [`PackedMatrix::observe`] is wanted.
    pub(crate) fn needs_ranges(&self) -> bool {
        self.channels.is_some()
    }

    /// Widens the range of every int8 column to these rows; does nothing for other formats.
    pub(crate) fn observe(&mut self, rows: &[f32]) {
        if let Some(channels) = &mut self.channels {
            channels.observe(rows);
            self.fill.copy_from_slice(&channels.offsets[..self.columns]);
        }
    }

    /// Packs the rows from `first` on, which is a multiple of [`GROUP`], and for int16 of [`RUN`], as is
    /// their number unless they are the last; `rows` is row-major.
    pub(crate) fn put(&mut self, first: usize, rows: &[f32]) {
        if self.columns == 0 {
            return;
        }
        let end = first + rows.len() / self.columns;
        assert!(first.is_multiple_of(GROUP) && end <= self.depth, "{first}..{end}");
        let rows = self.without_exceptions(first, rows);
        if self.run_scales.is_none() {
            return self.spread(first, &rows);
        }
        assert!(first.is_multiple_of(RUN) && (end == self.depth || end.is_multiple_of(RUN)));
        for (run, rows) in (first / RUN..).zip(rows.chunks(RUN * self.columns)) {
            let scales = self.run_scales.as_mut().expect("int16");
            let largest = scales.observe(run, rows, self.columns);
            let far = outliers(rows, self.columns, largest);
            if far.is_empty() {
                self.spread(run * RUN, rows);
                continue;
            }
            let rows = self.keep_beside(run * RUN, rows, far);
            self.run_scales.as_mut().expect("int16").observe(run, &rows, self.columns);
            self.spread(run * RUN, &rows);
        }
    }

    /// Packs all rows of an int16 matrix, row-major and finite; none of them is kept beside.
    pub(crate) fn put_runs(&mut self, rows: &[f32]) {
        assert_eq!(rows.len(), self.depth * self.columns);
        if rows.is_empty() {
            return;
        }
        for (run, rows) in rows.chunks(RUN * self.columns).enumerate() {
            self.run_scales.as_mut().expect("int16").observe(run, rows, self.columns);
            self.spread(run * RUN, rows);
        }
    }

    /// Rows from `first` on, those that the format cannot hold kept beside.
    fn without_exceptions<'a>(&mut self, first: usize, rows: &'a [f32]) -> Cow<'a, [f32]> {
        let fits = |rows: &[f32]| widest!(all_below, (rows, LARGEST), (&[f32], f32) => bool);
        if fits(rows) {
            return Cow::Borrowed(rows);
        }
        let kept = rows.chunks_exact(self.columns).enumerate().filter(|(_, row)| !fits(row));
        let kept = kept.map(|(row, _)| row).collect();
        Cow::Owned(self.keep_beside(first, rows, kept))
    }

    /// The rows with what fills those that are kept beside.
    fn keep_beside(&mut self, first: usize, rows: &[f32], kept: Vec<usize>) -> Vec<f32> {
        let mut rows = rows.to_vec();
        for index in kept {
            let row = &mut rows[index * self.columns..][..self.columns];
            let added = row.iter().zip(&self.fill).map(|(x, fill)| x - fill).collect();
            self.exceptions.push((first + index, added));
            row.copy_from_slice(&self.fill);
        }
        rows
    }

    /// Writes rows that the format holds to their place in every panel; in int16 those of the run that was
    /// observed last.
    fn spread(&mut self, first: usize, rows: &[f32]) {
        for panel in self.panels() {
            let at = self.panel_start(&panel, first);
            let (offsets, inverses) = match (&self.channels, &self.run_scales) {
                (Some(known), _) => (&known.offsets[panel.clone()], &known.inverses[panel.clone()]),
                (_, Some(known)) => (Default::default(), &known.inverses()[panel.clone()]),
                _ => Default::default(),
            };
            let job = Spread {
                product: self.product,
                rows,
                width: self.columns,
                columns: panel,
                fill: &self.fill,
                offsets,
                inverses,
                out: &mut self.bytes.as_mut_slice()[at..],
            };
            widest!(spread, job, Spread<'_> => ());
        }
    }

    /// Packs the columns from `first` on, a multiple of [`PackedMatrix::panel_width`], each a row of
    /// `columns` and times `factor`. Of f32 only; numbers that are not finite are packed as they are.
    pub(crate) fn put_columns(&mut self, first: usize, columns: Rows<'_>, factor: f32) {
        assert!(self.product.format == Format::F32 && self.aligned);
        assert_eq!(columns.depth(), self.depth);
        let end = first + columns.count();
        assert!(first.is_multiple_of(self.panel_width()) && end <= self.columns, "{first}..{end}");
        let panels = self.panels().skip_while(|panel| panel.start < first);
        for panel in panels.take_while(|panel| panel.start < end) {
            let at = self.panel_start(&panel, 0);
            let job = Transpose {
                columns,
                range: panel.start - first..panel.end.min(end) - first,
                width: panel.len(),
                factor,
                out: self.bytes.as_mut_slice()[at..].as_chunks_mut().0,
            };
            widest!(transpose, job, Transpose<'_> => ());
        }
    }

    /// A column, as it is stored in f32.
    pub(crate) fn column(&self, column: usize) -> impl Iterator<Item = f32> {
        assert!(self.product.format == Format::F32 && column < self.columns);
        let panel = self.panels().find(|panel| panel.contains(&column)).expect("a panel for it");
        let start = self.panel_start(&panel, 0) + (column - panel.start) * size_of::<f32>();
        let numbers = self.bytes.as_slice().get(start..).unwrap_or_default().as_chunks::<4>().0;
        numbers.iter().step_by(panel.len()).take(self.depth).map(|&x| f32::from_ne_bytes(x))
    }

    /// The columns of every panel.
    fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (vectors, most) = (self.columns.div_ceil(LANES), self.product.vectors);
        let (count, aligned) = (vectors.div_ceil(most), self.aligned);
        (0..count).map(move |i| {
            if aligned {
                most * i * LANES..(most * (i + 1)).min(vectors) * LANES
            } else {
                vectors * i / count * LANES..vectors * (i + 1) / count * LANES
            }
        })
    }

    /// Bytes before the group that `row` starts, in the panel of these columns.
    fn panel_start(&self, panel: &Range<usize>, row: usize) -> usize {
        let depth = self.depth.next_multiple_of(self.product.group);
        (panel.start * depth + panel.len() * row) * self.product.format.size()
    }

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
    /// elements each, all runs of a row before those of the next.
    pub(crate) fn accumulate_int8(
        &self,
        rows: Range<usize>,
        lhs: &[u8],
        stride: usize,
        runs: &[Int8Run],
        out: &mut [f32],
    ) {
        let (width, per_row) = (self.width(), rows.len().div_ceil(RUN));
        if per_row == 0 || width == 0 {
            return;
        }
        assert_eq!(out.len() / width * per_row, runs.len(), "{per_row} runs in each row");
        let blocks = out.chunks_mut(INT8_ROWS * width).zip(runs.chunks(INT8_ROWS * per_row));
        for (i, (out, runs)) in blocks.enumerate() {
            let lhs = &lhs[i * INT8_ROWS * stride..];
            for panel in self.panels() {
                self.int8_panel(&panel, &rows, (lhs, stride), runs, out);
            }
        }
    }

    /// [`PackedMatrix::accumulate_f32`] for int16; `scales` says what a 1 on the left side stands for: a
    /// number for [`RUN`] elements each, all runs of a row before those of the next. `rows` starts at a
    /// multiple of [`RUN`].
    pub(crate) fn accumulate_int16(
        &self,
        rows: Range<usize>,
        lhs: &[i16],
        stride: usize,
        scales: &[f32],
        out: &mut [f32],
    ) {
        let width = self.width();
        if out.is_empty() || rows.is_empty() {
            return;
        }
        let (count, per_row) = (out.len() / width, rows.len().div_ceil(RUN));
        assert!(rows.start.is_multiple_of(RUN) && out.len() == count * width);
        assert_eq!(count * per_row, scales.len(), "{per_row} scales in each row");
        let known = self.run_scales.as_ref().expect("int16");
        for panel in self.panels() {
            let of_columns = known.from(rows.start / RUN, panel.start);
            assert!(of_columns.len() >= (per_row - 1) * known.stride() + panel.len());
            let sums = out[panel.start..].as_mut_ptr();
            let job = Panel {
                row_scales: scales.as_ptr(),
                row_scales_stride: per_row,
                column_scales: of_columns.as_ptr(),
                column_scales_stride: known.stride(),
                sums,
                sums_stride: width,
                start: sums,
                start_stride: width,
                ..self.job(&panel, &rows, (lhs, stride, count), &[])
            };
            // SAFETY: `job` checked the left side and the matrix, and the panel's columns are in every row
            // of sums and of scales, as just asserted. `put` bounds the integers of the matrix; the caller
            // those of the left side.
            unsafe { self.level.multiply(self.product.format, job) };
        }
    }

    /// Up to [`INT8_ROWS`] rows of one panel.
    fn int8_panel(
        &self,
        panel: &Range<usize>,
        rows: &Range<usize>,
        (lhs, stride): (&[u8], usize),
        runs: &[Int8Run],
        out: &mut [f32],
    ) {
        let channels = self.channels.as_ref().expect("int8 columns");
        let per_row = rows.len().div_ceil(RUN);
        let (count, width) = (runs.len() / per_row, panel.len());
        let mut sums = [0f32; INT8_ROWS * LANES * crate::cpu::contracts::VECTORS];
        let sums = &mut sums[..count * width];
        self.add_panel(panel, rows, (lhs, stride), runs, (sums, width));
        let job = Dequantize {
            sums,
            runs,
            per_row,
            scales: &channels.scales[panel.clone()],
            offsets: &channels.offsets[panel.clone()],
            out: &mut out[panel.start..],
            stride: self.width(),
        };
        widest!(dequantize, job, Dequantize<'_> => ());
    }

    /// Every panel of a float format.
    fn accumulate<T>(&self, rows: Range<usize>, lhs: &[T], stride: usize, out: &mut [f32]) {
        let width = self.width();
        if out.is_empty() {
            return;
        }
        for panel in self.panels() {
            self.add_panel(&panel, &rows, (lhs, stride), &[], (&mut out[panel.start..], width));
        }
    }

    /// Adds to the sums of one panel's columns; the last row of `sums` may end with them.
    fn add_panel<T>(
        &self,
        panel: &Range<usize>,
        rows: &Range<usize>,
        (lhs, stride): (&[T], usize),
        runs: &[Int8Run],
        (sums, sums_stride): (&mut [f32], usize),
    ) {
        let count = sums.len().div_ceil(sums_stride);
        assert!(sums_stride >= panel.len());
        assert!(sums.len() >= (count - 1) * sums_stride + panel.len());
        let sums = sums.as_mut_ptr();
        let job = Panel {
            sums,
            sums_stride,
            start: sums,
            start_stride: sums_stride,
            ..self.job(panel, rows, (lhs, stride, count), runs)
        };
        // SAFETY: `job` checked the left side and the matrix; the panel's columns are in every row of
        // sums, as just asserted.
        unsafe { self.level.multiply(self.product.format, job) };
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
        let panels = self.panels().skip_while(|panel| panel.start < columns.start);
        for panel in panels.take_while(|panel| panel.start < columns.end) {
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

    /// [`PackedMatrix::multiply`] in int16, from the numbers `start` on, which are the same for all rows;
    /// `scales` says what a 1 on the left side stands for, as of [`PackedMatrix::accumulate_int16`].
    ///
    /// # Panics
    /// Where there is no room for that, or the format is another.
    pub(crate) fn multiply_int16(
        &self,
        columns: Range<usize>,
        (lhs, stride, rows): (&[i16], usize, usize),
        scales: &[f32],
        start: &[f32],
        (out, out_stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        assert!(self.product.format == Format::Int16 && self.aligned);
        assert!(columns.start.is_multiple_of(self.panel_width()) && columns.end <= self.columns);
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
        let (known, per_row) = (self.run_scales.as_ref().expect("int16"), self.depth.div_ceil(RUN));
        assert_eq!(scales.len(), rows * per_row, "{per_row} scales in each row");
        let panels = self.panels().skip_while(|panel| panel.start < columns.start);
        for panel in panels.take_while(|panel| panel.start < columns.end) {
            let at = panel.start - columns.start;
            let vectors = panel.len().min(width - at) / LANES;
            let of_columns = known.from(0, panel.start);
            assert!(of_columns.len() >= (per_row - 1) * known.stride() + vectors * LANES);
            let sums = out.as_mut_ptr().wrapping_add(at).cast();
            let job = Panel {
                vectors,
                row_scales: scales.as_ptr(),
                row_scales_stride: per_row,
                column_scales: of_columns.as_ptr(),
                column_scales_stride: known.stride(),
                sums,
                sums_stride: out_stride,
                start: sums,
                start_stride: out_stride,
                ..self.job(&panel, &(0..self.depth), (lhs, stride, rows), &[])
            };
            // SAFETY: `job` checked the left side and the matrix; whole vectors of sums, which were written
            // above, are in every row, and of scales in every run, as just asserted. `put_runs` bounds the
            // integers of the matrix; the caller those of the left side.
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
            column_scales: std::ptr::null(),
            column_scales_stride: 0,
            sums: std::ptr::null_mut(),
            sums_stride: 0,
            start: std::ptr::null(),
            start_stride: 0,
        }
    }
}

impl Footprint for PackedMatrix {
    fn footprint(&self) -> usize {
        let rows = self.exceptions.iter().map(|(_, row)| row.footprint() + size_of_val(row));
        let channels = self.channels.as_ref().map_or(0, Channels::footprint);
        self.bytes.footprint() + self.fill.footprint() + channels + rows.sum::<usize>()
    }
}

/// Columns that come as rows, and their place in one panel.
struct Transpose<'a> {
    columns: Rows<'a>,
    /// Those of the panel.
    range: Range<usize>,
    /// Of the panel.
    width: usize,
    factor: f32,
    out: &'a mut [[u8; 4]],
}

#[inline(always)]
fn transpose(job: Transpose<'_>) {
    for (vector, first) in job.range.clone().step_by(LANES).enumerate() {
        let count = LANES.min(job.range.end - first);
        let depth = job.columns.depth();
        // What is missing repeats the last one, whose sums are dropped.
        let mut rows = [&job.columns.data()[..0]; LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &job.columns.row(first + i.min(count - 1))[..depth];
        }
        let outs = job.out.chunks_mut(job.width).take(depth);
        for (k, out) in outs.enumerate() {
            let out = &mut out[vector * LANES..][..LANES];
            for (out, row) in out.iter_mut().zip(&rows) {
                *out = (row[k] * job.factor).to_ne_bytes();
            }
        }
    }
}

/// Whether every magnitude is at most `limit` (NaN is not).
#[inline(always)]
fn all_below((row, limit): (&[f32], f32)) -> bool {
    row.iter().fold(true, |all, x| all & (x.abs() <= limit))
}

/// Rows of a matrix, and the place of their groups in one panel.
struct Spread<'a> {
    product: &'static PanelProduct,
    rows: &'a [f32],
    /// Columns of a row.
    width: usize,
    /// Those of the panel, padded to whole vectors.
    columns: Range<usize>,
    /// The row after the last one.
    fill: &'a [f32],
    /// Offsets of int8 columns, padded like these.
    offsets: &'a [f32],
    /// Inverse scales of int8 and int16 columns, padded like these.
    inverses: &'a [f32],
    out: &'a mut [u8],
}

#[inline(always)]
fn spread(job: Spread<'_>) {
    let PanelProduct { format, group, bias, .. } = *job.product;
    let (offsets, inverses) = (job.offsets, job.inverses);
    let f32 = |_: usize, x: [f32; LANES]| each_lane(|i| x[i].to_bits());
    let bf16 = |_: usize, x: [f32; LANES]| each_lane(|i| bf16_bits(x[i]).into());
    let int8 = |at: usize, x: [f32; LANES]| {
        let (offset, inverse) = (lanes(offsets, at), lanes(inverses, at));
        each_lane(|i| u32::from(code(x[i], offset[i], inverse[i]) as u8 ^ bias))
    };
    let int16 = |at: usize, x: [f32; LANES]| {
        let inverse = lanes(inverses, at);
        each_lane(|i| u32::from(code16(x[i], inverse[i]) as u16))
    };
    match (format, group) {
        (Format::F32, _) => interleave::<1, u32>(job, f32),
        (Format::Bf16, 2) => interleave::<2, u32>(job, bf16),
        (Format::Bf16, _) => interleave::<4, u64>(job, bf16),
        (Format::Int8, 1) => interleave::<1, u8>(job, int8),
        (Format::Int8, 4) => interleave::<4, u32>(job, int8),
        (Format::Int8, _) => interleave::<8, u64>(job, int8),
        (Format::Int16, 1) => interleave::<1, u16>(job, int16),
        (Format::Int16, _) => interleave::<2, u32>(job, int16),
    }
}

/// What one column of a group becomes.
trait Word: Copy + Default + BitOr<Output = Self> + Shl<usize, Output = Self> {
    /// An element in the lowest bits.
    fn of(element: u32) -> Self;

    fn write(self, out: &mut [u8]);
}

macro_rules! words {
    ($($word:ty),*) => {
        $(impl Word for $word {
            #[inline(always)]
            fn of(element: u32) -> Self {
                element as Self
            }

            #[inline(always)]
            fn write(self, out: &mut [u8]) {
                out.copy_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
words!(u8, u16, u32, u64);

/// Groups of `G` rows, a word for each column; the first row is in the lowest bits, which come
/// first in memory.
#[inline(always)]
fn interleave<const G: usize, W: Word>(
    job: Spread<'_>,
    elements: impl Fn(usize, [f32; LANES]) -> [u32; LANES],
) {
    let known = job.columns.start..job.columns.end.min(job.width);
    let groups = job.rows.chunks(G * job.width);
    let outs = job.out.chunks_exact_mut(job.columns.len() * size_of::<W>());
    for (group, out) in groups.zip(outs) {
        let mut rows = [&job.fill[known.clone()]; G];
        for (row, values) in rows.iter_mut().zip(group.chunks_exact(job.width)) {
            *row = &values[known.clone()];
        }
        for (i, out) in out.chunks_exact_mut(LANES * size_of::<W>()).enumerate() {
            let mut words = [W::default(); LANES];
            for (g, row) in rows.iter().enumerate() {
                let elements = elements(i * LANES, lanes(row, i * LANES));
                let shift = 8 * size_of::<W>() / G * g;
                words = each_lane(|c| words[c] | W::of(elements[c]) << shift);
            }
            for (word, out) in words.iter().zip(out.chunks_exact_mut(size_of::<W>())) {
                word.write(out);
            }
        }
    }
}
