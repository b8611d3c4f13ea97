//! Which attention each layer of a model uses, as a file.

use super::AttentionLayers;
use crate::attention::{
    AttentionConfig, Backend, Int8Config, PvPrecision, ScoreConfig, ScoreOutput,
};
use crate::files::{corrupt, read_text, write};
use crate::quant::{Granularity, QuantConfig, RangeSource, Scheme};
use crate::{Error, Result};
use serde::de::{Error as _, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The attention of one layer: the part of [`AttentionConfig`] that is a choice between accuracy
/// and speed. What the model itself asks for (scale, softcap, windows) is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "backend", rename_all = "kebab-case")]
pub enum LayerSetting {
    /// Fp32, which has no settings.
    #[serde(deserialize_with = "no_settings")]
    Fp32,
    /// Int8 scores.
    Int8(Int8Setting),
}

/// Without this, serde would take a unit variant and drop the keys beside its tag.
fn no_settings<'de, D: Deserializer<'de>>(other_keys: D) -> std::result::Result<(), D::Error> {
    match BTreeMap::<String, IgnoredAny>::deserialize(other_keys)?.keys().next() {
        Some(key) => {
            Err(D::Error::custom(format!("key {key:?}, but backend fp32 has no settings")))
        }
        None => Ok(()),
    }
}

/// How scores and outputs of a layer are computed in int8, with ranges from the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Int8Setting {
    /// Symmetric or affine codes of queries and keys.
    pub scheme: Scheme,
    /// What shares one scale in the queries.
    pub q: Granularity,
    /// What shares one scale in the keys.
    pub k: Granularity,
    /// Whether the mean of the keys is subtracted before.
    pub smooth_k: bool,
    /// Whether the mean of the queries is.
    pub smooth_q: bool,
    /// How the probabilities are multiplied with the values.
    pub pv: PvPrecision,
}

impl Default for Int8Setting {
    /// That of [`Int8Config`].
    fn default() -> Self {
        let scores = ScoreConfig::default();
        Self {
            scheme: scores.q.scheme,
            q: scores.q.granularity,
            k: scores.k.granularity,
            smooth_k: scores.smooth_k,
            smooth_q: scores.smooth_q,
            pv: PvPrecision::default(),
        }
    }
}

impl LayerSetting {
    /// `base` with this backend.
    pub fn config(&self, base: &AttentionConfig) -> AttentionConfig {
        let backend = match *self {
            LayerSetting::Fp32 => Backend::Fp32,
            LayerSetting::Int8(int8) => Backend::Int8(int8.config()),
        };
        base.with_backend(backend)
    }
}

impl Int8Setting {
    /// The same as a configuration.
    pub fn config(&self) -> Int8Config {
        let side = |granularity| QuantConfig {
            scheme: self.scheme,
            granularity,
            range: RangeSource::Dynamic,
        };
        let scores = ScoreConfig {
            q: side(self.q),
            k: side(self.k),
            smooth_k: self.smooth_k,
            smooth_q: self.smooth_q,
            output: ScoreOutput::Dequantized,
        };
        Int8Config { scores, pv: self.pv }
    }
}

impl fmt::Display for LayerSetting {
    /// For people: `per-token, smooth-K, smooth-Q, P·V auto`. Affine codes are named, symmetric ones
    /// are not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LayerSetting::Int8(int8) = self else { return f.write_str("fp32") };
        if int8.scheme == Scheme::Affine {
            f.write_str("affine, ")?;
        }
        write!(f, "{}", int8.q)?;
        if int8.k != int8.q {
            write!(f, ", keys {}", int8.k)?;
        }
        for (on, name) in [(int8.smooth_k, ", smooth-K"), (int8.smooth_q, ", smooth-Q")] {
            f.write_str(if on { name } else { "" })?;
        }
        write!(f, ", P·V {}", int8.pv)
    }
}

/// The settings of all layers of a model, as written by hand or by
/// [`drift::search`](crate::drift::search).
///
/// The file is JSON:
///
/// ```json
/// {
///   "format": "candle-int8-attention layer settings",
///   "version": 1,
///   "layers": [
///     { "backend": "int8", "scheme": "symmetric", "q": "per-token", "k": "per-token",
///       "smooth_k": true, "smooth_q": false, "pv": "auto" },
///     { "backend": "fp32" }
///   ]
/// }
/// ```
///
/// A run of tokens that shares a scale is `{ "per-block": 64 }`. A layer in int8 names all of its
/// settings, one in fp32 has none, and any other key is an error. `about` may hold anything; the
/// search writes there what it measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSettings {
    format: String,
    version: u32,
    /// First layer first.
    pub layers: Vec<LayerSetting>,
    /// What is known about them.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub about: serde_json::Value,
}

const FORMAT: &str = "candle-int8-attention layer settings";
const VERSION: u32 = 1;

impl LayerSettings {
    /// Settings for layers, first to last.
    pub fn new(layers: Vec<LayerSetting>) -> Self {
        let about = serde_json::Value::Null;
        Self { format: FORMAT.to_string(), version: VERSION, layers, about }
    }

    /// Switches the layers of a model. What the model asks for (scale, windows) stays.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless the model has as many layers.
    pub fn apply(&self, model: &mut impl AttentionLayers) -> Result<()> {
        let layers = model.attention_mut();
        if layers.len() != self.layers.len() {
            return Err(Error::Mismatch(format!(
                "settings of {} layers for a model of {}",
                self.layers.len(),
                layers.len()
            )));
        }
        for (layer, setting) in layers.into_iter().zip(&self.layers) {
            layer.set_config(setting.config(layer.config()));
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
        for setting in &file.layers {
            if let LayerSetting::Int8(int8) = setting {
                int8.q.groups(1, 1).and(int8.k.groups(1, 1)).map_err(|e| corrupt(path, e))?;
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_that_of_attention() {
        let setting = LayerSetting::Int8(Int8Setting::default());
        assert_eq!(setting.config(&AttentionConfig::fp32()), AttentionConfig::int8());
        assert_eq!(LayerSetting::Fp32.config(&AttentionConfig::int8()), AttentionConfig::fp32());
        assert_eq!(setting.to_string(), "per-token, smooth-K, smooth-Q, P·V auto");
    }

    #[test]
    fn keys_that_mean_nothing_are_refused() {
        let read = |json: &str| serde_json::from_str::<LayerSetting>(json);
        assert_eq!(read(r#"{ "backend": "fp32" }"#).unwrap(), LayerSetting::Fp32);
        let int8 = LayerSetting::Int8(Int8Setting::default());
        for setting in [LayerSetting::Fp32, int8] {
            let mut json = serde_json::to_value(setting).unwrap();
            assert_eq!(read(&json.to_string()).unwrap(), setting);
            json["smooth_v"] = true.into();
            let error = read(&json.to_string()).unwrap_err().to_string();
            assert!(error.contains("smooth_v"), "{error}");
        }
        let error = read(r#"{ "smooth_k": true, "backend": "fp32" }"#).unwrap_err().to_string();
        assert!(error.contains("key \"smooth_k\", but backend fp32"), "{error}");
    }

    #[test]
    fn what_the_model_asks_for_stays() {
        let base = AttentionConfig::int8().softcap(30.0);
        assert_eq!(LayerSetting::Fp32.config(&base).spec.softcap, Some(30.0));
    }
}
