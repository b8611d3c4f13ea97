//! How the author of a sentence encoder makes an embedding of its hidden states.

use crate::Result;
use crate::files::{corrupt, read_text};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Of `modules.json`, which sentence-transformers writes.
#[derive(Deserialize)]
struct Module {
    #[serde(rename = "type")]
    kind: String,
}

/// Warnings about pooling other than the mean over tokens, and about layers behind it, which the
/// files beside the `config.json` at `config` ask for.
///
/// # Errors
/// [`Error::Corrupt`](crate::Error::Corrupt) for a file that is not what its name promises.
pub(super) fn warnings(config: &Path) -> Result<Vec<String>> {
    let folder = config.parent().unwrap_or(Path::new(""));
    let mut warnings = Vec::new();
    let path = folder.join("1_Pooling").join("config.json");
    if path.is_file() {
        let text = read_text("pooling", &path)?;
        let modes: BTreeMap<String, serde_json::Value> =
            serde_json::from_str(&text).map_err(|e| corrupt(&path, e))?;
        let mode = |(name, on): (&String, &serde_json::Value)| {
            let mode = name.strip_prefix("pooling_mode_")?;
            (on == true && mode != "mean_tokens").then(|| mode.to_string())
        };
        let mut other: Vec<String> = modes.iter().filter_map(mode).collect();
        let named = modes.get("pooling_mode").and_then(|mode| mode.as_str());
        other.extend(named.filter(|mode| *mode != "mean").map(str::to_string));
        if !other.is_empty() {
            warnings.push(format!(
                "{} asks for pooling by {}, but embeddings here are the mean over tokens",
                path.display(),
                other.join(" and ")
            ));
        }
    }
    let path = folder.join("modules.json");
    if path.is_file() {
        let text = read_text("modules", &path)?;
        let modules: Vec<Module> = serde_json::from_str(&text).map_err(|e| corrupt(&path, e))?;
        let known = ["Transformer", "Pooling", "Normalize"];
        for Module { kind } in modules {
            if !known.iter().any(|name| kind.ends_with(name)) {
                warnings.push(format!("{} names {kind:?}, which is ignored", path.display()));
            }
        }
    }
    Ok(warnings)
}
