//! The weights of a layer, packed in one of the precisions.

use super::float::FloatWeights;
use super::int8::Int8Weights;
use super::int16::Int16Weights;
use crate::cpu::Level;
use crate::memory::check_size;
use crate::quant::words::words;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

pub(super) const OP: &str = "linear";

/// In which numbers a [`Linear`](super::Linear) multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Precision {
    /// f32 with f32 sums.
    #[default]
    F32,
    /// int16 with int32 sums that are exact over 64 inputs: near exact, at twice the speed of f32. Rows have 12
    /// bits and a sign, weights 13, with a scale for each row or output and 64 inputs.
    Int16,
    /// int8 with exact int32 sums. Rows and weights are rotated (see
    /// [`Rotation`](crate::quant::Rotation)), then rounded to symmetric codes with one scale a row of
    /// the input, found when it comes, and one an output, found when the weights are packed: to the nearest
    /// codes, or to those that suit the inputs ([`Linear::to_int8_for`](super::Linear::to_int8_for)).
    Int8,
}

// As on command lines and in files.
words!(Precision, "precision {:?} of linear layers", F32 = "f32", Int16 = "int16", Int8 = "int8");

/// Weights and bias for the fused op.
pub(super) struct Packed {
    pub weights: Weights,
    /// Padded to whole panels.
    pub bias: Vec<f32>,
    /// What entered the layer, while it is watched.
    pub seen: Option<Mutex<Vec<Tensor>>>,
}

/// In the order in which a kernel reads them.
pub(super) enum Weights {
    Float(FloatWeights),
    Int16(Int16Weights),
    Int8(Int8Weights),
}

impl Weights {
    /// Packs `weights`, row-major `[outputs, depth]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than memory has addresses, [`Error::Depth`] for int8 sums beyond int32.
    pub(super) fn new(
        level: Level,
        precision: Precision,
        weights: &[f32],
        (outputs, depth): (usize, usize),
    ) -> Result<Self> {
        check_size(OP, "weight", &[outputs, depth])?;
        Ok(match precision {
            Precision::F32 => Self::Float(FloatWeights::new(level, weights, (outputs, depth))),
            Precision::Int16 => Self::Int16(Int16Weights::new(level, weights, (outputs, depth))),
            Precision::Int8 => {
                Self::Int8(Int8Weights::new(level, weights, (outputs, depth), None)?)
            }
        })
    }

    pub(super) fn precision(&self) -> Precision {
        match self {
            Self::Float(_) => Precision::F32,
            Self::Int16(_) => Precision::Int16,
            Self::Int8(_) => Precision::Int8,
        }
    }

    pub(super) fn outputs(&self) -> usize {
        match self {
            Self::Float(weights) => weights.matrix().columns(),
            Self::Int16(weights) => weights.matrix().columns(),
            Self::Int8(weights) => weights.outputs(),
        }
    }

    pub(super) fn depth(&self) -> usize {
        match self {
            Self::Float(weights) => weights.matrix().depth(),
            Self::Int16(weights) => weights.matrix().depth(),
            Self::Int8(weights) => weights.depth(),
        }
    }

    /// Outputs that are computed at a time.
    pub(super) fn panel_width(&self) -> usize {
        match self {
            Self::Float(weights) => weights.matrix().panel_width(),
            Self::Int16(weights) => weights.matrix().panel_width(),
            Self::Int8(weights) => weights.panel_width(),
        }
    }

    /// Rows of a task that has all outputs, at least, where threads are to have as many: of fewer, each would read all
    /// weights for little. (8 of them for each of two threads: MiniLM-L3 on Zen 5, AVX-512 VNNI, takes 0.92 to 0.95 of
    /// the time in integers, but 1.15 in f32, whose weights are larger.)
    pub(super) fn fewest_rows(&self) -> usize {
        match self {
            Self::Float(_) => 32,
            Self::Int16(_) | Self::Int8(_) => 16,
        }
    }

    /// Row-major `[outputs, depth]`: what the packed numbers stand for.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        match self {
            Self::Float(weights) => weights.unpacked(),
            Self::Int16(weights) => weights.unpacked(),
            Self::Int8(weights) => weights.unpacked(),
        }
    }
}

impl Packed {
    pub(super) fn new(weights: Weights, bias: &[f32]) -> Self {
        assert_eq!(weights.outputs(), bias.len());
        let mut bias = bias.to_vec();
        bias.resize(bias.len().next_multiple_of(weights.panel_width()), 0.0);
        Self { weights, bias, seen: None }
    }

    /// Keeps an input, while the layer is watched.
    pub(super) fn see(&self, x: &Tensor) {
        if let Some(seen) = &self.seen {
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(x.clone());
        }
    }

    pub(super) fn bias(&self) -> &[f32] {
        &self.bias[..self.weights.outputs()]
    }

    /// The same layer in Candle's form.
    pub(super) fn unpacked(&self) -> Result<candle_nn::Linear> {
        let shape = (self.weights.outputs(), self.weights.depth());
        let weight = Tensor::from_vec(self.weights.unpacked(), shape, &Device::Cpu)?;
        Ok(candle_nn::Linear::new(weight, Some(Tensor::new(self.bias(), &Device::Cpu)?)))
    }
}

pub(super) fn misshaped(tensor: &'static str, shape: &[usize], expected: String) -> Error {
    Error::Shape { op: OP, tensor, shape: shape.into(), expected }
}
