//! A linear layer, and what follows it in the same op.

use super::layer_norm::FusedNorm;
use super::product::{Epilogue, multiply};
use super::{Activation, LayerNorm, is_plain_f32};
use crate::cpu::Level;
use crate::cpu::contracts::{Format, Rows};
use crate::memory::{check_size, written};
use crate::product::PackedMatrix;
use crate::view::View;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Shape, Tensor};
use candle_nn::Module;
use std::borrow::Cow;

const OP: &str = "linear";

/// `x·W^T + b`.
///
/// Inputs are `[.., K]` of rank 1 to 3, or `[B, N, H, D]` with `H * D = K`, the heads of
/// attention, which are merged; with any strides. Results are `[.., outputs]`, for heads
/// `[B, N, outputs]`.
pub(crate) struct Linear(Form);

enum Form {
    Fused(Box<Packed>),
    Candle(candle_nn::Linear),
}

/// Weights and bias for the fused op.
struct Packed {
    /// `[K, outputs]`, in f32 or in bf16.
    weights: PackedMatrix,
    /// Padded to whole panels.
    bias: Vec<f32>,
    /// The weights `[outputs, K]` that were rounded to bf16, for Candle's operations.
    rounded: Option<Tensor>,
}

impl Packed {
    /// Packs `weights`, row-major `[bias.len(), depth]`.
    fn new(level: Level, weights: &[f32], bias: &[f32], depth: usize) -> Self {
        let mut packed = PackedMatrix::new(level, Format::F32, 0, 0);
        packed.reset_columns(depth, bias.len());
        packed.put_columns(0, Rows::new(weights, bias.len(), depth, depth), 1.0);
        Self { bias: padded(bias, packed.panel_width()), weights: packed, rounded: None }
    }

    /// The same with weights in bf16: `None` where the processor does not multiply it, or it cannot hold
    /// one of the weights.
    fn round(&self) -> Result<Option<Self>> {
        let (level, depth, outputs) = (self.weights.level(), self.depth(), self.outputs());
        if level.panels(Format::Bf16).is_none() {
            return Ok(None);
        }
        let columns: Vec<Vec<f32>> =
            (0..outputs).map(|output| self.weights.column(output).collect()).collect();
        let by_depth: Vec<f32> =
            (0..depth).flat_map(|k| columns.iter().map(move |column| column[k])).collect();
        let mut weights = PackedMatrix::new(level, Format::Bf16, 0, 0);
        weights.reset_columns(depth, outputs);
        weights.put(0, &by_depth);
        if !weights.exceptions().is_empty() {
            return Ok(None);
        }
        let rounded = Tensor::from_vec(columns.concat(), (outputs, depth), &Device::Cpu)?;
        let bias = padded(&self.bias[..outputs], weights.panel_width());
        Ok(Some(Self { weights, bias, rounded: Some(rounded.to_dtype(DType::BF16)?) }))
    }

    fn outputs(&self) -> usize {
        self.weights.columns()
    }

    fn depth(&self) -> usize {
        self.weights.depth()
    }

    /// The same layer in Candle's form.
    fn unpacked(&self) -> Result<candle_nn::Linear> {
        let outputs = self.outputs();
        let weight = match &self.rounded {
            Some(rounded) => rounded.to_dtype(DType::F32)?,
            None => {
                let all = (0..outputs).flat_map(|output| self.weights.column(output)).collect();
                Tensor::from_vec::<_, f32>(all, (outputs, self.depth()), &Device::Cpu)?
            }
        };
        Ok(candle_nn::Linear::new(weight, Some(Tensor::new(&self.bias[..outputs], &Device::Cpu)?)))
    }
}

/// Filled up with zeros to a multiple of `width`.
fn padded(bias: &[f32], width: usize) -> Vec<f32> {
    let mut bias = bias.to_vec();
    bias.resize(bias.len().next_multiple_of(width), 0.0);
    bias
}

