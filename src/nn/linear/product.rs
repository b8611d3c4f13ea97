//! `x·W^T + b`, and what follows while the sums are in L1 or L2: an activation, a residual, a norm.

use super::int8::{Buffers, Int8Rows, PANEL};
use super::tasks::{BLOCK, Grid, Task};
use super::weights::{Packed, Weights};
use crate::memory::{Footprint, Kept, footprint, overwrite, prefetch_slice, written};
use crate::nn::activation::Activation;
use crate::nn::layer_norm::FusedNorm;
use crate::parallel::Work;
use crate::product::Int16Rows;
use crate::view::View;
use pulp::{Simd, WithSimd};
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
    prepared: Prepared,
    buffers: Buffers,
    /// Of the rows and one panel.
    sums: Vec<f32>,
    /// The rows between two layers.
    inner: Vec<f32>,
}

/// Rows as weights multiply them, where those are not f32.
#[derive(Default)]
struct Prepared {
    int16: Int16Rows,
    int8: Int8Rows,
}

/// All rows of a call, block by block, where tasks share them.
#[derive(Default)]
struct Blocks(Vec<Prepared>);

footprint!(Scratch: gathered, prepared, buffers, sums, inner);
footprint!(Prepared: int16, int8);

impl Footprint for Blocks {
    fn footprint(&self) -> usize {
        let rows: usize = self.0.iter().map(Footprint::footprint).sum();
        self.0.capacity() * size_of::<Prepared>() + rows
    }
}

thread_local! {
    static SCRATCH: Kept<Scratch> = const { Kept::new() };
    static BLOCKS: Kept<Blocks> = const { Kept::new() };
}

/// Bytes of either that a thread keeps: blocks of rows between layers that are ten thousand numbers wide, and
/// a thousand rows in int8 of a few thousand numbers.
const KEPT: usize = 4 << 20;

/// Writes `x·W^T + b`, row-major `[rows, N]`, and what follows it to every element of `out`.
pub(super) fn multiply(
    x: &View<'_>,
    layer: &Packed,
    epilogue: Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let (rows, outputs) = (row_count(x, layer), layer.weights.outputs());
    assert_eq!(out.len(), rows * outputs);
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()));
    if out.is_empty() {
        return;
    }
    let work = layer.work(rows);
    let grid = Grid::new(rows, &layer.weights, work.parts());
    let job = Job { layer, epilogue, whole_rows: grid.has_whole_rows(outputs) };
    Kept::with(&BLOCKS, KEPT, |Blocks(blocks)| {
        let weights = &layer.weights;
        let shared = !job.whole_rows && !matches!(weights, Weights::Float(_));
        if shared {
            grid.prepare(x, weights, blocks);
        }
        work.for_each(grid.tasks(out, outputs), |task| {
            Kept::with(&SCRATCH, KEPT, |Scratch { gathered, prepared, buffers, sums, .. }| {
                if shared {
                    let prepared = &blocks[task.block];
                    return job.run(task, &[], prepared, sums);
                }
                let x = x.merged(task.rows.clone(), gathered);
                prepared.put(weights, (x, task.rows.len()), buffers);
                job.run(task, x, prepared, sums);
            });
        });
    });
    job.finish(out);
}

/// Writes what `second` makes of `activation(x·W^T + b)` of `first`, and what follows it, to every element of
/// `out`: block of rows by block, so that what is between the two layers stays in a cache, where there are
/// blocks for all threads.
pub(super) fn multiply_twice(
    x: &View<'_>,
    (first, activation): (&Packed, Activation),
    second: &Packed,
    epilogue: Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let rows = row_count(x, first);
    let (inner, outputs) = (first.weights.outputs(), second.weights.outputs());
    assert_eq!((inner, out.len()), (second.weights.depth(), rows * outputs));
    if out.is_empty() {
        return;
    }
    let between = Epilogue { activation: Some(activation), ..Epilogue::default() };
    let work = first.work(rows).and(second.work(rows));
    let grid = Grid::new(rows, &second.weights, work.parts());
    if !grid.has_whole_rows(outputs) {
        // SAFETY: `multiply` writes every element.
        let x = unsafe { written(rows * inner, |out| multiply(x, first, between, out)) };
        return multiply(&View::of_slice(&x, rows, inner), second, epilogue, out);
    }
    let first = Job { layer: first, epilogue: between, whole_rows: true };
    let second = Job { layer: second, epilogue, whole_rows: true };
    work.for_each(grid.tasks(out, outputs), |task| {
        Kept::with(
            &SCRATCH,
            KEPT,
            |Scratch { gathered, prepared, buffers, sums, inner: between }| {
                let count = task.rows.len();
                let x = x.merged(task.rows.clone(), gathered);
                prepared.put(&first.layer.weights, (x, count), buffers);
                between.resize((count * inner).max(between.len()), 0.0);
                let between = &mut between[..count * inner];
                // SAFETY: the job writes numbers.
                let rows = unsafe { overwrite(between) };
                let out = rows.chunks_mut(inner.max(1)).collect();
                let of_first = Task { columns: 0..inner, out, rows: task.rows.clone(), ..task };
                first.run(of_first, x, prepared, sums);
                prepared.put(&second.layer.weights, (between, count), buffers);
                second.run(task, between, prepared, sums);
            },
        );
    });
}

