//! The loops around a kernel: panels of the right side outermost, so that one stays in L1 while
//! all rows of the left side pass over it.

use super::pack::{PackedLhs, PackedRhs};
use crate::cpu::contracts::{Geometry, MAX_TILE, ScoreTile, TileInput};
use std::mem::MaybeUninit;
use std::ops::Range;

/// What turns int32 sums into f32 scores; see [`ScoreTile`] for the formula. The column slices
/// are padded to whole panels.
pub(crate) struct ScoreScales<'a> {
    pub row_scales: &'a [f32],
    /// `[blocks, rows]`: a bias for each block of columns.
    pub row_biases: &'a [f32],
    /// Columns of a block, a multiple of the kernel's `nr` unless there is only one.
    pub bias_columns: usize,
    pub column_scales: &'a [f32],
    pub column_biases: &'a [f32],
}

/// Calls `f(columns, input)` for every panel of `columns`, whose start is a multiple of the
/// kernel's `nr`; `input` is all rows of the left side against it.
fn for_each_panel(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    columns: Range<usize>,
    mut f: impl FnMut(Range<usize>, TileInput),
) {
    assert_eq!(lhs.level(), rhs.level(), "operands packed for different levels");
    assert_eq!(lhs.depth(), rhs.depth(), "operands of different depth");
    let nr = lhs.level().int8_product().geometry.nr;
    assert!(columns.end <= rhs.rows() && columns.start.is_multiple_of(nr));
    if lhs.rows() == 0 {
        return;
    }
    for column in columns.clone().step_by(nr) {
        f(column..(column + nr).min(columns.end), lhs.against(rhs, column));
    }
}

/// Calls `f(rows, input)` for every tile of a panel.
fn for_each_tile(mr: usize, panel: TileInput, mut f: impl FnMut(Range<usize>, TileInput)) {
    for row in (0..panel.rows).step_by(mr) {
        // SAFETY: `PackedLhs::against` gives rows that are there.
        let input = unsafe { panel.rows_from(row, mr) };
        f(row..row + input.rows, input);
    }
}

/// `out[m * stride + n]` = the exact int32 sums, zero points corrected. Every one is written.
pub(crate) fn int_tiles(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    out: &mut [MaybeUninit<i32>],
    stride: usize,
) {
    let (level, Geometry { mr, nr, .. }) = (lhs.level(), lhs.level().int8_product().geometry);
    for_each_panel(lhs, rhs, 0..rhs.rows(), |columns, panel| {
        for_each_tile(mr, panel, |rows, input| {
            let mut sums = [0i32; MAX_TILE];
            // SAFETY: packing asserted that a tile fits MAX_TILE; the input is 1..=mr rows and a
            // whole panel, which live as long as `lhs` and `rhs`.
            unsafe { level.int8_tile(input, sums.as_mut_ptr(), nr) };
            copy_tile(&sums, nr, rows, columns.clone(), out, stride);
        });
    });
}

/// `out[m * stride + n - columns.start]` = the f32 scores of `columns`, whose start is a multiple
/// of the kernel's `nr`. Where `stride` leaves room for whole panels, what follows the last column
/// is overwritten with scores of padding. Every score of `columns` is written.
pub(crate) fn score_tiles(
    lhs: &PackedLhs,
    rhs: &PackedRhs,
    columns: Range<usize>,
    scales: &ScoreScales<'_>,
    out: &mut [MaybeUninit<f32>],
    stride: usize,
) {
    let (level, Geometry { mr, nr, .. }) = (lhs.level(), lhs.level().int8_product().geometry);
    let first = columns.start;
    scales.check(lhs, rhs, nr);
    assert!(stride >= columns.len());
    let before_last = lhs.rows().saturating_sub(1).checked_mul(stride);
    let needed = before_last.and_then(|before| before.checked_add(columns.len()));
    assert!(lhs.rows() == 0 || needed.is_some_and(|needed| out.len() >= needed));
    let mut edge = [0f32; MAX_TILE];
    for_each_panel(lhs, rhs, columns, |columns, panel| {
        let at = columns.start - first;
        // A panel that reaches over the row's end would overwrite the next row's start, or end
        // outside of the buffer.
        let whole = at + nr <= stride && at + (panel.rows - 1) * stride + nr <= out.len();
        if whole {
            let tile = scales.tile(out[at..].as_mut_ptr().cast(), stride, (0, columns.start));
            // SAFETY: as in `int_tiles` for the panel. The scales and biases were checked to cover
            // all rows and whole panels of columns, and every row of the panel lies inside `out`.
            return unsafe { level.int8_scores(panel, tile) };
        }
        for_each_tile(mr, panel, |rows, input| {
            let tile = scales.tile(edge.as_mut_ptr(), nr, (rows.start, columns.start));
            // SAFETY: as above; `edge` holds any tile.
            unsafe { level.int8_scores(input, tile) };
            copy_tile(&edge, nr, rows, at..at + columns.len(), out, stride);
        });
    });
}

