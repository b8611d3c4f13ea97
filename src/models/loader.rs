//! Layers out of the weights of an encoder: the one place where names become layers.

use super::{BertConfig, Weights};
use crate::nn::{Embeddings, LayerNorm, Linear, Precision};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// Weights with what every layer needs to know.
pub(super) struct Loader<'a> {
    weights: &'a Weights,
    eps: f64,
    device: &'a Device,
    /// Whether names are those of a head, which stand behind no prefix.
    outside: bool,
}

/// How many rows the tables of embeddings have.
pub(super) struct TableRows {
    pub(super) words: usize,
    pub(super) positions: usize,
    /// Where the model tells token types apart.
    pub(super) types: Option<usize>,
}

impl TableRows {
    pub(super) fn of(config: &BertConfig) -> Self {
        Self {
            words: config.vocab_size,
            positions: config.max_position_embeddings,
            types: Some(config.type_vocab_size),
        }
    }
}

impl<'a> Loader<'a> {
    /// `eps` is that of the norms.
    pub(super) fn new(weights: &'a Weights, eps: f64, device: &'a Device) -> Self {
        Self { weights, eps, device, outside: false }
    }

    /// Of a head, whose names stand behind no prefix.
    pub(super) fn outside(weights: &'a Weights, eps: f64, device: &'a Device) -> Self {
        Self { weights, eps, device, outside: true }
    }

    /// # Errors
    /// [`Error::Mismatch`] if the weights hold more layers than the configuration.
    pub(super) fn check_layers(&self, layers: usize, before: &str) -> Result<()> {
        let beyond = format!("{before}.{layers}.");
        if self.weights.has_any(&beyond) {
            return Err(Error::Mismatch(format!(
                "num_hidden_layers {layers}, but the weights hold more: {beyond}*"
            )));
        }
        Ok(())
    }

    pub(super) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if self.outside {
            return self.weights.get_outside(name, shape, self.device);
        }
        self.weights.get(name, shape, self.device)
    }

    /// Those of words, of positions and, if it has rows, of token types, with their norm.
    pub(super) fn embeddings(&self, rows: TableRows, hidden: usize) -> Result<Embeddings> {
        let table = |name: &str, rows: usize| {
            self.get(&format!("embeddings.{name}_embeddings.weight"), &[rows, hidden])
        };
        let words = table("word", rows.words)?;
        let positions = table("position", rows.positions)?;
        let types = rows.types.map(|rows| table("token_type", rows)).transpose()?;
        let norm = self.norm("embeddings.LayerNorm", hidden)?;
        Ok(Embeddings::new(words, types, Some(positions), norm))
    }

    /// Layers with the same input as one, whose outputs are theirs one after the other.
    pub(super) fn linear(&self, names: &[String], rows: usize, columns: usize) -> Result<Linear> {
        let of_all = |part: &str, shape: &[usize]| -> Result<Tensor> {
            let get = |name: &String| self.get(&format!("{name}.{part}"), shape);
            Ok(Tensor::cat(&names.iter().map(get).collect::<Result<Vec<_>>>()?, 0)?)
        };
        let (weight, bias) = (of_all("weight", &[rows, columns])?, of_all("bias", &[rows])?);
        Linear::new(&weight, Some(&bias), Precision::F32)
    }

    /// Some of the `rows` outputs of a layer without a bias.
    pub(super) fn unbiased(
        &self,
        name: &str,
        [rows, columns]: [usize; 2],
        outputs: Range<usize>,
    ) -> Result<Linear> {
        let weight = self.get(&format!("{name}.weight"), &[rows, columns])?;
        let weight = weight.narrow(0, outputs.start, outputs.len())?.contiguous()?;
        Linear::new(&weight, None, Precision::F32)
    }

    pub(super) fn norm(&self, name: &str, width: usize) -> Result<LayerNorm> {
        // The oldest files use TensorFlow's names.
        let (weight, bias) = match self.weights.has_any(&format!("{name}.gamma")) {
            true => ("gamma", "beta"),
            false => ("weight", "bias"),
        };
        let weight = self.get(&format!("{name}.{weight}"), &[width])?;
        let bias = self.get(&format!("{name}.{bias}"), &[width])?;
        LayerNorm::new(weight, bias, self.eps)
    }

    pub(super) fn unbiased_norm(&self, name: &str, width: usize) -> Result<LayerNorm> {
        let weight = self.get(&format!("{name}.weight"), &[width])?;
        LayerNorm::new(weight, Tensor::zeros(width, DType::F32, self.device)?, self.eps)
    }
}
