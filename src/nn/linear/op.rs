//! The op: shapes are checked, then the result is computed in memory that is written once.

use super::product::{Epilogue, multiply, multiply_twice};
use super::weights::{OP, Packed, misshaped};
use crate::Result;
use crate::memory::{check_size, written};
use crate::nn::activation::Activation;
use crate::nn::layer_norm::FusedNorm;
use crate::view::View;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// A layer and what follows it; the op's second input is the residual.
pub(super) struct Fused<'a> {
    /// What comes before the layer: another one, and an activation.
    pub before: Option<(&'a Packed, Activation)>,
    pub layer: &'a Packed,
    pub activation: Option<Activation>,
    pub norm: Option<&'a FusedNorm>,
}

impl<'a> Fused<'a> {
    /// A layer alone.
    pub(super) fn new(layer: &'a Packed) -> Self {
        Self { before: None, layer, activation: None, norm: None }
    }
}

impl Fused<'_> {
    /// Applies the op to f32 tensors on the CPU.
    pub(super) fn of(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        // Before the op, so that errors are this crate's own.
        let shape = self.shape(x.dims())?;
        self.before.map_or(self.layer, |(before, _)| before).see(x);
        let Some(residual) = residual else { return Ok(x.apply_op1_no_bwd(self)?) };
        if residual.dims() != shape {
            return Err(misshaped("residual", residual.dims(), format!("{shape:?}")));
        }
        Ok(x.apply_op2_no_bwd(&residual.contiguous()?, self)?)
    }

    /// The shape of the result for an input of this one, which memory has addresses for.
    pub(super) fn shape(&self, x: &[usize]) -> Result<Vec<usize>> {
        check_size(OP, "x", x)?;
        let (weights, outputs) = (&self.layer.weights, self.layer.weights.outputs());
        let depth = self.before.map_or(weights.depth(), |(before, _)| before.weights.depth());
        if let Some((before, _)) =
            self.before.filter(|(x, _)| x.weights.outputs() != weights.depth())
        {
            let expected = format!("[.., {}], the inputs of the second layer", weights.depth());
            return Err(misshaped("first layer", &[before.weights.outputs()], expected));
        }
        let (leading, row) = x.split_at(x.len().saturating_sub(1).min(2));
        if !(1..=4).contains(&x.len()) || row.iter().product::<usize>() != depth {
            let expected = match x.len() {
                4 => format!("[B, N, H, D] with H * D = {depth}"),
                _ => format!("[.., {depth}], of rank 1 to 4"),
            };
            return Err(misshaped("x", x, expected));
        }
        if let Some(norm) = self.norm.filter(|norm| norm.width() != outputs) {
            let expected = format!("[{outputs}], the outputs of the layer");
            return Err(misshaped("norm", &[norm.width()], expected));
        }
        let shape = [leading, &[outputs]].concat();
        check_size(OP, "the result", &shape)?;
        Ok(shape)
    }

    fn run(
        &self,
        (x, layout): (&CpuStorage, &Layout),
        residual: Option<&[f32]>,
    ) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(layout.dims())?;
        let x = View::of_rows(OP, "x", x, layout)?;
        let epilogue = Epilogue { residual, activation: self.activation, norm: self.norm };
        let len = shape.iter().product();
        // SAFETY: both panic unless `out` is as long as its rows times its outputs, and write every element.
        let out = unsafe {
            written(len, |out| match self.before {
                Some(before) => multiply_twice(&x, before, self.layer, epilogue, out),
                None => multiply(&x, self.layer, epilogue, out),
            })
        };
        Ok((CpuStorage::F32(out), Shape::from(shape)))
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
        let (CpuStorage::F32(residual), Some((start, end))) =
            (residual, residual_layout.contiguous_offsets())
        else {
            candle_core::bail!("linear: the residual is not contiguous f32");
        };
        Ok(self.run((x, x_layout), Some(&residual[start..end]))?)
    }
}
