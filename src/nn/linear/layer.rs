//! The layer, and which of its forms computes.

use super::int8::Int8Weights;
use super::op::Fused;
use super::weights::{OP, Packed, Precision, Weights, misshaped};
use crate::Result;
use crate::cpu::Level;
use crate::memory::check_size;
use crate::nn::activation::Activation;
use crate::nn::layer_norm::LayerNorm;
use crate::nn::plain::is_plain_f32;
use candle_core::{DType, Device, Tensor};
use candle_nn::{Module, VarBuilder};
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

/// `x·W^T + b`, in a [`Precision`], with weights that are packed once.
///
/// Inputs are `[.., K]` of rank 1 to 3, or `[B, N, H, D]` with `H * D = K`, the heads of attention,
/// which are merged; f32 with any strides. Results are `[.., outputs]`, for heads `[B, N, outputs]`.
///
/// A row of the result depends on its own row of the input alone, and has the same bits alone, in any
/// batch and on any number of threads; in int16 and int8 also on every instruction level. A row that
/// holds NaN or infinity gives numbers that are not finite, for itself alone: in int16 and int8, NaN.
///
/// On devices other than the CPU, for other dtypes, and for weights that are variables, the layer is
/// Candle's, in the dtype of its weights; where the gradient of an input is asked for, it is that of the
/// weights as they are packed.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::nn::{Linear, Precision};
///
/// let weight = Tensor::randn(0f32, 0.1, (256, 128), &Device::Cpu)?;
/// let bias = Tensor::zeros(256, candle_core::DType::F32, &Device::Cpu)?;
/// let layer = Linear::new(&weight, Some(&bias), Precision::F32)?;
/// let int8 = layer.to_precision(Precision::Int8)?;
/// let x = Tensor::randn(0f32, 1., (2, 16, 128), &Device::Cpu)?;
/// let off = (layer.forward(&x)? - int8.forward(&x)?)?.abs()?.max_all()?;
/// assert!(off.to_scalar::<f32>()? < 0.1);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Linear(pub(super) Form);

pub(super) enum Form {
    Fused(Box<Packed>),
    Candle(candle_nn::Linear),
}

impl Linear {
    /// `weight` `[outputs, K]`, `bias` `[outputs]`; without one it is 0.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for other shapes and more weights than memory has addresses,
    /// [`Error::Depth`](crate::Error::Depth) for a `K` whose int8 sums could leave the range of int32 (above
    /// 65793), [`Error::Level`](crate::Error::Level) for a forced level that cannot be used.
    pub fn new(weight: &Tensor, bias: Option<&Tensor>, precision: Precision) -> Result<Self> {
        let (outputs, depth) = match *weight.dims() {
            [outputs, depth] => (outputs, depth),
            ref shape => return Err(misshaped("weight", shape, "[outputs, K]".into())),
        };
        check_size(OP, "weight", weight.dims())?;
        if let Some(bias) = bias.filter(|bias| bias.dims() != [outputs]) {
            let expected = format!("[{outputs}] for weight {:?}", weight.dims());
            return Err(misshaped("bias", bias.dims(), expected));
        }
        let plain = is_plain_f32(&[weight]) && bias.is_none_or(|bias| is_plain_f32(&[bias]));
        if !plain {
            return Ok(Self(Form::Candle(candle_nn::Linear::new(weight.clone(), bias.cloned()))));
        }
        let bias = bias.map_or(Ok(vec![0.0; outputs]), |bias| bias.to_vec1())?;
        let numbers = weight.flatten_all()?.to_vec1::<f32>()?;
        let weights = Weights::new(Level::active()?, precision, &numbers, (outputs, depth))?;
        Ok(Self::packed(weights, &bias))
    }

    /// From the tensors `weight` `[outputs, inputs]` and, if there is one, `bias` `[outputs]` of `vb`.
    ///
    /// # Errors
    /// Candle's, for tensors that are missing or have another shape; those of [`Linear::new`].
    pub fn from_var_builder(
        inputs: usize,
        outputs: usize,
        vb: VarBuilder<'_>,
        precision: Precision,
    ) -> Result<Self> {
        let weight = vb.get((outputs, inputs), "weight")?;
        let bias = vb.contains_tensor("bias").then(|| vb.get(outputs, "bias")).transpose()?;
        Self::new(&weight, bias.as_ref(), precision)
    }

    pub(super) fn packed(weights: Weights, bias: &[f32]) -> Self {
        Self(Form::Fused(Box::new(Packed::new(weights, bias))))
    }

    /// The precision that its weights are packed in; `F32` for a layer that is left to Candle.
    pub fn precision(&self) -> Precision {
        match &self.0 {
            Form::Fused(packed) => packed.weights.precision(),
            Form::Candle(_) => Precision::F32,
        }
    }

