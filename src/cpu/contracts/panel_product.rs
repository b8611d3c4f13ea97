//! Rows times a packed matrix, `[M, K] x [K, C] -> [M, C]`, with f32 sums: probabilities times values,
//! queries times keys in f32, and linear layers.
//!
//! The matrix is stored in panels of up to 64 columns, the depth in groups of what one instruction
//! sums into a lane:
//!
//! ```text
//! panel of `width` columns:  [K / group][width][group]      width: 16, 32, 48 or 64
//! ```
//!
//! From one group to the next it is any number of bytes, so rows that lie one after the other in a
//! cache are a panel as they are. Rows of the left side are `lhs_stride` bytes apart.

use std::ops::Range;

/// Columns in a vector of the layout.
pub(crate) const LANES: usize = 16;
/// Vectors in a panel, at most.
pub(crate) const VECTORS: usize = 4;
/// Rows of a tile, at most.
pub(crate) const ROWS: usize = 6;
/// Elements of the depth in a group, at most: rows that hold a multiple of this hold whole groups of
/// every kernel.
pub(crate) const GROUP: usize = 8;

/// Rows of a stored matrix that are asked for before they are multiplied, which is some 100 ns ahead. A
/// processor foresees rows that follow each other, not parts of rows.
pub(crate) const AHEAD: usize = 16;

/// Elements of the depth whose integers on the left side share a scale, a multiple of [`GROUP`]. A
/// shorter run keeps more of the small probabilities beside a large one, and converts more sums to
/// f32. (128, with one bit less in the matrix so that no sum overflows, makes attention 3 % faster and P·V 3 to 4 dB
/// less accurate.)
pub(crate) const RUN: usize = 64;

/// The largest magnitude on the left side of an int16 product: 13 bits with the sign.
pub(crate) const INT16_LEFT: i16 = 1 << 12;
/// The largest magnitude in the matrix of an int16 product: 14 bits with the sign.
pub(crate) const INT16_MATRIX: i16 = (1 << 13) - 1;

// `|sum l_k m_k| <= sum |l_k| |m_k|`: no sum over a run leaves an i32, nor does any part of it, whatever
// the signs and the order in which it is added up.
const _: () = assert!(RUN as i64 * INT16_LEFT as i64 * INT16_MATRIX as i64 <= i32::MAX as i64);
const _: () = assert!(-(i8::MIN as i64) <= INT16_MATRIX as i64);

/// Int8 probabilities of one query for a run of keys: `scale * code`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Int8Run {
    /// What a code of 1 stands for.
    pub scale: f32,
    /// The sum of all codes of the run, for kernels with a [`PanelProduct::bias`].
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]
    pub codes: u32,
}

/// How both sides of the product are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// f32; f32 sums.
    F32,
    /// bf16; f32 sums.
    Bf16,
    /// u8 on the left, i8 in the matrix, both with a scale for each run; exact i32 sums over a run, then f32.
    Int8,
    /// i16 up to [`INT16_LEFT`] on the left and up to [`INT16_MATRIX`] in the matrix, both with a scale for
    /// each run; exact i32 sums over a run, then f32.
    Int16,
}

impl Format {
    /// Bytes of an element.
    pub(crate) const fn size(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::Bf16 | Format::Int16 => 2,
            Format::Int8 => 1,
        }
    }
}

/// How a matrix is stored that is multiplied as it lies: f32 as the machine has it, the others little-endian, and
/// widened in registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    /// Finite numbers only.
    F16,
    Bf16,
    /// i8; the scale of a row is in the left side.
    Int8,
}

impl Stored {
    /// Bytes of an element.
    pub(crate) const fn size(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
            Stored::Int8 => 1,
        }
    }
}

