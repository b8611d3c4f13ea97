//! A model's tensors by their part in it, whichever file format they are from.

use super::super::Weights;
use super::gguf::Gguf;
use super::linear::{Linear, Matrix, WeightFormat};
use crate::Result;
use crate::files::{corrupt, read_text};
use candle_core::{Device, Tensor};
use candle_nn::RmsNorm;
use std::collections::HashMap;
use std::path::Path;

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
    Safetensors(&'a Shards),
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
            Source::Safetensors(shards) => shards.has_any(&format!("model.layers.{index}.")),
        }
    }

    /// Where the tensors of a head that nothing here computes begin.
    pub(super) fn unused_head(&self) -> Option<&'static str> {
        match self.source {
            Source::Gguf(..) => None,
            Source::Safetensors(shards) => shards.files.iter().find_map(Weights::unused_head),
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
            Source::Safetensors(shards) => {
                Ok(Matrix::Dense(shards.get(&name, &shape, self.device)?))
            }
        }
    }

    /// A linear layer, with a bias if the file has one.
    pub(super) fn linear(&self, part: Part, rows: usize, columns: usize) -> Result<Linear> {
        let weight = self.matrix(part, rows, columns)?;
        let bias = self.name(part, "bias");
        let has_bias = match self.source {
            Source::Gguf(file, _) => file.has(&bias),
            Source::Safetensors(shards) => shards.has(&bias),
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
            Source::Safetensors(shards) => shards.get(name, &[len], self.device),
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

/// The safetensors of a folder: one file, or several with an index.
pub(super) struct Shards {
    files: Vec<Weights>,
    /// Which file holds a tensor; empty if there is only one.
    index: HashMap<String, usize>,
}

/// `model.safetensors.index.json`.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Index {
    fn read(path: &Path) -> Result<Self> {
        serde_json::from_str(&read_text("weights index", path)?)
            .map_err(|e| corrupt(path, format!("not an index of safetensors: {e}")))
    }

    /// The files that it names, sorted. All must lie beside the index itself, at `path`.
    fn files(&self, path: &Path) -> Result<Vec<String>> {
        let mut names: Vec<String> = self.weight_map.values().cloned().collect();
        names.sort();
        names.dedup();
        let plain =
            |name: &&String| Path::new(name).file_name().is_some_and(|n| n == name.as_str());
        match names.iter().find(|name| !plain(name)) {
            Some(name) => Err(corrupt(path, format!("names {name:?}, expected a file beside it"))),
            None if names.is_empty() => Err(corrupt(path, "names no tensor")),
            None => Ok(names),
        }
    }
}

/// The files that the index of safetensors at `path` names.
///
/// # Errors
/// [`Error::Corrupt`](crate::Error::Corrupt) for what is no index, or names something that is not a
/// file beside it.
#[cfg(feature = "hub")]
pub(crate) fn shard_files(path: &Path) -> Result<Vec<String>> {
    Index::read(path)?.files(path)
}

impl Shards {
    /// `model.safetensors` of the folder, or what its `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Those of [`Weights::open`]; [`Error::Corrupt`](crate::Error::Corrupt) for an index that is none.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let (single, index) =
            (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        if single.is_file() || !index.is_file() {
            return Ok(Self { files: vec![Weights::open(single)?], index: HashMap::new() });
        }
        Self::open_index(folder, &index)
    }

    fn open_index(folder: &Path, path: &Path) -> Result<Self> {
        let index = Index::read(path)?;
        let names = index.files(path)?;
        let files = names
            .iter()
            .map(|name| Weights::open(folder.join(name)))
            .collect::<Result<Vec<_>>>()?;
        let number: HashMap<&str, usize> =
            (0..).zip(&names).map(|(i, n)| (n.as_str(), i)).collect();
        let map = index.weight_map.iter();
        let index = map.map(|(tensor, file)| (tensor.clone(), number[file.as_str()])).collect();
        Ok(Self { files, index })
    }

    fn file_of(&self, name: &str) -> &Weights {
        &self.files[self.index.get(name).copied().unwrap_or(0)]
    }

    fn has(&self, name: &str) -> bool {
        self.file_of(name).shape(name).is_ok()
    }

    fn has_any(&self, start: &str) -> bool {
        self.files.iter().any(|file| file.has_any(start))
    }

    fn get(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.file_of(name).get(name, shape, device)
    }
}
