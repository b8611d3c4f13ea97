//! Which attention each layer of a model uses, and in which numbers its linear layers multiply, as a file.

use super::LayeredModel;
use super::layered::linear_in;
use crate::attention::Backend;
use crate::files::{corrupt, read_text, write};
use crate::nn::{Linear, Precision};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The backends of all layers of a model, and the precisions of its linear layers, as written by hand or by
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
///   ],
///   "linear": [
///     { "layer": 0, "product": "qkv", "precision": "int8" },
///     { "layer": 0, "product": "output", "precision": "int16" },
///     { "layer": 0, "product": "up", "precision": "f32" }
///   ]
/// }
/// ```
///
/// A run of tokens that shares a scale is `"block:64"`. A layer in int8 names all of its choices, one
/// in fp32 has none, and any other key is an error. `linear` names every product of the model once, in the
/// order of [`LayeredModel::linear_mut`], or is left out, and linear layers stay as they are. `about` may
/// hold anything; the search writes there what it measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSettings {
    format: String,
    version: u32,
    /// First layer first.
    pub layers: Vec<Backend>,
    /// All linear layers, or none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub linear: Vec<LinearSetting>,
    /// What is known about them.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    about: serde_json::Value,
}

/// The precision of one linear layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearSetting {
    /// The layer of the model that it is in, counted from 0.
    pub layer: usize,
    /// Which of its products, as [`NamedLinear`](super::NamedLinear) has it.
    pub product: String,
    /// In which numbers it multiplies.
    pub precision: Precision,
}

const FORMAT: &str = "candle-int8-attention layer settings";
const VERSION: u32 = 1;

impl LayerSettings {
    /// Settings for layers, first to last.
    pub fn new(layers: Vec<Backend>) -> Self {
        let (linear, about) = (Vec::new(), serde_json::Value::Null);
        Self { format: FORMAT.to_string(), version: VERSION, layers, linear, about }
    }

    /// The same with precisions of all linear layers.
    pub fn with_linear(self, linear: Vec<LinearSetting>) -> Self {
        Self { linear, ..self }
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

    /// Switches the layers of a model, and packs its linear layers in the precisions that are named. What the
    /// model asks for (scale, windows) stays.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless the model has as many layers, and the linear layers that are named, each
    /// once and in its order; those of [`Linear::to_precision`](crate::nn::Linear::to_precision). The model is
    /// then as it was.
    pub fn apply(&self, model: &mut impl LayeredModel) -> Result<()> {
        let linear = self.packed(model)?;
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
        for (product, linear) in model.linear_mut().into_iter().zip(linear) {
            *product.linear = linear;
        }
        Ok(())
    }

    /// The linear layers of a model in the precisions that are named; none if none are.
    fn packed(&self, model: &mut impl LayeredModel) -> Result<Vec<Linear>> {
        if self.linear.is_empty() {
            return Ok(Vec::new());
        }
        let products = model.linear_mut();
        let name = |layer: usize, product: &str| format!("{product} of layer {layer}");
        let expected: Vec<_> = products.iter().map(|of| name(of.layer, of.name)).collect();
        let found: Vec<_> = self.linear.iter().map(|of| name(of.layer, &of.product)).collect();
        let longer = expected.len().max(found.len());
        if let Some(first) = (0..longer).find(|&index| expected.get(index) != found.get(index)) {
            let of =
                |names: &[String]| names.get(first).map_or("nothing more".into(), String::clone);
            return Err(Error::Mismatch(format!(
                "settings of linear layers with {}, expected {} as the model has them",
                of(&found),
                of(&expected)
            )));
        }
        let precisions: Vec<_> = self.linear.iter().map(|of| of.precision).collect();
        linear_in(model, &precisions)
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
