//! A linear layer whose weights may be quantized.

use crate::cpu::Level;
use crate::cpu::contracts::Rows;
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, Device, Layout, Module, Storage, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// In which form the matrices of a GGUF file are held and multiplied.
///
/// Candle multiplies quantized weights directly, with activations that it rounds to 8 bits for
/// that. For one token, and for the types it has vector code for, that is the fastest way, because
/// few bytes are read. For many tokens an f32 matrix product is several times faster: on two cores
/// with AVX-512, 64 tokens times a `[1536, 576]` matrix took 21 ms in Q4_1, 7.1 ms in Q8_0, and
/// 0.8 ms in f32, to which dequantizing adds 1.3 to 1.9 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum WeightFormat {
    /// What is fastest: types for which Candle has scalar code only (Q4_1, Q5_0, Q5_1) become f32
    /// when the model is loaded; of the others, those whose product is slower than that of f32 are
    /// dequantized for each call with 64 tokens or more, and forgotten after it.
    #[default]
    Auto,
    /// As in the file, whatever the number of tokens: least memory.
    Quantized,
    /// f32: four bytes a weight, and activations are not rounded.
    Dense,
}

/// From this number of tokens on, dequantizing a matrix costs less than it saves.
const MANY_TOKENS: usize = 64;

/// A matrix `[N, K]` that multiplies tokens from the right, transposed: `x·W^T`.
#[derive(Debug, Clone)]
pub(super) enum Matrix {
    Dense(Tensor),
    Quantized {
        weight: Arc<QTensor>,
        /// Whether many tokens are multiplied with a dequantized copy.
        expand: bool,
    },
}

impl Matrix {
    /// From a tensor of a GGUF file.
    pub(super) fn from_gguf(tensor: QTensor, format: WeightFormat) -> Result<Self> {
        let dense = match tensor.dtype() {
            GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => true,
            GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 => {
                format != WeightFormat::Quantized
            }
            _ => format == WeightFormat::Dense,
        };
        if dense {
            return Ok(Self::Dense(tensor.dequantize(&tensor.device())?));
        }
        let expand = format == WeightFormat::Auto
            && tensor.device().is_cpu()
            && !has_fast_product(tensor.dtype(), tensor.shape().dims()[1]);
        Ok(Self::Quantized { weight: Arc::new(tensor), expand })
    }

    /// `[.., K]` to `[.., N]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.elem_count() / x.dim(D::Minus1)?.max(1);
        match self {
            Self::Dense(weight) => product(x, weight),
            Self::Quantized { weight, expand: true } if tokens >= MANY_TOKENS => {
                product(x, &weight.dequantize(&Device::Cpu)?)
            }
            Self::Quantized { weight, .. } => Ok(QMatMul::QTensor(weight.clone()).forward(x)?),
        }
    }

    /// Rows by id: `[B, N]` U32 to `[B, N, K]`.
    pub(super) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(table) => QMatMul::Tensor(table.clone()).embedding(ids)?,
            Self::Quantized { weight, .. } => weight.embedding(ids)?,
        })
    }
}

/// Whether Candle multiplies many tokens with this type as fast as f32: where it repacks blocks of
/// 256 weights for dot product instructions.
fn has_fast_product(dtype: GgmlDType, depth: usize) -> bool {
    match dtype {
        GgmlDType::Q4K | GgmlDType::Q6K => true,
        GgmlDType::Q8_0 => depth.is_multiple_of(256),
        _ => false,
    }
}

/// All tokens in one product: Candle multiplies each matrix of a batch on its own.
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    let tokens = x.elem_count() / k.max(1);
    let last = shape.len() - 1;
    shape[last] = n;
    let x = x.reshape((tokens, k))?;
    let y = match tokens == 1 && x.device().is_cpu() {
        true => one_token(&x, weight)?,
        false => x.matmul(&weight.t()?)?,
    };
    Ok(y.reshape(shape)?)
}

/// `[1, K]` to `[1, N]`, on the CPU. Reading the weights takes all the time; Candle's product
/// takes as long again to count the processors, which it does for each call (from `/proc/cpuinfo`).
fn one_token(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (n, k) = weight.dims2()?;
    let (x_storage, x_layout) = x.storage_and_layout();
    let (weight_storage, weight_layout) = weight.storage_and_layout();
    let x = contiguous(&x_storage, x_layout)?;
    let weight = contiguous(&weight_storage, weight_layout)?;
    let level = Level::active()?;
    let mut y = vec![0f32; n];
    let rows = (PIECE / k.max(1)).max(1);
    let pieces = y.par_chunks_mut(rows).zip(weight.par_chunks(rows * k.max(1)));
    pieces.for_each(|(y, weight)| level.dots(Rows::contiguous(weight, x.len()), Rows::one(x), y));
    Ok(Tensor::from_vec(y, (1, n), &Device::Cpu)?)
}

/// Weights that one thread takes at a time.
const PIECE: usize = 1 << 15;

/// The elements of a contiguous f32 tensor on the CPU.
pub(super) fn contiguous<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(&storage.as_slice::<f32>()?[start..end]),
        _ => {
            Err(Error::Unsupported("a tensor is not contiguous on the CPU, as was expected".into()))
        }
    }
}

/// `x·W^T + b`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl Linear {
    pub(super) fn new(weight: Matrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.forward(x)?;
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(bias)?),
            None => Ok(y),
        }
    }
}