    /// `[outputs, K]`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.0 {
            Form::Fused(packed) => (packed.weights.outputs(), packed.weights.depth()),
            Form::Candle(linear) => {
                let dims = linear.weight().dims();
                (dims[0], dims[1])
            }
        }
    }

    /// The same layer in another precision, packed from what its own stands for: from int8, f32 has the
    /// weights as they were rounded. A layer that is left to Candle stays as it is.
    ///
    /// # Errors
    /// Those of [`Linear::new`].
    pub fn to_precision(&self, precision: Precision) -> Result<Self> {
        Ok(match &self.0 {
            Form::Fused(packed) => {
                let (weights, shape) = (packed.weights.unpacked(), self.shape());
                let weights = Weights::new(Level::active()?, precision, &weights, shape)?;
                Self::packed(weights, packed.bias())
            }
            Form::Candle(linear) => Self(Form::Candle(linear.clone())),
        })
    }

    /// [`Linear::to_precision`] of [`Precision::Int8`], with weights that are rounded to suit `inputs`, examples of
    /// what will enter the layer, any that [`Linear::forward`] takes. Weights do not become the nearest codes
    /// one by one, but their errors make up for each other where inputs have directions in common (GPTQ, Frantar
    /// et al. 2022, arXiv:2210.17323). That takes time here, and none later. Some hundred rows are enough; where
    /// inputs are not finite, weights become the nearest codes.
    ///
    /// # Errors
    /// Those of [`Linear::new`]; [`Error::Shape`](crate::Error::Shape) if the inputs do not fit the weights.
    pub fn to_int8_for(&self, inputs: &[Tensor]) -> Result<Self> {
        let Form::Fused(packed) = &self.0 else {
            return self.to_precision(Precision::Int8);
        };
        let mut rows = Vec::new();
        for inputs in inputs {
            Fused::new(packed).shape(inputs.dims())?;
            let inputs = inputs.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            rows.extend(inputs.flatten_all()?.to_vec1::<f32>()?);
        }
        let (weights, shape) = (packed.weights.unpacked(), self.shape());
        let weights = Int8Weights::new(Level::active()?, &weights, shape, Some(&rows))?;
        Ok(Self::packed(Weights::Int8(weights), packed.bias()))
    }

    /// Whether it is not left to Candle.
    pub(crate) fn is_packed(&self) -> bool {
        matches!(self.0, Form::Fused(_))
    }

    /// Keeps what enters it from now on, until [`Linear::unwatch`]; not where the layer is left to Candle.
    pub(crate) fn watch(&mut self) {
        if let Form::Fused(packed) = &mut self.0 {
            packed.seen = Some(Mutex::default());
        }
    }

    /// What has entered it since [`Linear::watch`].
    pub(crate) fn unwatch(&mut self) -> Vec<Tensor> {
        let seen = match &mut self.0 {
            Form::Fused(packed) => packed.seen.take(),
            Form::Candle(_) => None,
        };
        // A push that panicked has left what was there.
        seen.map_or(Vec::new(), |seen| seen.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// `x·W^T + b`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x` does not fit the weights.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Form::Fused(layer) if is_plain_f32(&[x]) => Fused::new(layer).of(x, None),
            _ => self.of_tensor(x),
        }
    }

    /// `activation(x·W^T + b)`.
    ///
    /// # Errors
    /// Those of [`Linear::forward`].
    pub fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match &self.0 {
            Form::Fused(layer) if is_plain_f32(&[x]) => {
                Fused { activation: Some(activation), ..Fused::new(layer) }.of(x, None)
            }
            _ => Ok(activation.of_tensor(&self.of_tensor(x)?)?),
        }
    }

    /// `norm(x·W^T + b + residual)`, the residual in the shape of the result.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x`, the residual or the norm does not fit the weights.
    pub fn forward_add_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        norm: &LayerNorm,
    ) -> Result<Tensor> {
        match (&self.0, norm.fused()) {
            (Form::Fused(layer), Some(norm)) if is_plain_f32(&[x, residual]) => {
                Fused { norm: Some(norm), ..Fused::new(layer) }.of(x, Some(residual))
            }
            _ => norm.of_tensor(&(self.of_tensor(x)? + residual)?),
        }
    }

    /// `norm(second(activation(x·W^T + b)) + residual)`: the feed-forward block of a transformer, whose first
    /// layer this is. Block by block of rows, what is between the two layers never leaves the cache; the
    /// bits are those of one layer after the other.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `x`, the second layer, the residual or the norm does not fit.
    pub fn forward_block(
        &self,
        x: &Tensor,
        activation: Activation,
        second: &Linear,
        residual: &Tensor,
        norm: &LayerNorm,
    ) -> Result<Tensor> {
        match (&self.0, &second.0, norm.fused()) {
            (Form::Fused(first), Form::Fused(layer), Some(norm))
                // What enters the second layer is seen only where it is a tensor.
                if is_plain_f32(&[x, residual]) && layer.seen.is_none() =>
            {
                let before = Some((&**first, activation));
                Fused { before, norm: Some(norm), ..Fused::new(layer) }.of(x, Some(residual))
            }
            _ => second.forward_add_norm(&self.forward_activated(x, activation)?, residual, norm),
        }
    }

    /// With Candle's operations.
    pub(super) fn of_tensor(&self, x: &Tensor) -> Result<Tensor> {
        check_size(OP, "x", x.dims())?;
        let x = match x.rank() {
            4 => Cow::Owned(x.flatten_from(2)?),
            _ => Cow::Borrowed(x),
        };
        let leading = &x.dims()[..x.rank().saturating_sub(1)];
        check_size(OP, "the result", &[leading, &[self.shape().0]].concat())?;
        let linear = match &self.0 {
            Form::Candle(linear) => Cow::Borrowed(linear),
            Form::Fused(packed) => Cow::Owned(packed.unpacked()?),
        };
        Ok(linear.forward(&x)?)
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(Linear::forward(self, x)?)
    }
}
