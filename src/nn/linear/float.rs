//! Weights in f32 or bf16: the sums of an element are added up in the order of the depth, whatever the tile,
//! so results depend neither on how the work is divided nor on the vectors, where they have a fused
//! multiply-add.

use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::{Format, GROUP, Rows, bf16_bits};
use crate::cpu::plain::widest;
use crate::product::{PackedMatrix, Start};
use candle_core::{DType, Device, Tensor};
use std::mem::MaybeUninit;
use std::ops::Range;

pub(super) struct FloatWeights {
    /// `[K, outputs]`, in f32 or in bf16.
    matrix: PackedMatrix,
    /// The weights `[outputs, K]` that were rounded to bf16, for Candle's operations.
    rounded: Option<Tensor>,
}

impl FloatWeights {
    /// Packs `weights`, row-major `[outputs, depth]`.
    pub(super) fn new(level: Level, weights: &[f32], (outputs, depth): (usize, usize)) -> Self {
        let mut matrix = PackedMatrix::new(level, Format::F32, 0, 0);
        matrix.reset_columns(depth, outputs);
        matrix.put_columns(0, Rows::new(weights, outputs, depth, depth), 1.0);
        Self { matrix, rounded: None }
    }

    pub(super) fn matrix(&self) -> &PackedMatrix {
        &self.matrix
    }

    pub(super) fn is_rounded(&self) -> bool {
        self.rounded.is_some()
    }

    /// The same in bf16: `None` where the processor does not multiply it, or it cannot hold one of the
    /// weights.
    pub(super) fn round(&self) -> Result<Option<Self>> {
        let level = self.matrix.level();
        if level.panels(Format::Bf16).is_none() {
            return Ok(None);
        }
        let (depth, outputs) = (self.matrix.depth(), self.matrix.columns());
        let weights = self.unpacked()?;
        let by_depth: Vec<f32> =
            (0..depth).flat_map(|k| weights.iter().skip(k).step_by(depth).copied()).collect();
        let mut matrix = PackedMatrix::new(level, Format::Bf16, 0, 0);
        matrix.reset_columns(depth, outputs);
        matrix.put(0, &by_depth);
        if !matrix.exceptions().is_empty() {
            return Ok(None);
        }
        let rounded = Tensor::from_vec(weights, (outputs, depth), &Device::Cpu)?;
        Ok(Some(Self { matrix, rounded: Some(rounded.to_dtype(DType::BF16)?) }))
    }

    /// Row-major `[outputs, depth]`.
    pub(super) fn unpacked(&self) -> Result<Vec<f32>> {
        Ok(match &self.rounded {
            Some(rounded) => rounded.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
            None => (0..self.matrix.columns()).flat_map(|i| self.matrix.column(i)).collect(),
        })
    }

    /// `start + x·W^T` for some outputs of rows of `x`, as [`PackedMatrix::multiply`] writes them.
    pub(super) fn multiply(
        &self,
        outputs: Range<usize>,
        rows: &FloatRows<'_>,
        bias: &[f32],
        (out, stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        let (start, out, depth) = (Start::Row(bias), (out, stride), self.matrix.depth());
        match *rows {
            FloatRows::F32(x, count) => {
                self.matrix.multiply(outputs, (x, depth, count), start, out)
            }
            FloatRows::Bf16(x, count) => {
                let stride = depth.next_multiple_of(GROUP);
                self.matrix.multiply(outputs, (x, stride, count), start, out);
            }
        }
    }

    /// Rows of `x` in the format of the weights.
    pub(super) fn rows<'a>(
        &self,
        x: &'a [f32],
        count: usize,
        rounded: &'a mut Vec<u16>,
    ) -> FloatRows<'a> {
        if self.rounded.is_none() {
            return FloatRows::F32(x, count);
        }
        let depth = self.matrix.depth();
        let stride = depth.next_multiple_of(GROUP);
        rounded.resize(count * stride, 0);
        if depth > 0 {
            let job = (x, depth, stride, &mut rounded[..]);
            widest!(round_rows, job, (&[f32], usize, usize, &mut [u16]) => ());
        }
        FloatRows::Bf16(rounded, count)
    }
}

/// Some rows, as many as the number says.
pub(super) enum FloatRows<'a> {
    F32(&'a [f32], usize),
    /// Each filled up with zeros to whole groups.
    Bf16(&'a [u16], usize),
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

#[cfg(test)]
mod tests {
    use super::super::{Activation, LayerNorm, Linear, Precision};
    use super::*;
    use crate::cpu::Level;
    use crate::nn::assert_threads_change_nothing;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Device, Tensor, Var};
    use proptest::prelude::*;

    fn f32_layer(weight: &Tensor, bias: &Tensor) -> Linear {
        Linear::new(weight, Some(bias), Precision::F32).unwrap()
    }

    /// Rounded to bf16 by Candle.
    fn rounded(x: &Tensor) -> Tensor {
        x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap()
    }

    /// A layer in bf16 and the same layer in f32 with rounded weights; `None` where the processor
    /// does not multiply bf16.
    fn layers(depth: usize, outputs: usize) -> Option<(Linear, Linear)> {
        let (weight, bias) = (randn(&[outputs, depth]), randn(&[outputs]));
        let mut bf16 = f32_layer(&weight, &bias);
        let found = bf16.round_to_bf16().unwrap();
        assert_eq!(found, Level::active().unwrap().panels(Format::Bf16).is_some());
        found.then(|| (bf16, f32_layer(&rounded(&weight), &bias)))
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
            let mut layer = f32_layer(&weight, &randn(&[2]));
            let x = Tensor::new(&[[0.1f32, 0.2]], &Device::Cpu).unwrap();
            let before = layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
            assert!(!layer.round_to_bf16().unwrap(), "{bad}");
            let after = layer.forward(&x).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(before[0][0], after[0][0], "{bad}");
        }
    }
}