/// Rows of `x`, which fit the layer.
fn row_count(x: &View<'_>, layer: &Packed) -> usize {
    let [b, n, heads, width] = x.dims();
    assert_eq!(heads * width, layer.weights.depth());
    b * n
}

impl Packed {
    /// How much it is to multiply as many rows.
    fn work(&self, rows: usize) -> Work {
        let (outputs, depth) = (self.weights.outputs(), self.weights.depth());
        let macs = rows.saturating_mul(outputs).saturating_mul(depth);
        match &self.weights {
            Weights::Float(_) => Work { float_macs: macs, ..Work::default() },
            // As fast as probabilities times values, which are multiplied the same way.
            Weights::Int16(_) => Work { value_macs: macs, ..Work::default() },
            Weights::Int8(_) => Work { int8_macs: macs, ..Work::default() },
        }
    }
}

impl Grid {
    /// Each block of rows of `x` as weights of integers multiply them, once for all tasks that share it.
    fn prepare(&self, x: &View<'_>, weights: &Weights, blocks: &mut Vec<Prepared>) {
        let [b, n, ..] = x.dims();
        let ranges = self.row_blocks(b * n);
        blocks.resize_with(blocks.len().max(ranges.len()), Prepared::default);
        // Rotated, quantized and packed.
        let work = Work { elements: x.len(), ..Work::default() };
        work.for_each(ranges.into_iter().zip(blocks).collect(), |(rows, block)| {
            Kept::with(&SCRATCH, KEPT, |Scratch { gathered, buffers, .. }| {
                let count = rows.len();
                block.put(weights, (x.merged(rows, gathered), count), buffers);
            });
        });
    }
}

