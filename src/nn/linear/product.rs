//! `x·W^T + b`, and what follows while the sums are in L1 or L2: an activation, a residual, a norm.

use super::float::{FloatRows, FloatWeights};
use super::int8::{Buffers, Int8Rows, Int8Weights};
use super::tasks::{BLOCK, Grid, Task};
use super::{Activation, Packed, Weights};
use crate::cpu::plain::widest;
use crate::memory::overwrite;
use crate::nn::layer_norm::FusedNorm;
use crate::parallel::Work;
use crate::view::View;
use pulp::{Simd, WithSimd};
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

/// What happens to the sums before they are stored.
#[derive(Clone, Copy, Default)]
pub(super) struct Epilogue<'a> {
    /// `[rows, N]` to add, row-major.
    pub residual: Option<&'a [f32]>,
    /// Applied after the residual.
    pub activation: Option<Activation>,
    /// Of whole rows, last.
    pub norm: Option<&'a FusedNorm>,
}

/// What a thread works in, from one task to the next.
#[derive(Default)]
struct Scratch {
    /// Rows of `x` that do not lie one after the other.
    gathered: Vec<f32>,
    /// The rows of `x` in bf16.
    rounded: Vec<u16>,
    int8: Buffers,
    /// Of the rows and one panel.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    /// All rows of a call in int8, block by block. They are taken while a call lasts, because its thread may
    /// begin another one while it waits for the others.
    static BLOCKS: RefCell<Vec<Int8Rows>> = RefCell::default();
}

/// Writes `x·W^T + b`, row-major `[rows, N]`, and what follows it to every element of `out`.
pub(super) fn multiply(
    x: &View<'_>,
    layer: &Packed,
    epilogue: Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let [b, n, heads, width] = x.dims();
    let (rows, outputs, depth) = (b * n, layer.weights.outputs(), layer.weights.depth());
    assert_eq!((heads * width, out.len()), (depth, rows * outputs));
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()));
    if out.is_empty() {
        return;
    }
    let macs = rows.saturating_mul(outputs).saturating_mul(depth);
    match &layer.weights {
        Weights::Float(weights) => {
            let work = Work { float_macs: macs, ..Work::default() };
            let grid = Grid::new((rows, outputs), layer.weights.panel_width(), work.parts());
            let job = Job { layer, epilogue, whole_rows: grid.has_whole_rows(outputs) };
            let run = |task: Task<'_>| {
                SCRATCH.with_borrow_mut(|Scratch { gathered, rounded, sums, .. }| {
                    let x = x.merged(task.rows.clone(), gathered);
                    let x = weights.rows(x, task.rows.len(), rounded);
                    job.run(task, &Left::Float(weights, x), sums);
                });
            };
            work.for_each(grid.tasks(out, outputs), run);
            job.finish(out);
        }
        Weights::Int8(weights) => {
            let work = Work { int8_macs: macs, ..Work::default() };
            let grid = Grid::new((rows, outputs), layer.weights.panel_width(), work.parts());
            let job = Job { layer, epilogue, whole_rows: grid.has_whole_rows(outputs) };
            let mut blocks = BLOCKS.take();
            let count = grid.quantize(x, weights, &mut blocks);
            let run = |task: Task<'_>| {
                let left = Left::Int8(weights, &blocks[..count][task.block]);
                SCRATCH.with_borrow_mut(|scratch| job.run(task, &left, &mut scratch.sums));
            };
            work.for_each(grid.tasks(out, outputs), run);
            BLOCKS.set(blocks);
            job.finish(out);
        }
    }
}

