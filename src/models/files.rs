//! The files of an encoder, and what no model's files may ask for.

use super::sentence::{self, Module};
use super::weights;
use crate::files::{corrupt, read_text};
use crate::{Error, Result};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// The three files of an encoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Safetensors weights, or the index of several such files (`*.safetensors.index.json`).
    pub weights: PathBuf,
    /// `config.json`. What sentence-transformers stores with a model is looked for beside it.
    pub config: PathBuf,
    /// `tokenizer.json`.
    pub tokenizer: PathBuf,
}

/// Names of weights, the first that is there is taken.
const WEIGHTS: [&str; 3] =
    ["model.safetensors", "model-f16.safetensors", "model.safetensors.index.json"];

impl ModelFiles {
    /// The files in `folder`: `model.safetensors` (or else `model-f16.safetensors`, or
    /// `model.safetensors.index.json`), `config.json`, `tokenizer.json`.
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
            weights: find("weights", &WEIGHTS)?,
            config: find("config", &["config.json"])?,
            tokenizer: find("tokenizer", &["tokenizer.json"])?,
        })
    }

    /// These files and all that belong to them: those that an index of weights names, and what
    /// sentence-transformers stores beside a model.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for an index or a `modules.json` that is none.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        let mut all = vec![self.weights.clone(), self.config.clone(), self.tokenizer.clone()];
        if weights::is_index(&self.weights) {
            let names = weights::shard_files(&self.weights)?;
            all.extend(names.iter().map(|name| self.weights.with_file_name(name)));
        }
        let beside = |name: &str| self.config.with_file_name(name);
        let mut names: Vec<String> = sentence::FILES.map(str::to_string).into();
        let modules = beside("modules.json");
        if modules.is_file() {
            names.extend(sentence::read_modules(&modules)?.iter().flat_map(Module::files));
        }
        names.sort();
        names.dedup();
        all.extend(names.iter().map(|name| beside(name)).filter(|path| path.is_file()));
        Ok(all)
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

/// A configuration, out of the text of the file at `path`.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, text: &str, of: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| corrupt(path, format!("not the configuration of {of}: {e}")))
}

/// Reads the configuration of a family, whose weights are not quantized.
pub(super) fn read_config<T: DeserializeOwned>(path: &Path, of: &str) -> Result<T> {
    let text = read_text("config", path)?;
    refuse_quantized(path, &text)?;
    parse(path, &text, of)
}
