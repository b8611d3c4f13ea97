//! `x·W^T + b` in f32, with a residual added or an activation applied to sums still in registers.
//!
//! A tile is `ROWS` rows of `x` times one panel of weights over the whole depth: 6 x 4 sums of a
//! vector each, 4 vectors of weights and 1 broadcast of `x` where there are 32 registers, 6 x 2
//! where there are 16. The sums of an element are added up in the order of the depth, whatever the
//! tile, so results depend neither on the vectors nor on how the work is divided.

use super::Activation;
use super::packed::{NARROW, PackedWeights, WIDE, most_vectors};
use super::rows::Rows;
use super::tasks::{Shape, Task, in_tasks};
use pulp::{Simd, WithSimd};
use std::mem::MaybeUninit;

/// Rows of a tile, at most.
pub(super) const ROWS: usize = 6;

/// What happens to the sums before they are stored.
#[derive(Clone, Copy, Default)]
pub(super) struct Epilogue<'a> {
    /// `[rows, N]` to add, row-major.
    pub residual: Option<&'a [f32]>,
    /// Applied last.
    pub activation: Option<Activation>,
}

/// Writes `x·W^T + b`, row-major `[rows, N]`, to every element of `out`.
pub(super) fn multiply(
    x: &Rows<'_>,
    weights: &PackedWeights,
    epilogue: Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let (outputs, depth) = (weights.outputs(), weights.depth());
    assert_eq!(x.width(), depth);
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()));
    let shape = Shape { rows: x.count(), outputs, depth };
    in_tasks(shape, weights.width(), out, |buffer: &mut Vec<f32>, task| {
        let x = x.read(task.rows.clone(), buffer);
        weights.arch().dispatch(Product { x, weights, epilogue, task });
    });
}

/// [`multiply`] for a few rows one after the other, in this thread.
pub(super) fn multiply_rows(x: &[f32], weights: &PackedWeights, out: &mut [MaybeUninit<f32>]) {
    let (outputs, depth) = (weights.outputs(), weights.depth());
    if out.is_empty() {
        return;
    }
    let rows = out.len() / outputs;
    assert_eq!((x.len(), out.len()), (rows * depth, rows * outputs));
    let out = out.chunks_exact_mut(outputs).collect();
    let task = Task { rows: 0..rows, columns: 0..outputs, out };
    weights.arch().dispatch(Product { x, weights, epilogue: Epilogue::default(), task });
}

/// One task, with its rows of `x`.
struct Product<'a> {
    x: &'a [f32],
    weights: &'a PackedWeights,
    epilogue: Epilogue<'a>,
    task: Task<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match self.weights.width() / S::F32_LANES {
            WIDE if most_vectors::<S>() == WIDE => self.panels::<S, WIDE>(simd),
            _ => self.panels::<S, NARROW>(simd),
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn panels<S: Simd, const V: usize>(&mut self, simd: S) {
        let width = V * S::F32_LANES;
        assert_eq!(self.weights.width(), width, "packed for other vectors");
        for column in self.task.columns.clone().step_by(width) {
            for row in (0..self.task.rows.len()).step_by(ROWS) {
                self.tile_of_rows::<S, V>(simd, row, column);
            }
        }
    }

    /// The tile at a row and a column, with as many rows as there are left.
    #[inline(always)]
    fn tile_of_rows<S: Simd, const V: usize>(&mut self, simd: S, row: usize, column: usize) {
        match self.task.rows.len() - row {
            1 => self.tile::<S, 1, V>(simd, row, column),
            2 => self.tile::<S, 2, V>(simd, row, column),
            3 => self.tile::<S, 3, V>(simd, row, column),
            4 => self.tile::<S, 4, V>(simd, row, column),
            5 => self.tile::<S, 5, V>(simd, row, column),
            _ => self.tile::<S, ROWS, V>(simd, row, column),
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let (depth, width) = (self.weights.depth(), V * S::F32_LANES);
        let columns = column..(column + width).min(self.task.columns.end);
        let mut x = [&self.x[..0]; R];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * depth..][..depth];
        }
        let panel = S::as_simd_f32s(self.weights.panel(column)).0.as_chunks::<V>().0;
        let bias = S::as_simd_f32s(&self.weights.bias()[column..column + width]).0;
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        for (i, sums) in sums.iter_mut().enumerate() {
            sums.copy_from_slice(bias);
            if let Some(residual) = self.epilogue.residual {
                let row = (self.task.rows.start + row + i) * self.weights.outputs();
                let residual = &residual[row + columns.start..row + columns.end];
                add(simd, sums, residual);
            }
        }
        let mut sums = accumulate(simd, x, panel, sums);
        if let Some(activation) = self.epilogue.activation {
            activation.of_vectors(simd, sums.as_flattened_mut());
        }
        let start = column - self.task.columns.start;
        for (out, sums) in self.task.out[row..row + R].iter_mut().zip(&sums) {
            store::<S, V>(sums, &mut out[start..start + columns.len()]);
        }
    }
}

/// `sums[r] += x[r]·panel`: the inner loop, which must hold no store.
#[inline(always)]
fn accumulate<S: Simd, const R: usize, const V: usize>(
    simd: S,
    x: [&[f32]; R],
    panel: &[[S::f32s; V]],
    mut sums: [[S::f32s; V]; R],
) -> [[S::f32s; V]; R] {
    // Of the same length for the compiler too, which then checks no index.
    let mut same = [&x[0][..0]; R];
    for (same, x) in same.iter_mut().zip(x) {
        *same = &x[..panel.len()];
    }
    for (k, weights) in panel.iter().enumerate() {
        for (x, sums) in same.iter().zip(&mut sums) {
            let x = simd.splat_f32s(x[k]);
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = simd.mul_add_f32s(x, *weights, *sum);
            }
        }
    }
    sums
}

/// Adds as many numbers as there are.
#[inline(always)]
fn add<S: Simd, const V: usize>(simd: S, sums: &mut [S::f32s; V], numbers: &[f32]) {
    let (whole, rest) = S::as_simd_f32s(numbers);
    for (sum, x) in sums.iter_mut().zip(whole) {
        *sum = simd.add_f32s(*sum, *x);
    }
    if let Some(sum) = sums.get_mut(whole.len()) {
        *sum = simd.add_f32s(*sum, simd.partial_load_f32s(rest));
    }
}

/// Writes as many sums as there is room for.
#[inline(always)]
fn store<S: Simd, const V: usize>(sums: &[S::f32s; V], out: &mut [MaybeUninit<f32>]) {
    let (whole, rest) = S::as_uninit_mut_simd_f32s(out);
    for (out, sum) in whole.iter_mut().zip(sums) {
        out.write(*sum);
    }
    if let Some(sum) = sums.get(whole.len()) {
        let lanes = pulp::bytemuck::cast_slice::<S::f32s, f32>(std::slice::from_ref(sum));
        for (out, x) in rest.iter_mut().zip(lanes) {
            out.write(*x);
        }
    }
}
