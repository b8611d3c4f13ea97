//! Weights in f32: the sums of an element are added up in the order of the depth, whatever the tile, so results
//! depend neither on how the work is divided nor on the vectors, where they have a fused multiply-add.

use crate::cpu::Level;
use crate::cpu::contracts::{Format, Rows};
use crate::product::{PackedMatrix, Start};
use std::mem::MaybeUninit;
use std::ops::Range;

pub(super) struct FloatWeights {
    /// `[K, outputs]`.
    matrix: PackedMatrix,
}

impl FloatWeights {
    /// Packs `weights`, row-major `[outputs, depth]`.
    pub(super) fn new(level: Level, weights: &[f32], (outputs, depth): (usize, usize)) -> Self {
        let mut matrix = PackedMatrix::new(level, Format::F32, 0, 0);
        matrix.reset_columns(depth, outputs);
        matrix.put_columns(0, Rows::new(weights, outputs, depth, depth), 1.0);
        Self { matrix }
    }

    pub(super) fn matrix(&self) -> &PackedMatrix {
        &self.matrix
    }

    /// Row-major `[outputs, depth]`.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        (0..self.matrix.columns()).flat_map(|i| self.matrix.column(i)).collect()
    }

    /// `bias + x·W^T` for some outputs of rows of `x`, as [`PackedMatrix::multiply`] writes them; `bias` is that
    /// of all outputs.
    pub(super) fn multiply(
        &self,
        outputs: Range<usize>,
        (x, count): (&[f32], usize),
        bias: &[f32],
        out: (&mut [MaybeUninit<f32>], usize),
    ) {
        let depth = self.matrix.depth();
        let start = Start::Row(&bias[outputs.start..]);
        self.matrix.multiply(outputs, (x, depth, count), start, out);
    }
}