impl Linear {
    /// `weight` `[outputs, K]`, `bias` `[outputs]`.
    pub(crate) fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let depth = weight.dim(D::Minus1)?;
        Ok(Self(if is_plain_f32(&[weight, bias]) {
            let weights = weight.flatten_all()?.to_vec1()?;
            Form::Fused(Box::new(Packed::new(Level::active()?, &weights, &bias.to_vec1()?, depth)))
        } else {
            Form::Candle(candle_nn::Linear::new(weight.clone(), Some(bias.clone())))
        }))
    }

    /// Rounds the weights to bf16, and the rows of `x` from now on; sums stay in f32. Changes
    /// nothing, and says so, where the processor does not multiply bf16, where the layer is left
    /// to Candle, and where a weight is too large for bf16.
    pub(crate) fn round_to_bf16(&mut self) -> Result<bool> {
        let Form::Fused(packed) = &self.0 else { return Ok(false) };
        if packed.rounded.is_some() {
            return Ok(true);
        }
        let Some(rounded) = packed.round()? else { return Ok(false) };
        self.0 = Form::Fused(Box::new(rounded));
        Ok(true)
    }

    /// `x·W^T + b`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Form::Fused(weights) if is_plain_f32(&[x]) => {
                let op = Fused { weights, activation: None, norm: None };
                Ok(x.apply_op1_no_bwd(&op)?)
            }
            _ => self.of_tensor(x),
        }
    }

    /// `activation(x·W^T + b)`.
    pub(crate) fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match &self.0 {
            Form::Fused(weights) if is_plain_f32(&[x]) => {
                let op = Fused { weights, activation: Some(activation), norm: None };
                Ok(x.apply_op1_no_bwd(&op)?)
            }
            _ => Ok(activation.of_tensor(&self.of_tensor(x)?)?),
        }
    }

    /// `norm(x·W^T + b + residual)`.
    pub(crate) fn forward_add_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        norm: &LayerNorm,
    ) -> Result<Tensor> {
        match (&self.0, norm.fused()) {
            (Form::Fused(weights), Some(norm)) if is_plain_f32(&[x, residual]) => {
                let op = Fused { weights, activation: None, norm: Some(norm) };
                Ok(x.apply_op2_no_bwd(&residual.contiguous()?, &op)?)
            }
            _ => Ok(norm.of_tensor(&(self.of_tensor(x)? + residual)?)?),
        }
    }

    /// With Candle's operations.
    fn of_tensor(&self, x: &Tensor) -> Result<Tensor> {
        let x = match x.rank() {
            4 => Cow::Owned(x.flatten_from(2)?),
            _ => Cow::Borrowed(x),
        };
        let linear = match &self.0 {
            Form::Candle(linear) => Cow::Borrowed(linear),
            Form::Fused(weights) => Cow::Owned(weights.unpacked()?),
        };
        Ok(linear.forward(&x)?)
    }
}

/// The op; its second input is the residual.
struct Fused<'a> {
    weights: &'a Packed,
    activation: Option<Activation>,
    norm: Option<&'a FusedNorm>,
}

impl Fused<'_> {
    fn run(
        &self,
        (x, layout): (&CpuStorage, &Layout),
        residual: Option<(&CpuStorage, &Layout)>,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, depth) = (View::of_rows(OP, "x", x, layout)?, self.weights.depth());
        if x.dims()[2..].iter().product::<usize>() != depth {
            let expected = match layout.dims().len() {
                4 => format!("[B, N, H, D] with H * D = {depth}"),
                _ => format!("[.., {depth}]"),
            };
            return Err(Error::Shape {
                op: OP,
                tensor: "x",
                shape: layout.dims().into(),
                expected,
            });
        }
        let rank = layout.dims().len();
        let mut shape = layout.dims()[..(rank - 1).min(2)].to_vec();
        shape.push(self.weights.outputs());
        check_size(OP, "the result", &shape)?;
        let residual = match residual {
            None => None,
            Some((storage, layout)) => Some(residual_of(storage, layout, &shape)?),
        };
        let epilogue = Epilogue { residual, activation: self.activation };
        let len = shape.iter().product();
        let Packed { weights, bias, .. } = self.weights;
        // SAFETY: `multiply` panics unless `out` is as long as its rows times its outputs, and writes every
        // element.
        let mut out = unsafe { written(len, |out| multiply(&x, weights, bias, epilogue, out)) };
        if let Some(norm) = self.norm {
            assert_eq!(norm.width(), self.weights.outputs(), "a norm of the layer's results");
            norm.normalize(&mut out);
        }
        Ok((CpuStorage::F32(out), Shape::from(shape)))
    }
}

/// The numbers of a residual that has the shape of the result.
fn residual_of<'a>(storage: &'a CpuStorage, layout: &Layout, shape: &[usize]) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) if layout.dims() == shape => {
            Ok(&data[start..end])
        }
        _ => Err(Error::Shape {
            op: OP,
            tensor: "residual",
            shape: layout.dims().into(),
            expected: format!("{shape:?}, contiguous f32"),
        }),
    }
}

impl CustomOp1 for Fused<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.run((x, x_layout), None)?)
    }
}

