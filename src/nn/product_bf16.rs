//! `x·W^T + b` with operands rounded to bf16 and f32 sums, where the processor multiplies bf16:
//! half the instructions of the product in f32.
//!
//! The kernel is that of the room `pv`, which adds to sums in memory. Those of a task and a panel
//! stay in L1: they start from the bias and the residual, and are activated and stored after the
//! whole depth.

use super::Activation;
use super::product::Epilogue;
use super::rows::Rows;
use super::tasks::{Shape, Task, in_tasks};
use crate::pv::{self, KEY_GROUP, PackedValues, ValueFormat, bf16_bits};
use crate::simd::widest;
use pulp::{Arch, Simd, WithSimd};
use std::mem::MaybeUninit;

/// What a thread works in, from one task to the next.
#[derive(Default)]
struct Buffers {
    /// Rows of `x` that do not lie one after the other.
    gathered: Vec<f32>,
    /// The rows of `x` in bf16.
    rounded: Vec<u16>,
    /// Of the rows and one panel.
    sums: Vec<f32>,
}

/// Outputs of a panel, at most: as many as a tile of the kernel has.
const PANEL: usize = 64;

/// Weights and bias of a linear layer, the weights rounded to bf16.
pub(super) struct Bf16Weights {
    /// [`PANEL`] outputs each, as high as the layer is deep; the last one may be narrower.
    panels: Vec<PackedValues>,
    bias: Vec<f32>,
    depth: usize,
}

impl Bf16Weights {
    /// Packs `weights`, row-major `[bias.len(), depth]`: `None` where the processor does not
    /// multiply bf16, or bf16 cannot hold one of the weights.
    pub(super) fn round(weights: &[f32], bias: &[f32], depth: usize) -> Option<Self> {
        assert_eq!(weights.len(), bias.len() * depth);
        let kernel = pv::select(ValueFormat::Bf16)?;
        let pack = |first: usize| {
            let outputs = first..(first + PANEL).min(bias.len());
            let columns = (0..depth)
                .flat_map(|k| outputs.clone().map(move |output| weights[output * depth + k]));
            let mut panel = PackedValues::new(kernel, depth, outputs.len());
            panel.put(0, &columns.collect::<Vec<_>>());
            panel.exceptions().is_empty().then_some(panel)
        };
        let panels = (0..bias.len()).step_by(PANEL).map(pack).collect::<Option<_>>()?;
        Some(Self { panels, bias: bias.to_vec(), depth })
    }

    /// N.
    pub(super) fn outputs(&self) -> usize {
        self.bias.len()
    }

    /// K.
    pub(super) fn depth(&self) -> usize {
        self.depth
    }

    /// As many as outputs.
    pub(super) fn bias(&self) -> &[f32] {
        &self.bias
    }

    /// Writes `x·W^T + b`, row-major `[rows, N]`, to every element of `out`.
    pub(super) fn multiply(
        &self,
        x: &Rows<'_>,
        epilogue: Epilogue<'_>,
        out: &mut [MaybeUninit<f32>],
    ) {
        assert_eq!(x.width(), self.depth);
        assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()));
        let shape = Shape { rows: x.count(), outputs: self.outputs(), depth: self.depth };
        in_tasks(shape, PANEL, out, |buffers: &mut Buffers, task| {
            let Buffers { gathered, rounded, sums } = buffers;
            let stride = self.depth.next_multiple_of(KEY_GROUP);
            let rows = x.read(task.rows.clone(), gathered);
            rounded.resize(task.rows.len() * stride, 0);
            if self.depth > 0 {
                let job = (rows, self.depth, stride, &mut rounded[..]);
                widest!(round_rows, job, (&[f32], usize, usize, &mut [u16]) => ());
            }
            self.panels(epilogue, task, (rounded, stride), sums);
        });
    }

    /// One task, from its rows of `x`, which are `stride` apart.
    fn panels(
        &self,
        epilogue: Epilogue<'_>,
        mut task: Task<'_>,
        (x, stride): (&[u16], usize),
        sums: &mut Vec<f32>,
    ) {
        for first in task.columns.clone().step_by(PANEL) {
            let panel = &self.panels[first / PANEL];
            let columns = first..(first + PANEL).min(task.columns.end);
            sums.resize(task.rows.len() * panel.width(), 0.0);
            for (row, sums) in task.rows.clone().zip(sums.chunks_exact_mut(panel.width())) {
                let sums = &mut sums[..columns.len()];
                sums.copy_from_slice(&self.bias[columns.clone()]);
                if let Some(residual) = epilogue.residual {
                    let row = &residual[row * self.outputs()..][columns.clone()];
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
            panel.accumulate_bf16(0..self.depth, x, stride, sums);
            if let Some(activation) = epilogue.activation {
                Arch::new().dispatch(Activate { activation, sums });
            }
            let at = first - task.columns.start;
            for (out, sums) in task.out.iter_mut().zip(sums.chunks_exact(panel.width())) {
                out[at..at + columns.len()].write_copy_of_slice(&sums[..columns.len()]);
            }
        }
    }
}

/// Rows of `depth` numbers in bf16, ties to even, each filled up with zeros to `stride`.
#[inline(always)]
fn round_rows((rows, depth, stride, out): (&[f32], usize, usize, &mut [u16])) {
    const NAN: u16 = 0x7fc0;
    for (row, out) in rows.chunks_exact(depth).zip(out.chunks_exact_mut(stride)) {
        let (out, padding) = out.split_at_mut(depth);
        for (out, &x) in out.iter_mut().zip(row) {
            *out = if x.is_nan() { NAN } else { bf16_bits(x) };
        }
        padding.fill(0);
    }
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
