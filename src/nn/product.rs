//! `x·W^T + b` in f32, or with operands rounded to bf16 and f32 sums, and what follows while the sums are in
//! L1: an activation, or a residual.
//!
//! The product is that of [`PackedMatrix`]: the sums of an element are added up in the order of the depth,
//! whatever the tile, so results depend neither on how the work is divided nor on the vectors, where they
//! have a fused multiply-add.

use super::Activation;
use super::tasks::{BLOCK, Task, in_tasks};
use crate::cpu::contracts::{Format, GROUP, bf16_bits};
use crate::cpu::plain::widest;
use crate::memory::{Footprint, Kept, overwrite};
use crate::product::{PackedMatrix, Start};
use crate::view::View;
use pulp::{Simd, WithSimd};
use std::mem::MaybeUninit;

/// What happens to the sums before they are stored.
#[derive(Clone, Copy, Default)]
pub(super) struct Epilogue<'a> {
    /// `[rows, N]` to add, row-major.
    pub residual: Option<&'a [f32]>,
    /// Applied last.
    pub activation: Option<Activation>,
}

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

impl Footprint for Buffers {
    fn footprint(&self) -> usize {
        let Self { gathered, rounded, sums } = self;
        gathered.footprint() + rounded.footprint() + sums.footprint()
    }
}

thread_local! {
    static BUFFERS: Kept<Buffers> = const { Kept::new() };
}

/// Bytes of them that a thread keeps.
const KEPT: usize = 4 << 20;

/// Writes `x·W^T + b`, row-major `[rows, N]`, to every element of `out`; `bias` is padded to whole panels.
pub(super) fn multiply(
    x: &View<'_>,
    weights: &PackedMatrix,
    bias: &[f32],
    epilogue: Epilogue<'_>,
    out: &mut [MaybeUninit<f32>],
) {
    let [b, n, heads, width] = x.dims();
    assert_eq!(heads * width, weights.depth());
    assert!(epilogue.residual.is_none_or(|residual| residual.len() == out.len()));
    let shape = (b * n, weights.columns(), weights.depth());
    in_tasks(shape, weights.panel_width(), out, |task| {
        Kept::with(&BUFFERS, KEPT, |buffers| {
            let Buffers { gathered, rounded, sums } = buffers;
            let rows = x.merged(task.rows.clone(), gathered);
            let job = Job { weights, bias, epilogue, task };
            match weights.format() {
                Format::Bf16 => {
                    let stride = weights.depth().next_multiple_of(GROUP);
                    job.round(rows, stride, rounded);
                    job.run((rounded, stride), sums);
                }
                _ => job.run((rows, weights.depth()), sums),
            }
        });
    });
}

/// One task.
struct Job<'a> {
    weights: &'a PackedMatrix,
    bias: &'a [f32],
    epilogue: Epilogue<'a>,
    task: Task<'a>,
}

impl Job<'_> {
    /// Rows in bf16, each filled up with zeros to `stride`.
    fn round(&self, rows: &[f32], stride: usize, out: &mut Vec<u16>) {
        let depth = self.weights.depth();
        out.resize(self.task.rows.len() * stride, 0);
        if depth > 0 {
            let job = (rows, depth, stride, &mut out[..]);
            widest!(round_rows, job, (&[f32], usize, usize, &mut [u16]) => ());
        }
    }

    /// Panel by panel, from its rows of `x`, which are `stride` apart.
    fn run<T>(mut self, (x, stride): (&[T], usize), sums: &mut Vec<f32>) {
        let (rows, width) = (self.task.rows.len(), self.weights.panel_width());
        sums.resize(BLOCK.max(rows) * width, 0.0);
        for first in self.task.columns.clone().step_by(width) {
            let columns = first..(first + width).min(self.task.columns.end);
            let start = Start::Row(&self.bias[first..]);
            // SAFETY: `multiply` writes numbers.
            let out = unsafe { overwrite(sums) };
            self.weights.multiply(columns.clone(), (x, stride, rows), start, (out, width));
            if let Some(activation) = self.epilogue.activation {
                let sums = &mut sums[..rows * width];
                crate::cpu::vectors().dispatch(Activate { activation, sums });
            }
            let at = first - self.task.columns.start;
            let outs = self.task.out.iter_mut().zip(self.task.rows.clone());
            for ((out, row), sums) in outs.zip(sums.chunks_exact_mut(width)) {
                let sums = &mut sums[..columns.len()];
                if let Some(residual) = self.epilogue.residual {
                    let residual = &residual[row * self.weights.columns()..][columns.clone()];
                    widest!(add, (&mut *sums, residual), (&mut [f32], &[f32]) => ());
                }
                out[at..at + columns.len()].write_copy_of_slice(sums);
            }
        }
    }
}

