//! The exact int8 product: a tile of int32 sums over packed operands, and nothing else.
//!
//! # Layout of packed operands
//! Rows are grouped into panels (`mr` rows on the left side, `nr` on the right), the depth into
//! groups of `group` elements (what one instruction sums into one lane):
//!
//! ```text
//! left   [M / mr][D / group][mr][group]      right   [N / nr][D / group][nr][group]
//!    or  [M][D / group][group]
//! ```
//!
//! The second layout of the left side, plain rows, is for kernels that broadcast one group of it:
//! they read it from wherever it is ([`LhsFormat::Biased`] and [`LhsFormat::Wide`]).
//!
//! Rows and depth are padded to whole panels and groups. Padding in the depth is 0 on the right
//! side, so it adds nothing whatever stands on the left; padded rows are computed and dropped.
//!
//! # The +128 trick
//! `vpdpbusd` multiplies u8 by i8. Signed codes on the left side are stored as `a + 128` for such
//! kernels ([`LhsFormat::Biased`]), which adds `128 * sum(b)` to every product; starting the sums
//! of column `n` at `-128 * sum(b_n)` takes it out again at no cost.
//!
//! # Zero points
//! ```text
//! sum (a - za)(b - zb)  =  sum ab - zb * (sum a - D za) - za * sum b
//! ```
//! What is subtracted is a product of pairs, `(sum a - D za, za)` of the row with `(zb, sum b)` of the
//! column. As pairs of i16 they ride in the sums: one instruction a register, whatever the depth. A number
//! too large for an i16 is spread over several groups of pairs; how many depends on the depth alone
//! ([`zero_groups`]).

/// How elements of the left side are stored. The kernels of one architecture do not use them all.
#[allow(dead_code)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LhsFormat {
    /// u8, `a + 128`, in plain rows.
    Biased,
    /// i8, as they are, in panels.
    Signed,
    /// i16, as they are, in plain rows; for instructions that multiply 16-bit pairs.
    Wide,
}

impl LhsFormat {
    /// Bytes of one element.
    pub(crate) const fn size(self) -> usize {
        match self {
            LhsFormat::Biased | LhsFormat::Signed => 1,
            LhsFormat::Wide => 2,
        }
    }

    /// What is added to a signed code when it is stored.
    pub(crate) const fn bias(self) -> i32 {
        match self {
            LhsFormat::Biased => 128,
            LhsFormat::Signed | LhsFormat::Wide => 0,
        }
    }
}

/// The tile of a kernel and the layout of its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Rows of the left side in a tile.
    pub mr: usize,
    /// Rows of the right side (columns of the result) in a tile.
    pub nr: usize,
    /// Depth elements that one instruction sums into one lane.
    pub group: usize,
    /// Storage of the left side.
    pub lhs: LhsFormat,
}

/// A pair of i16, with which zero points ride in the sums.
pub(crate) type ZeroPair = [i16; 2];

/// Groups of pairs that hold what is subtracted for zero points at this depth: `sum a - D za` is at most
/// `255 D`. The first group holds all of it, or its low byte; 256 times what the others hold is the rest.
pub(crate) const fn zero_groups(depth: usize) -> usize {
    let most = depth * 255;
    if most <= i16::MAX as usize { 1 } else { 1 + (most / 256 + 1).div_ceil(i16::MAX as usize) }
}

/// Larger than any tile of any kernel, for buffers on the stack.
pub(crate) const MAX_TILE: usize = 512;

/// Pointers of one tile, or of all tiles of one right panel. Sums of pairs may leave the range of an i32 in
/// between; two's complement wraps them back.
#[derive(Clone, Copy)]
pub(crate) struct TileInput {
    /// How many rows of the left side are wanted.
    pub rows: usize,
    /// Depth groups.
    pub groups: usize,
    /// The first of those rows: whole panels, or plain rows, in the kernel's [`LhsFormat`], aligned
    /// for it.
    pub lhs: *const u8,
    /// Bytes of one row of the left side; a panel has `mr` times as many.
    pub row_bytes: usize,
    /// Right panel: `groups * nr * group` elements.
    pub rhs: *const i8,
    /// What each column's sum starts from: `nr` elements.
    pub init: *const i32,
    /// Groups of pairs for zero points: [`zero_groups`], or 0 where all of them are 0.
    pub zero_groups: usize,
    /// Pairs of the rows: `zero_groups` for each.
    pub row_zeros: *const ZeroPair,
    /// Pairs of the columns: `nr` for each group.
    pub column_zeros: *const ZeroPair,
}

