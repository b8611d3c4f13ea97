//! The loops around a kernel: panels of the right side outermost, so that one stays in L1 while
//! all rows of the left side pass over it.

use super::kernel::{MAX_TILE, ScoreTile, TileInput};
use super::pack::{PackedLhs, PackedRhs};
use std::ops::Range;

/// Zero points and sums of the codes, for `sum (a - za)(b - zb)`:
///
/// ```text
/// sum ab - zb * sum a - za * sum b + D * za * zb  =  sum ab - zb * row_term - za * sum b
/// ```
pub(crate) struct ZeroCorrection<'a> {
    /// `za` of each row of the left side.
    pub row_zeros: &'a [i32],
    /// `sum a - D * za` of each row of the left side.
    pub row_terms: &'a [i32],
    /// `zb` of each row of the right side, padded to whole panels.
    pub column_zeros: &'a [i32],
    /// `sum b` of each row of the right side, padded to whole panels.
    pub column_sums: &'a [i32],
}

impl ZeroCorrection<'_> {
    /// Corrects a tile of sums that lie `nr` elements apart.
    fn apply(&self, sums: &mut [i32], nr: usize, rows: Range<usize>, column: usize) {
        let zeros = &self.column_zeros[column..column + nr];
        let column_sums = &self.column_sums[column..column + nr];
        for (sums, row) in sums.chunks_exact_mut(nr).zip(rows) {
            let (za, term) = (self.row_zeros[row], self.row_terms[row]);
            for ((sum, &zb), &b) in sums.iter_mut().zip(zeros).zip(column_sums) {
                let correction = zb.wrapping_mul(term).wrapping_add(za.wrapping_mul(b));
                *sum = sum.wrapping_sub(correction);
            }
        }
    }
}

/// What turns int32 sums into f32 scores; see [`ScoreTile`] for the formula. The column slices
/// are padded to whole panels.
pub(crate) struct ScoreScales<'a> {
    pub row_scales: &'a [f32],
    pub row_biases: &'a [f32],
    pub column_scales: &'a [f32],
    pub column_biases: &'a [f32],
    /// Zero points, unless both sides are symmetric.
    pub zeros: Option<ZeroCorrection<'a>>,
}

/// Calls `f(rows, columns, input)` for every tile of `columns`, whose start is a multiple of the
/// kernel's `nr`.
fn for_each_tile(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    columns: Range<usize>,
    mut f: impl FnMut(Range<usize>, Range<usize>, TileInput),
) {
    assert_eq!(lhs.kernel().name(), rhs.kernel().name(), "operands packed for different kernels");
    assert_eq!(lhs.depth(), rhs.depth(), "operands of different depth");
    let geometry = lhs.kernel().geometry();
    let groups = lhs.depth().div_ceil(geometry.group);
    assert!(columns.end <= rhs.rows() && columns.start.is_multiple_of(geometry.nr));
    for column in columns.clone().step_by(geometry.nr) {
        let columns = column..(column + geometry.nr).min(columns.end);
        for row in (0..lhs.rows()).step_by(geometry.mr) {
            let rows = row..(row + geometry.mr).min(lhs.rows());
            let input = TileInput {
                rows: rows.len(),
                groups,
                lhs: lhs.panel(row),
                rhs: rhs.panel(column),
                init: rhs.init(column).as_ptr(),
            };
            f(rows, columns.clone(), input);
        }
    }
}

/// `out[m * stride + n]` = the exact int32 sums, zero points corrected.
pub(crate) fn int_tiles(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    zeros: Option<&ZeroCorrection<'_>>,
    out: &mut [i32],
    stride: usize,
) {
    let (kernel, nr) = (lhs.kernel(), lhs.kernel().geometry().nr);
    for_each_tile(lhs, rhs, 0..rhs.rows(), |rows, columns, input| {
        let mut sums = [0i32; MAX_TILE];
        // SAFETY: packing asserted that the kernel is available and that its tile fits MAX_TILE;
        // `for_each_tile` gives whole panels.
        unsafe { kernel.tile(input, sums.as_mut_ptr(), nr) };
        if let Some(zeros) = zeros {
            zeros.apply(&mut sums[..rows.len() * nr], nr, rows.clone(), columns.start);
        }
        copy_tile(&sums, nr, rows, columns, out, stride);
    });
}

/// `out[m * stride + n - columns.start]` = the f32 scores of `columns`, whose start is a multiple
/// of the kernel's `nr`. Where `stride` leaves room for whole panels, what follows the last column
/// is overwritten with scores of padding.
pub(crate) fn score_tiles(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    columns: Range<usize>,
    scales: &ScoreScales<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let (kernel, nr) = (lhs.kernel(), lhs.kernel().geometry().nr);
    let first = columns.start;
    assert!(lhs.rows() == 0 || out.len() >= (lhs.rows() - 1) * stride + columns.len());
    assert!(stride >= columns.len());
    assert_eq!(scales.row_scales.len(), lhs.rows());
    assert_eq!(scales.row_biases.len(), lhs.rows());
    assert!(scales.column_scales.len() >= rhs.rows().next_multiple_of(nr));
    assert!(scales.column_biases.len() >= rhs.rows().next_multiple_of(nr));
    for_each_tile(lhs, rhs, columns, |rows, columns, input| {
        let mut edge = [0f32; MAX_TILE];
        let at = rows.start * stride + columns.start - first;
        // A panel that reaches over the row's end would overwrite the next row's start, or end
        // outside of the buffer.
        let inside = columns.start - first + nr <= stride;
        let whole = inside && at + (rows.len() - 1) * stride + nr <= out.len();
        let (target, target_stride) = match whole {
            true => (out[at..].as_mut_ptr(), stride),
            false => (edge.as_mut_ptr(), nr),
        };
        let tile = ScoreTile {
            out: target,
            stride: target_stride,
            row_scales: scales.row_scales[rows.clone()].as_ptr(),
            row_biases: scales.row_biases[rows.clone()].as_ptr(),
            column_scales: scales.column_scales[columns.start..].as_ptr(),
            column_biases: scales.column_biases[columns.start..].as_ptr(),
        };
        match &scales.zeros {
            // SAFETY: the kernel is available and gets whole panels; the target holds `rows` rows
            // of `nr` scores (checked as `whole`, and `edge` holds any tile); the scales and
            // biases were asserted to cover all rows and whole panels.
            None => unsafe { kernel.score_tile(input, tile) },
            Some(zeros) => {
                let mut sums = [0i32; MAX_TILE];
                // SAFETY: as above; a tile fits MAX_TILE.
                unsafe { kernel.tile(input, sums.as_mut_ptr(), nr) };
                zeros.apply(&mut sums[..rows.len() * nr], nr, rows.clone(), columns.start);
                // SAFETY: as above.
                unsafe { tile.write(&sums, rows.len(), nr) };
            }
        }
        if !whole {
            let columns = columns.start - first..columns.end - first;
            copy_tile(&edge, nr, rows, columns, out, stride);
        }
    });
}

/// Copies the part of a tile that lies inside the result.
fn copy_tile<T: Copy>(
    tile: &[T],
    nr: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [T],
    stride: usize,
) {
    for (tile, row) in tile.chunks_exact(nr).zip(rows) {
        let at = row * stride + columns.start;
        out[at..at + columns.len()].copy_from_slice(&tile[..columns.len()]);
    }
}