impl ScoreScales<'_> {
    /// Panics unless there is something for every row and for whole panels of columns.
    fn check(&self, lhs: &PackedLhs, rhs: &PackedRhs, nr: usize) {
        let columns = rhs.rows().next_multiple_of(nr);
        assert_eq!(self.row_scales.len(), lhs.rows());
        // Blocks of columns that have a bias of their own for each row.
        let blocks = rhs.rows().div_ceil(self.bias_columns).max(1);
        assert_eq!(Some(self.row_biases.len()), lhs.rows().checked_mul(blocks));
        assert!(blocks == 1 || self.bias_columns.is_multiple_of(nr));
        assert!(self.column_scales.len() >= columns);
        assert!(self.column_biases.len() >= columns);
    }

    /// A tile from `row` and `column` on that goes to `out`.
    fn tile(&self, out: *mut f32, stride: usize, (row, column): (usize, usize)) -> ScoreTile {
        let bias = column / self.bias_columns * self.row_scales.len() + row;
        ScoreTile {
            out,
            stride,
            row_scales: self.row_scales[row..].as_ptr(),
            row_biases: self.row_biases[bias..].as_ptr(),
            column_scales: self.column_scales[column..].as_ptr(),
            column_biases: self.column_biases[column..].as_ptr(),
        }
    }
}