#[inline(always)]
fn add((sums, others): (&mut [f32], &[f32])) {
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
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

#[cfg(test)]
mod tests {
    use super::super::{LayerNorm, Linear, assert_threads_change_nothing};
    use super::*;
    use crate::cpu::Level;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Device, Tensor, Var};
    use proptest::prelude::*;

    /// Rounded to bf16 by Candle.
    fn rounded(x: &Tensor) -> Tensor {
        x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
    }

    /// A layer in bf16 and the same layer in f32 with rounded weights; `None` where the processor
    /// does not multiply bf16.
    fn layers(depth: usize, outputs: usize) -> Option<(Linear, Linear)> {
        let (weight, bias) = (randn(&[outputs, depth]), randn(&[outputs]));
        let mut bf16 = Linear::new(&weight, &bias).unwrap();
        let found = bf16.round_to_bf16().unwrap();
        assert_eq!(found, Level::active().unwrap().panels(Format::Bf16).is_some());
        found.then(|| (bf16, Linear::new(&rounded(&weight), &bias).unwrap()))
    }

    /// Rounding of two sums of as many terms as the layer is deep, whose variance is 1, and of
    /// what follows, whose slope is less than 2.
    fn bound(depth: usize) -> f64 {
        f64::from(f32::EPSILON) * (depth as f64 + 8.0) * 16.0
    }

    /// Every form is that of the f32 layer for rounded operands.
    fn check(m: usize, depth: usize, outputs: usize) {
        let Some((bf16, f32)) = layers(depth, outputs) else { return };
        let (x, residual) = (randn(&[m, depth]), randn(&[m, outputs]));
        let what = format!("[{m}, {depth}] x [{depth}, {outputs}]");
        let close = |found: Tensor, expected: Tensor| {
            let difference = largest_difference(&found, &expected);
            assert!(difference <= bound(depth), "{what}: {difference}");
        };
        let same = rounded(&x);
        close(bf16.forward(&x).unwrap(), f32.forward(&same).unwrap());
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let expected = f32.forward_activated(&same, activation).unwrap();
            close(bf16.forward_activated(&x, activation).unwrap(), expected);
        }
        // With an epsilon of 1 the norm does not magnify, however close the outputs are.
        let ones = Tensor::ones(outputs, DType::F32, &Device::Cpu).unwrap();
        let norm = LayerNorm::new(ones.clone(), ones, 1.0).unwrap();
        let expected = f32.forward_add_norm(&same, &residual, &norm).unwrap();
        close(bf16.forward_add_norm(&x, &residual, &norm).unwrap(), expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_form_is_the_product(m in 0usize..60, depth in 0usize..70, outputs in 0usize..150) {
            check(m, depth, outputs);
        }
    }

    #[test]
    fn every_form_on_both_sides_of_every_edge() {
        for m in [1, 5, 6, 7, 48, 49] {
            for outputs in [1, 15, 16, 17, 63, 64, 65, 130] {
                for depth in [0, 1, 2, 7, 8, 9, 33] {
                    check(m, depth, outputs);
                }
            }
        }
    }

    /// Enough work to be divided, over rows and over columns.
    #[test]
    fn many_threads_give_the_same_bits_as_one() {
        for (m, depth, outputs) in [(150, 97, 200), (7, 512, 1030)] {
            let Some((layer, _)) = layers(depth, outputs) else { return };
            let x = randn(&[m, depth]);
            assert_threads_change_nothing(|| layer.forward(&x).unwrap());
        }
    }

    #[test]
    fn heads_are_read_where_they_lie() {
        let Some((bf16, f32)) = layers(24, 10) else { return };
        let tokens = randn(&[2, 3, 7, 8]).transpose(1, 2).unwrap();
        let expected = f32.forward(&rounded(&tokens)).unwrap();
        assert!(largest_difference(&bf16.forward(&tokens).unwrap(), &expected) <= bound(24));
    }

    /// Also numbers that only bf16 takes for infinite.
    #[test]
    fn nan_and_infinity_stay_in_their_row() {
        let Some((layer, _)) = layers(5, 70) else { return };
        let clean = randn(&[8, 5]);
        let expected = layer.forward(&clean).unwrap().to_vec2::<f32>().unwrap();
        let negative_nan = f32::from_bits(0xffff_ffff);
        for bad in [f32::NAN, negative_nan, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut x = clean.to_vec2::<f32>().unwrap();
            x[2][3] = bad;
            let found = layer.forward(&Tensor::new(x, &Device::Cpu).unwrap()).unwrap();
            let found = found.to_vec2::<f32>().unwrap();
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                match i {
                    2 => assert!(found.iter().all(|x| !x.is_finite()), "{bad}: {found:?}"),
                    _ => assert_eq!(found, expected, "{bad}"),
                }
            }
        }
    }

    #[test]
    fn a_variable_gets_the_gradient_of_the_rounded_weights() {
        let Some((bf16, f32)) = layers(4, 6) else { return };
        let x = Var::from_tensor(&rounded(&randn(&[2, 3, 4]))).unwrap();
        let gradient = |layer: &Linear| {
            let out = layer.forward_activated(&x, Activation::Gelu).unwrap();
            out.sum_all().unwrap().backward().unwrap().get(&x).cloned().expect("a gradient")
        };
        assert_eq!(largest_difference(&gradient(&bf16), &gradient(&f32)), 0.0);
    }

    #[test]
    fn weights_that_bf16_cannot_hold_stay_as_they_are() {
        for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
            let weight = Tensor::new(&[[1f32, 2.0], [bad, 0.5]], &Device::Cpu).unwrap();
            let mut layer = Linear::new(&weight, &randn(&[2])).unwrap();
            let x = Tensor::new(&[[0.1f32, 0.2]], &Device::Cpu).unwrap();
            let before = layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
            assert!(!layer.round_to_bf16().unwrap(), "{bad}");
            let after = layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(before[0][0], after[0][0], "{bad}");
        }
    }
}