/// `x` rounded to bf16, ties to even, for x that is not NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// One panel of columns, and rows for it.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    /// Rows of the left side.
    pub rows: usize,
    /// Vectors of columns, from 1 on.
    pub vectors: usize,
    /// Groups of the depth.
    pub groups: usize,
    /// The first element of the first row; whole groups of them in each row.
    pub lhs: *const u8,
    /// Bytes from one row of the left side to the next.
    pub lhs_stride: usize,
    /// The panel's first group: `vectors * LANES * group` elements in each of `groups` groups.
    pub matrix: *const u8,
    /// Bytes from one group to the next.
    pub matrix_stride: usize,
    /// What int8 codes of the left side stand for: the first run of the first row, and a run for
    /// every [`RUN`] elements in each row. Not read for other formats.
    pub runs: *const Int8Run,
    /// Runs from one row to the next.
    pub runs_stride: usize,
    /// What a 1 on the left side of an int16 product stands for: a number for each row and run, that of the
    /// first row and run here. Not read for other formats.
    pub row_scales: *const f32,
    /// Elements from one row of these to the next, and from one run of a row.
    pub row_scales_stride: usize,
    pub row_scales_step: usize,
    /// What a 1 in the matrix of an int8 or int16 product stands for: a number for each run and column, that of
    /// the first here. Not read for other formats.
    pub column_scales: *const f32,
    /// Elements from one run of these to the next; 0 for columns with one scale for all runs.
    pub column_scales_stride: usize,
    /// The first sum of the first row; `vectors * LANES` in each row.
    pub sums: *mut f32,
    /// Elements from one row of sums to the next.
    pub sums_stride: usize,
    /// What the sums of f32 rows start from: the first number of the first row, or null for zeros. The
    /// sums themselves where they are added to. Kernels with another left side add to their sums whatever
    /// stands here.
    pub start: *const f32,
    /// Elements from one row of starts to the next; 0 for a row that all share.
    pub start_stride: usize,
}

impl Panel {
    /// Its rows in tiles of at most `most`, as even as can be: 8 rows are 4 and 4, not 6 and 2.
    #[inline(always)]
    pub(crate) fn tiles(self, most: usize) -> impl Iterator<Item = Panel> {
        let mut rest = self;
        let mut left = self.rows.div_ceil(most);
        std::iter::from_fn(move || {
            let rows = rest.rows.checked_div(left)?;
            let tile = Panel { rows, ..rest };
            rest.rows -= rows;
            rest.lhs = rest.lhs.wrapping_add(rows * rest.lhs_stride);
            rest.runs = rest.runs.wrapping_add(rows * rest.runs_stride);
            rest.row_scales = rest.row_scales.wrapping_add(rows * rest.row_scales_stride);
            rest.sums = rest.sums.wrapping_add(rows * rest.sums_stride);
            rest.start = rest.start_from(rows * rest.start_stride);
            left -= 1;
            Some(tile)
        })
    }

    /// Its columns in parts of at most `most` vectors, of elements of `size` bytes.
    #[inline(always)]
    pub(crate) fn parts(self, most: usize, size: usize) -> impl Iterator<Item = Panel> {
        (0..self.vectors).step_by(most).map(move |first| Panel {
            vectors: most.min(self.vectors - first),
            matrix: self.matrix.wrapping_add(first * LANES * size),
            sums: self.sums.wrapping_add(first * LANES),
            column_scales: self.column_scales.wrapping_add(first * LANES),
            start: self.start_from(first * LANES),
            ..self
        })
    }

    #[inline(always)]
    fn start_from(&self, elements: usize) -> *const f32 {
        if self.start.is_null() { self.start } else { self.start.wrapping_add(elements) }
    }

    /// Where the sum of a row's `column`-th column starts from; null for zero.
    #[inline(always)]
    pub(crate) fn start_of(&self, row: usize, column: usize) -> *const f32 {
        self.start_from(row * self.start_stride + column)
    }

    /// The sum of a row's `column`-th column.
    #[inline(always)]
    pub(crate) fn sums_of(&self, row: usize, column: usize) -> *mut f32 {
        self.sums.wrapping_add(row * self.sums_stride + column)
    }

    /// The first element of a row of the left side.
    #[inline(always)]
    pub(crate) fn lhs_of<T>(&self, row: usize) -> *const T {
        self.lhs.wrapping_add(row * self.lhs_stride).cast()
    }