/// Copies the part of a tile that lies inside the result.
fn copy_tile<T: Copy>(
    tile: &[T],
    nr: usize,
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [MaybeUninit<T>],
    stride: usize,
) {
    for (tile, row) in tile.chunks_exact(nr).zip(rows) {
        let at = row * stride + columns.start;
        for (to, &from) in out[at..at + columns.len()].iter_mut().zip(tile) {
            to.write(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pack::RowSums;
    use super::*;
    use crate::cpu::{Level, runnable};
    use crate::memory::overwrite;
    use proptest::prelude::*;
    use proptest::test_runner::{TestRng, TestRunner};

    /// What the output holds where no kernel may write, and wherever one forgot to.
    const POISON: f32 = f32::from_bits(0x7fc0_dead);

    /// A multiple of every kernel's `nr`.
    const BIAS_COLUMNS: usize = 64;

    /// Operands with their scales and zero points.
    struct Case {
        dims: (usize, usize, usize),
        lhs: Vec<i8>,
        rhs: Vec<i8>,
        row_zeros: Vec<i32>,
        column_zeros: Vec<i32>,
        /// Scales and biases of rows, then of columns.
        factors: [Vec<f32>; 4],
    }

    impl Case {
        fn new((m, n, depth): (usize, usize, usize), affine: bool, mut rng: TestRng) -> Self {
            let codes = |rng: &mut TestRng, len| (0..len).map(|_| rng.random::<i8>()).collect();
            let zeros = |rng: &mut TestRng, len| {
                (0..len).map(|_| if affine { i32::from(rng.random::<i8>()) } else { 0 }).collect()
            };
            let floats =
                |rng: &mut TestRng, len| (0..len).map(|_| rng.random_range(-2f32..2.0)).collect();
            let rng = &mut rng;
            Self {
                dims: (m, n, depth),
                lhs: codes(rng, m * depth),
                rhs: codes(rng, n * depth),
                row_zeros: zeros(rng, m),
                column_zeros: zeros(rng, n),
                factors: [
                    floats(rng, m),
                    floats(rng, m * n.div_ceil(BIAS_COLUMNS).max(1)),
                    floats(rng, n),
                    floats(rng, n),
                ],
            }
        }

        fn expected(&self, row: usize, column: usize) -> f32 {
            let depth = self.dims.2;
            let (za, zb) = (self.row_zeros[row], self.column_zeros[column]);
            let a = &self.lhs[row * depth..(row + 1) * depth];
            let b = &self.rhs[column * depth..(column + 1) * depth];
            let products =
                a.iter().zip(b).map(|(&a, &b)| (i32::from(a) - za) * (i32::from(b) - zb));
            let [row_scales, row_biases, column_scales, column_biases] = &self.factors;
            let scaled = products.sum::<i32>() as f32 * row_scales[row] * column_scales[column];
            scaled + column_biases[column] + row_biases[column / BIAS_COLUMNS * self.dims.0 + row]
        }

        /// The scores of `level`, rows `stride` elements apart, in poisoned memory.
        fn run(&self, level: Level, stride: usize) -> Vec<f32> {
            let (m, n, depth) = self.dims;
            let sums = |codes: &[i8], rows: usize| -> Vec<i32> {
                let row = |row: usize| &codes[row * depth..(row + 1) * depth];
                (0..rows).map(|i| row(i).iter().map(|&q| i32::from(q)).sum()).collect()
            };
            let padded = n.next_multiple_of(level.int8_product().geometry.nr);
            let pad_f32 = |x: &[f32]| [x, &vec![0.0; padded - n]].concat();
            let mut lhs = PackedLhs::new(level);
            let affine = self.row_zeros.iter().chain(&self.column_zeros).any(|&zero| zero != 0);
            let (row_sums, column_sums) = (sums(&self.lhs, m), sums(&self.rhs, n));
            let rows = RowSums { sums: &row_sums, zeros: &self.row_zeros };
            lhs.put(&self.lhs, m, depth, affine.then_some(rows));
            let mut rhs = PackedRhs::new(level, n, depth, affine);
            rhs.put(0, &self.rhs, RowSums { sums: &column_sums, zeros: &self.column_zeros });
            let scales = ScoreScales {
                row_scales: &self.factors[0],
                row_biases: &self.factors[1],
                bias_columns: BIAS_COLUMNS,
                column_scales: &pad_f32(&self.factors[2]),
                column_biases: &pad_f32(&self.factors[3]),
            };
            let mut out = vec![POISON; m * stride];
            // SAFETY: `score_tiles` writes numbers.
            let all = unsafe { overwrite(&mut out) };
            score_tiles(&lhs, &rhs, 0..n, &scales, all, stride);
            out
        }

        /// Compares every level with the formula, bit by bit.
        fn check(&self, stride: usize) {
            for level in runnable() {
                let room = stride >= self.dims.1.next_multiple_of(level.int8_product().geometry.nr);
                for (i, x) in self.run(level, stride).iter().enumerate() {
                    let (row, column) = (i / stride, i % stride);
                    if room && column >= self.dims.1 {
                        continue; // may hold scores of padding
                    }
                    let expected =
                        if column < self.dims.1 { self.expected(row, column) } else { POISON };
                    let at = (level, self.dims, row, column);
                    assert_eq!(x.to_bits(), expected.to_bits(), "{at:?}: {x} {expected}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn every_level_writes_the_same_scores(
            dims in (0usize..20, 0usize..140, 0usize..70),
            gap in 0usize..9,
            affine: bool,
            rng in any::<u64>().prop_perturb(|_, rng| rng),
        ) {
            Case::new(dims, affine, rng).check(dims.1 + gap);
        }
    }

    #[test]
    fn scores_on_both_sides_of_every_edge() {
        let mut runner = TestRunner::deterministic();
        for level in runnable() {
            let geometry = level.int8_product().geometry;
            for m in 1..=geometry.mr + 1 {
                for n in [1, geometry.nr - 1, geometry.nr, geometry.nr + 1] {
                    for depth in [0, 1, geometry.group, 65] {
                        let affine = (m + n + depth) % 2 == 0;
                        Case::new((m, n, depth), affine, runner.new_rng()).check(n + m % 2);
                    }
                }
            }
        }
    }
}