impl CustomOp2 for Fused<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.run((x, x_layout), Some((residual, residual_layout)))?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::assert_threads_change_nothing;
    use super::*;
    use crate::cpu::runnable;
    use crate::testing::{largest, largest_difference, randn};
    use candle_core::Var;
    use proptest::prelude::*;

    const CPU: Device = Device::Cpu;

    fn f64s(x: &Tensor) -> Tensor {
        x.to_dtype(DType::F64).unwrap()
    }

    /// A layer packed for a level.
    fn layer(level: Level, weight: &Tensor, bias: &Tensor) -> Linear {
        let weights = weight.flatten_all().unwrap().to_vec1().unwrap();
        let bias = bias.to_vec1::<f32>().unwrap();
        Linear(Form::Fused(Box::new(Packed::new(level, &weights, &bias, weight.dim(1).unwrap()))))
    }

    /// `x·W^T + b` in f64 for `x` `[M, K]`.
    fn exact(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
        let (m, outputs) = (x.dim(0).unwrap(), bias.dim(0).unwrap());
        if m * outputs * x.dim(1).unwrap() == 0 {
            return f64s(bias).unsqueeze(0).unwrap().repeat((m, 1)).unwrap();
        }
        let product = f64s(x).matmul(&f64s(weight).t().unwrap()).unwrap();
        product.broadcast_add(&f64s(bias)).unwrap()
    }

    /// Every form on every level against f64; all levels with a fused multiply-add give the same bits.
    fn check(m: usize, depth: usize, outputs: usize) {
        let (x, weight, bias) = (randn(&[m, depth]), randn(&[outputs, depth]), randn(&[outputs]));
        let residual = randn(&[m, outputs]);
        // With an epsilon of 1 the norm does not magnify, however close the outputs are.
        let norm = LayerNorm::new(randn(&[outputs]), randn(&[outputs]), 1.0).unwrap();
        let product = exact(&x, &weight, &bias);
        // Rounding of each of K sums whose terms have a variance of 1.
        let bound = f64::from(f32::EPSILON) * (depth as f64 + 8.0) * 4.0;
        let mut first: Option<Tensor> = None;
        for level in runnable() {
            let layer = layer(level, &weight, &bias);
            let what = format!("{level:?} [{m}, {depth}] x [{depth}, {outputs}]");
            let plain = layer.forward(&x).unwrap();
            assert!(largest_difference(&plain, &product) < bound, "{what}");
            if level.name() != "portable" {
                let same = largest_difference(first.get_or_insert(plain.clone()), &plain);
                assert_eq!(same, 0.0, "{what}");
            }
            for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                let found = layer.forward_activated(&x, activation).unwrap();
                let expected = activation.of_tensor(&product).unwrap();
                // The slope of GELU is below 1.13.
                let bound = bound * 1.13 + 3e-7 * largest(&product);
                assert!(largest_difference(&found, &expected) < bound, "{what} {activation:?}");
            }
            let found = layer.forward_add_norm(&x, &residual, &norm).unwrap();
            let sum = (plain + &residual).unwrap();
            if outputs > 0 {
                let expected = norm.of_tensor(&sum).unwrap();
                let bound = 8.0 * bound + 1e-5;
                assert!(largest_difference(&found, &expected) < bound, "{what}");
            }
        }
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
            for outputs in [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 130] {
                for depth in [1, 2, 33] {
                    check(m, depth, outputs);
                }
            }
        }
    }

    /// Enough work to be divided, over rows and over columns.
    #[test]
    fn many_threads_give_the_same_bits_as_one() {
        for (m, depth, outputs) in [(150, 96, 200), (7, 512, 1030)] {
            let (x, weight) = (randn(&[m, depth]), randn(&[outputs, depth]));
            let layer = Linear::new(&weight, &randn(&[outputs])).unwrap();
            assert_threads_change_nothing(|| layer.forward(&x).unwrap());
        }
    }

    #[test]
    fn heads_and_strides_are_read_where_they_lie() {
        let layer = Linear::new(&randn(&[10, 24]), &randn(&[10])).unwrap();
        let heads = randn(&[2, 3, 7, 8]);
        let tokens = heads.transpose(1, 2).unwrap();
        let merged = tokens.flatten_from(2).unwrap();
        let expected = layer.of_tensor(&merged).unwrap();
        assert_eq!(expected.dims(), [2, 7, 10]);
        for x in [&tokens, &merged, &merged.t().unwrap().contiguous().unwrap().t().unwrap()] {
            assert!(largest_difference(&layer.forward(x).unwrap(), &expected) < 1e-4);
        }
        let residual = randn(&[2, 10, 7]).t().unwrap();
        let norm = LayerNorm::new(randn(&[10]), randn(&[10]), 1e-5).unwrap();
        let found = layer.forward_add_norm(&tokens, &residual, &norm).unwrap();
        let expected = norm.of_tensor(&(expected + residual).unwrap()).unwrap();
        assert!(largest_difference(&found, &expected) < 1e-4);
        let row = randn(&[24]);
        let expected = layer.forward(&row.unsqueeze(0).unwrap()).unwrap().squeeze(0).unwrap();
        assert_eq!(largest_difference(&layer.forward(&row).unwrap(), &expected), 0.0);
    }

    #[test]
    fn nan_and_infinity_stay_in_their_row() {
        for level in runnable() {
            let layer = layer(level, &randn(&[70, 5]), &randn(&[70]));
            let clean = randn(&[8, 5]);
            let expected = layer.forward(&clean).unwrap().to_vec2::<f32>().unwrap();
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = clean.to_vec2::<f32>().unwrap();
                x[2][3] = bad;
                let found = layer.forward(&Tensor::new(x, &CPU).unwrap()).unwrap();
                for (i, (found, expected)) in
                    found.to_vec2::<f32>().unwrap().iter().zip(&expected).enumerate()
                {
                    match i {
                        2 => assert!(found.iter().all(|x| !x.is_finite()), "{level:?} {bad}"),
                        _ => assert_eq!(found, expected, "{level:?} {bad}"),
                    }
                }
            }
        }
    }

    #[test]
    fn a_variable_gets_the_gradient_of_candles_operations() {
        let (weight, bias) = (randn(&[6, 4]), randn(&[6]));
        let norm = LayerNorm::new(randn(&[6]), randn(&[6]), 1e-5).unwrap();
        let layer = Linear::new(&weight, &bias).unwrap();
        let x = Var::from_tensor(&randn(&[2, 3, 4])).unwrap();
        let residual = randn(&[2, 3, 6]);
        let gradient = |out: &Tensor| {
            let weights = Tensor::arange(0f32, 36., &CPU).unwrap().reshape((2, 3, 6)).unwrap();
            let grads = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
            grads.get(&x).cloned().expect("a gradient")
        };
        let product = {
            let rows = x.reshape((6, 4)).unwrap().matmul(&weight.t().unwrap()).unwrap();
            rows.broadcast_add(&bias).unwrap().reshape((2, 3, 6)).unwrap()
        };
        let found = gradient(&layer.forward(&x).unwrap());
        assert!(largest_difference(&found, &gradient(&product)) < 1e-4);
        let found = gradient(&layer.forward_activated(&x, Activation::Gelu).unwrap());
        assert!(largest_difference(&found, &gradient(&product.gelu_erf().unwrap())) < 1e-4);
        let found = layer.forward_add_norm(&x, &residual, &norm).unwrap();
        let expected = norm.of_tensor(&(product + residual).unwrap()).unwrap();
        assert!(largest_difference(&found, &expected) < 1e-4);
        assert!(largest_difference(&gradient(&found), &gradient(&expected)) < 1e-4);
        assert!(largest(&gradient(&found)) > 0.1);

        // Weights that are variables are never packed.
        let weight = Var::from_tensor(&weight).unwrap();
        let layer = Linear::new(&weight, &bias).unwrap();
        let out = layer.forward(&randn(&[2, 4])).unwrap();
        assert!(out.sum_all().unwrap().backward().unwrap().get(&weight).is_some());
    }

    #[test]
    fn other_dtypes_are_left_to_candle() {
        let (weight, bias, x) = (randn(&[6, 4]), randn(&[6]), randn(&[1, 3, 4]));
        let expected = Linear::new(&weight, &bias).unwrap().forward(&x).unwrap();
        let half = |x: &Tensor| x.to_dtype(DType::F16).unwrap();
        let layer = Linear::new(&half(&weight), &half(&bias)).unwrap();
        let found = layer.forward_activated(&half(&x), Activation::Relu).unwrap();
        assert_eq!(found.dtype(), DType::F16);
        assert!(largest_difference(&found, &expected.relu().unwrap()) < 0.05);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let layer = Linear::new(&randn(&[6, 4]), &randn(&[6])).unwrap();
        let error = layer.forward(&randn(&[2, 5])).unwrap_err().to_string();
        assert!(error.contains("linear: x has shape [2, 5], expected [.., 4]"), "{error}");
        let error = layer.forward(&randn(&[2, 5, 2, 3])).unwrap_err().to_string();
        assert!(error.contains("expected [B, N, H, D] with H * D = 4"), "{error}");
        let norm = LayerNorm::new(randn(&[6]), randn(&[6]), 1e-5).unwrap();
        let error = layer.forward_add_norm(&randn(&[2, 4]), &randn(&[2, 5]), &norm);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("residual has shape [2, 5], expected [2, 6]"), "{error}");
    }
}