    /// A group, from one of its bytes on.
    #[inline(always)]
    pub(crate) fn group(&self, group: usize, byte: usize) -> *const u8 {
        self.matrix.wrapping_add(group * self.matrix_stride + byte)
    }

    /// The groups of each run, of `group` elements each.
    #[inline(always)]
    pub(crate) fn runs(&self, group: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (groups, of_run) = (self.groups, RUN / group);
        (0..groups.div_ceil(of_run))
            .map(move |run| (run, run * of_run..(run * of_run + of_run).min(groups)))
    }

    /// What a 1 of a row stands for in a run of an int16 product.
    #[inline(always)]
    pub(crate) fn row_scale(&self, row: usize, run: usize) -> *const f32 {
        self.row_scales.wrapping_add(row * self.row_scales_stride + run * self.row_scales_step)
    }

    /// What a 1 of a `column` and those behind it stands for in a run of an integer product.
    #[inline(always)]
    pub(crate) fn column_scale(&self, column: usize, run: usize) -> *const f32 {
        self.column_scales.wrapping_add(run * self.column_scales_stride + column)
    }

    /// What the codes of a row stand for in a run.
    #[inline(always)]
    pub(crate) fn run_of(&self, row: usize, run: usize) -> *const Int8Run {
        self.runs.wrapping_add(row * self.runs_stride + run)
    }
}

/// `sums[r, c] = start[r, c] + sum_k lhs[r, k] * matrix[k, c]` over one panel; in f32 the products are
/// added up in the order of the depth, and the start last.
///
/// In int8 and int16, run by run: the exact integer, rounded to f32, is multiplied by the scale of the row and
/// then by that of the column, and added to the sum, each step rounded and none fused: not every level has an
/// instruction for that. So every kernel gives the same bits, and nothing overflows but the sum itself: an
/// integer times the scale of its row is at most what the left side adds up to, times the largest code of the
/// matrix.
///
/// # Safety
/// The instructions are there, and the pointers of the panel are valid for what is named there, sums for
/// reads and writes and all else for reads (`start`, unless it is null, like the sums), and aligned for f32 where they are to f32. Integers of
/// an int16 product are within their bounds.
pub(crate) type Multiply = unsafe fn(Panel);

/// One instruction set's way to multiply with a matrix packed in one format.
#[derive(Debug)]
pub(crate) struct PanelProduct {
    /// Name in reports.
    pub name: &'static str,
    /// What it multiplies.
    pub format: Format,
    /// Elements of the depth that one instruction sums into a lane: a power of two up to [`GROUP`].
    pub group: usize,
    /// Vectors of columns in a panel, at most: as many as a tile has.
    pub vectors: usize,
    /// What is added to the code of an int8 element of the matrix when it is stored: 128 for an
    /// instruction that multiplies u8 by u8, whose kernel takes it out again.
    pub bias: u8,
    /// The kernel.
    pub multiply: Multiply,
}

/// One instruction set's way to multiply rows with a matrix that is stored as it comes, row-major: as
/// [`PanelProduct`] with groups of one, and any number of vectors. Every level gives the same bits.
///
/// Where the matrix is f32, f16 or bf16, rows are f32, and products and sums are rounded apart; it waits for memory
/// more than for sums. Where it is int8, rows are those of an int16 product, whose sums of a run are exact: two
/// products for the instructions of one. It has no scales of columns.
#[derive(Debug)]
pub(crate) struct StoredProduct {
    /// Name in reports.
    pub name: &'static str,
    pub f32: Multiply,
    pub f16: Multiply,
    pub bf16: Multiply,
    pub int8: Multiply,
}

impl StoredProduct {
    /// The kernel for a form of storage.
    pub(crate) fn of(&self, stored: Stored) -> Multiply {
        match stored {
            Stored::F32 => self.f32,
            Stored::F16 => self.f16,
            Stored::Bf16 => self.bf16,
            Stored::Int8 => self.int8,
        }
    }
}