impl Grid {
    /// Each block of rows of `x` in int8, once for all of its outputs; returns how many blocks.
    fn quantize(&self, x: &View<'_>, weights: &Int8Weights, blocks: &mut Vec<Int8Rows>) -> usize {
        let [b, n, ..] = x.dims();
        let ranges = self.row_blocks(b * n);
        blocks.resize_with(blocks.len().max(ranges.len()), Int8Rows::default);
        // Rotated, quantized and packed.
        let work = Work { elements: x.len(), ..Work::default() };
        let count = ranges.len();
        work.for_each(ranges.into_iter().zip(blocks).collect(), |(rows, block)| {
            SCRATCH.with_borrow_mut(|Scratch { gathered, int8, .. }| {
                let count = rows.len();
                weights.quantize(x.merged(rows, gathered), count, block, int8);
            });
        });
        count
    }
}

/// The rows of a task, as the weights multiply them.
enum Left<'a> {
    Float(&'a FloatWeights, FloatRows<'a>),
    Int8(&'a Int8Weights, &'a Int8Rows),
}

impl Left<'_> {
    /// `bias + x·W^T` of one panel, `bias` that of all outputs.
    fn multiply(
        &self,
        outputs: Range<usize>,
        bias: &[f32],
        sums: (&mut [MaybeUninit<f32>], usize),
    ) {
        match self {
            Self::Float(weights, rows) => {
                weights.multiply(outputs.clone(), rows, &bias[outputs.start..], sums);
            }
            Self::Int8(weights, rows) => weights.multiply(outputs, rows, bias, sums),
        }
    }
}

/// What all tasks of a call have in common.
struct Job<'a> {
    layer: &'a Packed,
    epilogue: Epilogue<'a>,
    /// Whether a task has all outputs of its rows.
    whole_rows: bool,
}

impl Job<'_> {
    /// Panel by panel.
    fn run(&self, mut task: Task<'_>, left: &Left<'_>, sums: &mut Vec<f32>) {
        let (outputs, width) = (self.layer.weights.outputs(), self.layer.weights.panel_width());
        let rows = task.rows.len();
        sums.resize((BLOCK.max(rows) * width).max(sums.len()), 0.0);
        let sums = &mut sums[..rows * width];
        for first in task.columns.clone().step_by(width) {
            let columns = first..(first + width).min(task.columns.end);
            // SAFETY: `multiply` writes numbers.
            let out = unsafe { overwrite(sums) };
            left.multiply(columns.clone(), &self.layer.bias, (out, width));
            if let Some(residual) = self.epilogue.residual {
                let rows = sums.chunks_exact_mut(width).zip(task.rows.clone());
                for (sums, row) in rows {
                    let residual = &residual[row * outputs..][columns.clone()];
                    widest!(add, (sums, residual), (&mut [f32], &[f32]) => ());
                }
            }
            if let Some(activation) = self.epilogue.activation {
                crate::cpu::vectors().dispatch(Activate { activation, sums });
            }
            let at = first - task.columns.start;
            for (out, sums) in task.out.iter_mut().zip(sums.chunks_exact(width)) {
                out[at..at + columns.len()].write_copy_of_slice(&sums[..columns.len()]);
            }
        }
        if let (Some(norm), true) = (self.epilogue.norm, self.whole_rows) {
            for row in task.out {
                // SAFETY: the panels have covered the row.
                norm.normalize_rows(unsafe { row.assume_init_mut() });
            }
        }
    }

    /// What needs whole rows, once all tasks are done, unless they did it.
    fn finish(&self, out: &mut [MaybeUninit<f32>]) {
        if let (Some(norm), false) = (self.epilogue.norm, self.whole_rows) {
            // SAFETY: the tasks have covered the result.
            norm.normalize(unsafe { out.assume_init_mut() });
        }
    }
}

#[inline(always)]
fn add((sums, others): (&mut [f32], &[f32])) {
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
}

/// An activation of sums, which are whole vectors as panels are.
struct Activate<'a> {
    activation: Activation,
    sums: &'a mut [f32],
}

impl WithSimd for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (whole, rest) = S::as_mut_simd_f32s(self.sums);
        assert!(rest.is_empty(), "{} sums beside whole vectors", rest.len());
        self.activation.of_vectors(simd, whole);
    }
}
