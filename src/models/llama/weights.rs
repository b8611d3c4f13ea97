//! A model's tensors by their part in it, whichever file format they are from.

use super::super::Weights;
use super::gguf::Gguf;
use super::linear::{Linear, Matrix, WeightFormat};
use crate::Result;
use candle_core::{Device, Tensor};
use candle_nn::RmsNorm;

/// A tensor's part in the model: its name in GGUF and in safetensors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    gguf: &'static str,
    hugging_face: &'static str,
}

impl Part {
    const fn new(gguf: &'static str, hugging_face: &'static str) -> Self {
        Self { gguf, hugging_face }
    }

    pub(super) const EMBEDDINGS: Self = Self::new("token_embd", "model.embed_tokens");
    pub(super) const OUTPUT_NORM: Self = Self::new("output_norm", "model.norm");
    pub(super) const OUTPUT: Self = Self::new("output", "lm_head");
    // Of a layer:
    pub(super) const ATTENTION_NORM: Self = Self::new("attn_norm", "input_layernorm");
    pub(super) const QUERY: Self = Self::new("attn_q", "self_attn.q_proj");
    pub(super) const KEY: Self = Self::new("attn_k", "self_attn.k_proj");
    pub(super) const VALUE: Self = Self::new("attn_v", "self_attn.v_proj");
    pub(super) const ATTENTION_OUTPUT: Self = Self::new("attn_output", "self_attn.o_proj");
    pub(super) const FFN_NORM: Self = Self::new("ffn_norm", "post_attention_layernorm");
    pub(super) const GATE: Self = Self::new("ffn_gate", "mlp.gate_proj");
    pub(super) const UP: Self = Self::new("ffn_up", "mlp.up_proj");
    pub(super) const DOWN: Self = Self::new("ffn_down", "mlp.down_proj");
}

/// Where tensors are from.
pub(super) enum Source<'a> {
    Gguf(&'a Gguf, WeightFormat),
    Safetensors(&'a Weights),
}

/// A source with what loading needs to know besides.
pub(super) struct Loader<'a> {
    source: Source<'a>,
    eps: f64,
    device: &'a Device,
    /// The layer whose parts are asked for; none for parts of the whole model.
    layer: Option<usize>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(source: Source<'a>, eps: f64, device: &'a Device) -> Self {
        Self { source, eps, device, layer: None }
    }

    pub(super) fn layer(&mut self, index: usize) -> &Self {
        self.layer = Some(index);
        self
    }

    /// Whether there are tensors of layer `index`.
    pub(super) fn has_layer(&self, index: usize) -> bool {
        match self.source {
            Source::Gguf(file, _) => file.has_any(&format!("blk.{index}.")),
            Source::Safetensors(weights) => weights.has_any(&format!("model.layers.{index}.")),
        }
    }

    /// Where the tensors of a head that nothing here computes begin.
    pub(super) fn unused_head(&self) -> Option<&'static str> {
        match self.source {
            Source::Gguf(..) => None,
            Source::Safetensors(weights) => weights.unused_head(),
        }
    }

    /// A matrix `[rows, columns]`.
    pub(super) fn matrix(&self, part: Part, rows: usize, columns: usize) -> Result<Matrix> {
        let name = self.name(part, "weight");
        let shape = [rows, columns];
        match self.source {
            Source::Gguf(file, format) => {
                Matrix::from_gguf(file.tensor(&name, Some(&shape), self.device)?, format)
            }
            Source::Safetensors(weights) => {
                Ok(Matrix::Dense(weights.get(&name, &shape, self.device)?))
            }
        }
    }

    /// A linear layer, with a bias if the file has one.
    pub(super) fn linear(&self, part: Part, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.matrix(part, rows, columns)?;
        let bias = self.name(part, "bias");
        let has_bias = match self.source {
            Source::Gguf(file, _) => file.has(&bias),
            Source::Safetensors(weights) => weights.has(&bias),
        };
        let bias = if has_bias { Some(self.vector(&bias, rows)?) } else { None };
        Ok(Linear::new(weight, bias))
    }

    pub(super) fn norm(&self, part: Part, width: usize) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.vector(&self.name(part, "weight"), width)?, self.eps))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Tensor> {
        match self.source {
            Source::Gguf(file, _) => {
                Ok(file.tensor(name, Some(&[len]), self.device)?.dequantize(self.device)?)
            }
            Source::Safetensors(weights) => weights.get(name, &[len], self.device),
        }
    }

    fn name(&self, part: Part, kind: &str) -> String {
        match (&self.source, self.layer) {
            (Source::Gguf(..), None) => format!("{}.{kind}", part.gguf),
            (Source::Gguf(..), Some(layer)) => format!("blk.{layer}.{}.{kind}", part.gguf),
            (Source::Safetensors(_), None) => format!("{}.{kind}", part.hugging_face),
            (Source::Safetensors(_), Some(layer)) => {
                format!("model.layers.{layer}.{}.{kind}", part.hugging_face)
            }
        }
    }
}
