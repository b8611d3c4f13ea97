//! Tensors by name and shape, out of one safetensors file or of several with an index.

use crate::files::{corrupt, read, read_text};
use crate::{Error, Result};
use candle_core::safetensors::BufferedSafetensors;
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Whether this is the name of an index of several files.
pub(super) fn is_index(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.ends_with(".safetensors.index.json"))
}

/// Safetensors whose tensors are asked for by name and shape: a file, or all those that an index
/// (`model.safetensors.index.json`) names.
pub struct Weights {
    /// The file, or the index.
    path: PathBuf,
    files: Vec<BufferedSafetensors>,
    /// Every tensor, and which of the files holds it.
    names: BTreeMap<String, usize>,
    prefix: String,
}

impl Weights {
    /// Reads the file, or the files that the index at `path` names, and checks the headers.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for a file that is truncated
    /// or is not safetensors, for an index that is none or names what is not beside it, and
    /// for a tensor that two of its files hold.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let paths = match is_index(path) {
            true => shard_files(path)?.iter().map(|name| path.with_file_name(name)).collect(),
            false => vec![path.to_path_buf()],
        };
        let files = paths.iter().map(|path| open_file(path)).collect::<Result<Vec<_>>>()?;
        let mut names = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (name, _) in file.tensors() {
                if let Some(other) = names.insert(name.clone(), number) {
                    let [a, b] = [other, number].map(|file| paths[file].display());
                    return Err(corrupt(path, format!("tensor {name:?} is in {a} and in {b}")));
                }
            }
        }
        Ok(Self { path: path.to_path_buf(), files, names, prefix: String::new() })
    }

    /// `model.safetensors` of a folder, or else what its `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Those of [`Weights::open`].
    pub(super) fn open_folder(folder: &Path) -> Result<Self> {
        let [single, index] = ["model.safetensors", "model.safetensors.index.json"];
        let [single, index] = [single, index].map(|name| folder.join(name));
        Self::open(if single.is_file() || !index.is_file() { single } else { index })
    }

    /// From now on, looks names up behind `prefix` as well if there is any tensor.
    pub(super) fn with_prefix_if_present(mut self, prefix: &str) -> Self {
        if self.has_any(prefix) {
            self.prefix.push_str(prefix);
        }
        self
    }

    /// Whether there is a tensor whose name starts with `start`.
    pub(super) fn has_any(&self, start: &str) -> bool {
        let start = format!("{}{start}", self.prefix);
        self.names.range(start.clone()..).next().is_some_and(|(name, _)| name.starts_with(&start))
    }

    /// Whether there is a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains_key(&format!("{}{name}", self.prefix))
    }

    /// The shape of the tensor `name`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if there is none.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        let name = format!("{}{name}", self.prefix);
        match self.find(&name) {
            Some((view, _)) => Ok(view.shape().to_vec()),
            None => Err(self.missing(name)),
        }
    }

    /// The tensor `name` as f32; stored as F32, F16, BF16 or F64.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] if there is none, [`Error::ModelShape`] if its shape is not
    /// `shape`, [`Error::Corrupt`] if it is stored as anything else: integers, or floats of 8 bits
    /// and less, whose values mean nothing without a scale.
    pub fn get(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        self.get_full(format!("{}{name}", self.prefix), shape, device)
    }

    /// [`Weights::get`] of a name that is never behind a prefix, such as those of a head.
    pub(super) fn get_outside(
        &self,
        name: &str,
        shape: &[usize],
        device: &Device,
    ) -> Result<Tensor> {
        self.get_full(name.to_string(), shape, device)
    }

    fn get_full(&self, name: String, shape: &[usize], device: &Device) -> Result<Tensor> {
        let Some((view, file)) = self.find(&name) else {
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
        let tensor = file.load(&name, device).map_err(|e| corrupt(&self.path, e))?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    fn find(&self, name: &str) -> Option<(TensorView<'_>, &BufferedSafetensors)> {
        let file = &self.files[*self.names.get(name)?];
        Some((file.get(name).ok()?, file))
    }

    /// The name of the tensor that scales this one, in files of quantized weights.
    fn scale_of(&self, name: &str) -> Option<String> {
        let names = ["_scale", "_scale_inv", ".scale", "_qscale"];
        let names = names.map(|ending| format!("{name}{ending}"));
        names.into_iter().find(|scale| self.names.contains_key(scale))
    }

    /// Where the tensors of a head that nothing here computes begin, such as that of a classifier.
    /// They have no prefix.
    pub(super) fn unused_head(&self) -> Option<&'static str> {
        let heads = ["classifier.", "pre_classifier.", "qa_outputs.", "score."];
        heads.into_iter().find(|head| self.names.keys().any(|name| name.starts_with(head)))
    }

    fn missing(&self, name: String) -> Error {
        Error::MissingTensor { path: self.path.clone(), hint: self.hint(&name), name }
    }

    /// What the file holds, for someone who looked for `name`.
    fn hint(&self, name: &str) -> String {
        let last = name.rsplit('.').take(2).collect::<Vec<_>>();
        let similar = self.names.keys().find(|n| last.iter().all(|part| n.contains(part)));
        match similar.or(self.names.keys().next()) {
            Some(other) => {
                format!(" (it holds {} tensors, for example {other:?})", self.names.len())
            }
            None => " (it holds no tensor)".to_string(),
        }
    }
}

fn open_file(path: &Path) -> Result<BufferedSafetensors> {
    let bytes = read("weights", path)?;
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(corrupt(path, "a Git LFS pointer; fetch the file itself (git lfs pull)"));
    }
    let size = bytes.len();
    BufferedSafetensors::new(bytes)
        .map_err(|e| corrupt(path, format!("not a whole safetensors file ({size} bytes): {e}")))
}

/// `model.safetensors.index.json`.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// The files that the index of safetensors at `path` names, sorted.
///
/// # Errors
/// [`Error::Corrupt`] for what is no index, or names something that is not a file beside it.
pub(crate) fn shard_files(path: &Path) -> Result<Vec<String>> {
    let index: Index = serde_json::from_str(&read_text("weights index", path)?)
        .map_err(|e| corrupt(path, format!("not an index of safetensors: {e}")))?;
    let mut names: Vec<String> = index.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    let plain = |name: &&String| Path::new(name).file_name().is_some_and(|n| n == name.as_str());
    match names.iter().find(|name| !plain(name)) {
        Some(name) => Err(corrupt(path, format!("names {name:?}, expected a file beside it"))),
        None if names.is_empty() => Err(corrupt(path, "names no tensor")),
        None => Ok(names),
    }
}
