//! The files of a model, and tensors out of them.

use crate::files::{corrupt, read};
use crate::{Error, Result};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use std::path::{Path, PathBuf};

/// The three files of an encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Safetensors weights.
    pub weights: PathBuf,
    /// `config.json`.
    pub config: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
}

impl ModelFiles {
    /// The files in `folder`: `model.safetensors` (or else `model-f16.safetensors`),
    /// `config.json`, `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::MissingFile`] for the first that is not there.
    pub fn from_dir(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        if !folder.is_dir() {
            return Err(Error::MissingFile { what: "model folder", path: folder.to_path_buf() });
        }
        let find = |what: &'static str, names: &[&str]| {
            let mut paths = names.iter().map(|name| folder.join(name));
            match paths.find(|path| path.is_file()) {
                Some(path) => Ok(path),
                None => Err(Error::MissingFile { what, path: folder.join(names[0]) }),
            }
        };
        Ok(Self {
            weights: find("weights", &["model.safetensors", "model-f16.safetensors"])?,
            config: find("config", &["config.json"])?,
            tokenizer: find("tokenizer", &["tokenizer.json"])?,
        })
    }
}

/// A warning about the tensors of a head, whose names begin like this.
pub(super) fn unused_head(start: &str) -> String {
    format!(
        "the weights hold a head ({start}*), as of a classifier, which is ignored: what comes out are \
         hidden states"
    )
}

/// Refuses the `config.json` at `path` of weights that are quantized in a way of their own.
///
/// # Errors
/// [`Error::Unsupported`] with the name of the method.
pub(super) fn refuse_quantized(path: &Path, text: &str) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Config {
        #[serde(alias = "compression_config")]
        quantization_config: Option<serde_json::Value>,
    }
    // What is no configuration at all is told by whoever reads the rest of it.
    let config: Option<Config> = serde_json::from_str(text).ok();
    let Some(found) = config.and_then(|config| config.quantization_config) else { return Ok(()) };
    let method = found.get("quant_method").or(found.get("quant_algo")).unwrap_or(&found);
    Err(Error::Unsupported(format!(
        "{}: quantization_config with the method {method}, which is not supported; expected weights \
         in f32, f16, bf16 or f64",
        path.display()
    )))
}

/// A safetensors file whose tensors are asked for by name and shape.
pub struct Weights {
    path: PathBuf,
    file: BufferedSafetensors,
    prefix: String,
}

impl Weights {
    /// Reads the file and checks its header.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for a file that is truncated
    /// or is not safetensors.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = read("weights", path)?;
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(corrupt(path, "a Git LFS pointer; fetch the file itself (git lfs pull)"));
        }
        let size = bytes.len();
        let file = BufferedSafetensors::new(bytes).map_err(|e| {
            corrupt(path, format!("not a whole safetensors file ({size} bytes): {e}"))
        })?;
        Ok(Self { path: path.to_path_buf(), file, prefix: String::new() })
    }

    /// From now on, looks names up behind `prefix` if the file has any tensor there.
    pub(super) fn with_prefix_if_present(mut self, prefix: &str) -> Self {
        if self.has_any(prefix) {
            self.prefix = prefix.to_string();
        }
        self
    }

    /// Whether there is a tensor whose name starts with `start`.
    pub(super) fn has_any(&self, start: &str) -> bool {
        let start = format!("{}{start}", self.prefix);
        self.file.tensors().iter().any(|(name, _)| name.starts_with(&start))
    }

    /// The shape of the tensor `name`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if there is none.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let name = format!("{}{name}", self.prefix);
        match self.file.get(&name) {
            Ok(view) => Ok(view.shape().to_vec()),
            Err(_) => Err(self.missing(name)),
        }
    }

    /// The tensor `name` as f32; stored as F32, F16, BF16 or F64.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if there is none, [`Error::ModelShape`] if its shape is not
    /// `shape`, [`Error::Corrupt`] if it is stored as anything else: integers, or floats of 8 bits
    /// and less, whose values mean nothing without a scale.
    pub fn get(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let name = format!("{}{name}", self.prefix);
        let Ok(view) = self.file.get(&name) else {
            return Err(self.missing(name));
        };
        if view.shape() != shape {
            return Err(Error::ModelShape {
                path: self.path.clone(),
                found: view.shape().to_vec(),
                expected: shape.to_vec(),
                name,
            });
        }
        if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
            let scale = match self.scale_of(&name) {
                Some(scale) => format!("; it is quantized, and {scale:?} would be its scale"),
                None => String::new(),
            };
            let found = view.dtype();
            let problem = format!("tensor {name:?} is {found}, expected F32, F16, BF16 or F64");
            return Err(corrupt(&self.path, problem + &scale));
        }
        let tensor = self.file.load(&name, device).map_err(|e| corrupt(&self.path, e))?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    /// The name of the tensor that scales this one, in files of quantized weights.
    fn scale_of(&self, name: &str) -> Option<String> {
        let names = ["_scale", "_scale_inv", ".scale", "_qscale"];
        let names = names.map(|ending| format!("{name}{ending}"));
        names.into_iter().find(|scale| self.file.get(scale).is_ok())
    }

    /// Where the tensors of a head that nothing here computes begin, such as that of a classifier.
    /// They have no prefix.
    pub(super) fn unused_head(&self) -> Option<&'static str> {
        let heads = ["classifier.", "pre_classifier.", "qa_outputs.", "score."];
        let names = self.file.tensors();
        heads.into_iter().find(|head| names.iter().any(|(name, _)| name.starts_with(head)))
    }

    fn missing(&self, name: String) -> Error {
        Error::MissingTensor { path: self.path.clone(), hint: self.hint(&name), name }
    }

    /// What the file holds, for someone who looked for `name`.
    fn hint(&self, name: &str) -> String {
        let last = name.rsplit('.').take(2).collect::<Vec<_>>();
        let mut names: Vec<String> = self.file.tensors().into_iter().map(|(n, _)| n).collect();
        names.sort();
        let similar = names.iter().find(|n| last.iter().all(|part| n.contains(part)));
        match similar.or(names.first()) {
            Some(other) => format!(" (it holds {} tensors, for example {other:?})", names.len()),
            None => " (it holds no tensor)".to_string(),
        }
    }
}
