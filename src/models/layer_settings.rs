//! Which attention each layer of a model uses, as a file.

use super::LayeredModel;
use crate::attention::Backend;
use crate::files::{corrupt, read_text, write};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The backends of all layers of a model, as written by hand or by
/// [`drift::search`](crate::drift::search). What the model itself asks for (scale, softcap, windows)
/// is not in it.
///
/// The file is JSON, with each layer in the form of a [`Backend`]:
///
/// ```json
/// {
///   "format": "candle-int8-attention layer settings",
///   "version": 1,
///   "layers": [
///     { "backend": "int8", "scheme": "symmetric", "granularity": "token",
///       "smooth_k": true, "smooth_q": false, "pv": "auto" },
///     { "backend": "fp32" }
///   ]
/// }
/// ```
///
/// A run of tokens that shares a scale is `"block:64"`. A layer in int8 names all of its choices, one
/// in fp32 has none, and any other key is an error. `about` may hold anything; the search writes
/// there what it measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSettings {
    format: String,
    version: u32,
    /// First layer first.
    pub layers: Vec<Backend>,
    /// What is known about them.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    about: serde_json::Value,
}

const FORMAT: &str = "candle-int8-attention layer settings";
const VERSION: u32 = 1;

impl LayerSettings {
    /// Settings for layers, first to last.
    pub fn new(layers: Vec<Backend>) -> Self {
        let about = serde_json::Value::Null;
        Self { format: FORMAT.to_string(), version: VERSION, layers, about }
    }

    /// The same with a note on where they are from, which becomes JSON.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what has no form in JSON.
    pub fn with_about(self, about: &impl Serialize) -> Result<Self> {
        let about = serde_json::to_value(about).map_err(|e| Error::Unsupported(e.to_string()))?;
        Ok(Self { about, ..self })
    }

    /// What is known about them, as JSON; `null` for nothing.
    pub fn about_json(&self) -> String {
        self.about.to_string()
    }

    /// Switches the layers of a model. What the model asks for (scale, windows) stays.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless the model has as many layers.
    pub fn apply(&self, model: &mut impl LayeredModel) -> Result<()> {
        let layers = model.attention_mut();
        if layers.len() != self.layers.len() {
            return Err(Error::Mismatch(format!(
                "settings of {} layers for a model of {}",
                self.layers.len(),
                layers.len()
            )));
        }
        for (layer, backend) in layers.into_iter().zip(&self.layers) {
            layer.set_config(layer.config().with_backend(backend.clone()));
        }
        Ok(())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written; what was there before is still there then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let json = serde_json::to_string_pretty(self).map_err(|e| corrupt(path, e))?;
        write(path, json.as_bytes())
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for anything that is not such
    /// a file, or of another version, unknown keys included.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text("layer settings", path)?;
        let file: Self = serde_json::from_str(&text)
            .map_err(|e| corrupt(path, format!("not layer settings: {e}")))?;
        if (file.format.as_str(), file.version) != (FORMAT, VERSION) {
            let problem = format!(
                "{:?} of version {}, expected {FORMAT:?} of version {VERSION}",
                file.format, file.version
            );
            return Err(corrupt(path, problem));
        }
        Ok(file)
    }
}