impl Prepared {
    /// `count` rows of f32; those that weights multiply as they are leave nothing here.
    fn put(&mut self, weights: &Weights, (x, count): (&[f32], usize), buffers: &mut Buffers) {
        match weights {
            Weights::Float(_) => {}
            Weights::Int16(weights) => weights.quantize(x, count, &mut self.int16),
            Weights::Int8(weights) => weights.quantize(x, count, &mut self.int8, buffers),
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
    /// Panel by panel, of rows `x`, prepared unless weights multiply them as they are.
    fn run(&self, mut task: Task<'_>, x: &[f32], prepared: &Prepared, sums: &mut Vec<f32>) {
        let (outputs, width) = (self.layer.weights.outputs(), self.layer.weights.panel_width());
        let rows = task.rows.len();
        sums.resize((BLOCK.max(rows) * width).max(sums.len()), 0.0);
        let sums = &mut sums[..rows * width];
        for first in task.columns.clone().step_by(width) {
            let columns = first..(first + width).min(task.columns.end);
            // SAFETY: `multiply` writes numbers.
            let out = unsafe { overwrite(sums) };
            self.multiply(columns.clone(), (x, rows), prepared, (out, width));
            let at = first - task.columns.start;
            let panel = Store {
                sums,
                width,
                residual: (self.epilogue.residual)
                    .map(|all| (&all[task.rows.start * outputs + first..], outputs)),
                activation: self.epilogue.activation,
                out: &mut task.out,
                at: at..at + columns.len(),
                foresee: self.whole_rows,
            };
            crate::cpu::vectors().dispatch(panel);
        }
        if let (Some(norm), true) = (self.epilogue.norm, self.whole_rows) {
            for row in task.out {
                // SAFETY: the panels have covered the row.
                norm.normalize_rows(unsafe { row.assume_init_mut() });
            }
        }
    }

    /// `bias + x·W^T` of one panel.
    fn multiply(
        &self,
        outputs: Range<usize>,
        x: (&[f32], usize),
        prepared: &Prepared,
        sums: (&mut [MaybeUninit<f32>], usize),
    ) {
        let bias = &self.layer.bias;
        match &self.layer.weights {
            Weights::Float(weights) => weights.multiply(outputs, x, bias, sums),
            Weights::Int16(weights) => weights.multiply(outputs, &prepared.int16, bias, sums),
            Weights::Int8(weights) => weights.multiply(outputs, &prepared.int8, bias, sums),
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

/// What follows the sums of a panel, on their way to the result.
struct Store<'a, 'b> {
    /// Rows of `width`, which are whole vectors.
    sums: &'a [f32],
    width: usize,
    /// From the panel's first element on, and what lies between two rows.
    residual: Option<(&'a [f32], usize)>,
    activation: Option<Activation>,
    out: &'a mut [&'b mut [MaybeUninit<f32>]],
    /// Where the panel is in each row of `out`.
    at: Range<usize>,
    /// Whether the result and the residual are more than a cache holds.
    foresee: bool,
}

impl WithSimd for Store<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { sums, width, residual, activation, out, at, foresee } = self;
        for (row, (sums, out)) in sums.chunks_exact(width).zip(out).enumerate() {
            let (out, behind) = out[at.start..].split_at_mut(at.len());
            // Of the next panel, which lies elsewhere in every row.
            let next = if foresee { behind.len().min(width) } else { 0 };
            prefetch_slice(&behind[..next]);
            let residual = residual.map(|(all, stride)| {
                let (residual, behind) = all[row * stride..].split_at(out.len());
                prefetch_slice(&behind[..next]);
                residual
            });
            finish(simd, &sums[..out.len()], (residual, activation), out);
        }
    }
}

/// Some sums of a row, with what follows them, to as many elements of the result. What is left over after
/// whole vectors is a vector too, so that every element goes through the same operations.
#[inline(always)]
fn finish<S: Simd>(
    simd: S,
    sums: &[f32],
    (residual, activation): (Option<&[f32]>, Option<Activation>),
    out: &mut [MaybeUninit<f32>],
) {
    let (sums, sums_rest) = S::as_simd_f32s(sums);
    let (out, out_rest) = S::as_uninit_mut_simd_f32s(out);
    let (residual, residual_rest) = residual.map(S::as_simd_f32s).unzip();
    let (fours, ones) = sums.as_chunks::<FOUR>();
    let (out_fours, out_ones) = out.as_chunks_mut::<FOUR>();
    let (residual_fours, residual_ones) = residual.map(|x| x.as_chunks::<FOUR>()).unzip();
    for (i, (sums, out)) in fours.iter().zip(out_fours).enumerate() {
        let residual = residual_fours.map(|all| all[i]);
        *out = finished(simd, *sums, residual, activation).map(MaybeUninit::new);
    }
    for (i, (sums, out)) in ones.iter().zip(out_ones).enumerate() {
        let residual = residual_ones.map(|all| [all[i]]);
        let [x] = finished(simd, [*sums], residual, activation);
        out.write(x);
    }
    if !sums_rest.is_empty() {
        let residual = residual_rest.map(|rest| [simd.partial_load_f32s(rest)]);
        let [x] = finished(simd, [simd.partial_load_f32s(sums_rest)], residual, activation);
        let mut rest = [0.0; PANEL];
        let rest = &mut rest[..out_rest.len()];
        simd.partial_store_f32s(rest, x);
        out_rest.write_copy_of_slice(rest);
    }
}

/// Vectors at a time: 64 numbers in vectors of 16.
const FOUR: usize = 4;

/// Sums with what follows them.
#[inline(always)]
fn finished<S: Simd, const N: usize>(
    simd: S,
    mut x: [S::f32s; N],
    residual: Option<[S::f32s; N]>,
    activation: Option<Activation>,
) -> [S::f32s; N] {
    if let Some(residual) = residual {
        for (x, residual) in x.iter_mut().zip(residual) {
            *x = simd.add_f32s(*x, residual);
        }
    }
    match activation {
        Some(activation) => activation.of_vectors(simd, x),
        None => x,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, Precision};
    use candle_core::{DType, Device, Tensor};

    #[test]
    fn a_thread_keeps_little_of_a_large_product() {
        let kept = || {
            let scratch = Kept::with(&SCRATCH, KEPT, |scratch| scratch.footprint());
            scratch.max(Kept::with(&BLOCKS, KEPT, |blocks| blocks.footprint()))
        };
        for precision in [Precision::F32, Precision::Int16, Precision::Int8] {
            for (depth, outputs, rows) in [(64, 64, 48), (1 << 16, 16, 48), (4096, 16, 4000)] {
                let weight = Tensor::ones((outputs, depth), DType::F32, &Device::Cpu).unwrap();
                let x = Tensor::ones((depth, rows), DType::F32, &Device::Cpu).unwrap();
                let linear = Linear::new(&weight, None, precision).unwrap();
                linear.forward(&x.t().unwrap()).unwrap();
                let kept = kept();
                assert!(kept <= KEPT, "{precision:?} {depth}: {kept}");
            }
        }
    }
}