/// Where a tile of f32 scores goes: `out = (acc * row_scale) * column_scale + column_bias +
/// row_bias`, each operation rounded to f32, in this order (no fused multiply-add, so that every
/// kernel gives the same bits).
#[derive(Clone, Copy)]
pub(crate) struct ScoreTile {
    /// Top left element; rows are `stride` elements apart.
    pub out: *mut f32,
    /// Elements from one row to the next.
    pub stride: usize,
    /// `rows` scales.
    pub row_scales: *const f32,
    /// `rows` biases.
    pub row_biases: *const f32,
    /// `nr` scales.
    pub column_scales: *const f32,
    /// `nr` biases.
    pub column_biases: *const f32,
}

/// One instruction set's way to compute tiles.
#[derive(Debug)]
pub(crate) struct Int8Product {
    /// Name in reports.
    pub name: &'static str,
    /// Tile and layout; nothing in it is 0, and `mr * nr` is at most [`MAX_TILE`].
    pub geometry: Geometry,
    /// Writes `rows` x `nr` sums to `out`, rows `stride` elements apart: `(input, out, stride)`.
    ///
    /// # Safety
    /// The instructions are there; `input.rows` is in `1..=mr`; the pointers of `input` are valid for
    /// reads of the lengths named there; `out` is valid for writes of `nr` elements in each of `rows`
    /// rows.
    pub tile: unsafe fn(TileInput, *mut i32, usize),
    /// Writes `rows` x `nr` scores for any number of rows from 1 on: all tiles of one right panel,
    /// which stays in L1 meanwhile.
    ///
    /// # Safety
    /// As for `tile`, but for the number of rows, and every pointer of the scores is valid for the
    /// length named there: `out` for writes of `nr` elements in each of `rows` rows that do not
    /// overlap each other.
    pub scores: unsafe fn(TileInput, ScoreTile),
}

impl TileInput {
    /// At most `count` rows from `row` on, which is a multiple of the kernel's `mr`.
    ///
    /// # Safety
    /// `row < self.rows`, and the left side is valid for all rows.
    #[inline(always)]
    pub(crate) unsafe fn rows_from(self, row: usize, count: usize) -> Self {
        // SAFETY: panels and plain rows alike have `row_bytes` for each row before `row`.
        let lhs = unsafe { self.lhs.add(row * self.row_bytes) };
        // SAFETY: each row before `row` has as many pairs.
        let row_zeros = unsafe { self.row_zeros.add(row * self.zero_groups) };
        Self { rows: count.min(self.rows - row), lhs, row_zeros, ..self }
    }
}

impl ScoreTile {
    /// The same from row `row` on.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    pub(crate) unsafe fn rows_from(self, row: usize) -> Self {
        // SAFETY: by contract, each pointer is valid for that row.
        unsafe {
            Self {
                out: self.out.add(row * self.stride),
                row_scales: self.row_scales.add(row),
                row_biases: self.row_biases.add(row),
                ..self
            }
        }
    }

    /// The epilogue for sums that lie in memory, rows `nr` elements apart.
    ///
    /// # Safety
    /// Every pointer is valid for the length named at its field, `out` for writes of `nr` elements
    /// in each of `rows` rows.
    pub(crate) unsafe fn write(&self, sums: &[i32], rows: usize, nr: usize) {
        // SAFETY: valid for these lengths by contract.
        let (row_scales, row_biases, column_scales, column_biases) = unsafe {
            (
                std::slice::from_raw_parts(self.row_scales, rows),
                std::slice::from_raw_parts(self.row_biases, rows),
                std::slice::from_raw_parts(self.column_scales, nr),
                std::slice::from_raw_parts(self.column_biases, nr),
            )
        };
        for row in 0..rows {
            // SAFETY: row `row` of the output is valid for `nr` writes by contract.
            let out =
                unsafe { std::slice::from_raw_parts_mut(self.out.add(row * self.stride), nr) };
            let (scale, bias) = (row_scales[row], row_biases[row]);
            let columns = column_scales.iter().zip(column_biases);
            for ((x, &sum), (&column_scale, &column_bias)) in
                out.iter_mut().zip(&sums[row * nr..]).zip(columns)
            {
                *x = sum as f32 * scale * column_scale + column_bias + bias;
            }
        }
    }
}
