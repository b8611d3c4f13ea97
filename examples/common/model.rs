//! Flags that say where the model's files are.

use super::print::tell;
use anyhow::{Context, Result, ensure};
use candle_core::Device;
use candle_int8_attention::models::{ModelFiles, TextEncoder};
use candle_int8_attention::nn::Precision;
use std::path::{Path, PathBuf};

/// The model that comes with this project.
const BUNDLED: &str = "models/paraphrase-MiniLM-L3-v2";

/// A file or folder of this project, wherever the program is started.
pub fn project_file(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(relative)
}

/// A path for people: relative to this project where it lies in it.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap_or(path).display().to_string()
}

/// Where the model's weights, config.json and tokenizer.json are.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Folder with the weights (safetensors), config.json and tokenizer.json of an encoder
    /// [default: models/paraphrase-MiniLM-L3-v2 of this project]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,
}

/// Which model of the Hugging Face Hub to take. Without the feature `hub` the flags are there too,
/// and say what they need.
#[derive(Debug, Clone, clap::Args)]
pub struct HubArgs {
    /// Take this model of the Hugging Face Hub instead, from the cache or downloaded (needs the
    /// feature hub)
    #[arg(long, value_name = "OWNER/NAME", conflicts_with = "model")]
    pub model_id: Option<String>,

    /// Branch, tag or commit of --model-id [default: main]
    #[arg(long, value_name = "REVISION", requires = "model_id", conflicts_with = "model")]
    pub revision: Option<String>,

    /// Use what is in the cache of the Hub, and no network
    #[arg(long, requires = "model_id", conflicts_with = "model")]
    pub offline: bool,
}

impl ModelArgs {
    /// The encoder, whose linear layers are in f32, and a name for people.
    pub fn encoder(&self) -> Result<(TextEncoder, String)> {
        let (encoder, name, _) = self.encoder_and_files()?;
        Ok((encoder, name))
    }

    /// [`ModelArgs::encoder`], and where its files are.
    pub fn encoder_and_files(&self) -> Result<(TextEncoder, String, ModelFiles)> {
        let (files, name) = self.files()?;
        let encoder = TextEncoder::load_in(&files, &Device::Cpu, Precision::F32)
            .with_context(|| format!("cannot load the model {name}"))?;
        encoder.warnings().iter().for_each(|warning| tell(&format!("warning: {warning}")));
        Ok((encoder, name, files))
    }

    /// Whether one was named.
    pub fn is_given(&self) -> bool {
        self.model.is_some() || self.hub.model_id.is_some()
    }

    /// The files, and a name for people.
    pub fn files(&self) -> Result<(ModelFiles, String)> {
        if let Some(id) = &self.hub.model_id {
            return self.hub.encoder(id);
        }
        let folder = self.model.clone().unwrap_or_else(|| project_file(BUNDLED));
        ensure!(
            self.model.is_some() || folder.exists(),
            "the model of this project is not in {}, because the published crate leaves it out: name \
             another folder with --model",
            folder.display()
        );
        let files = ModelFiles::from_dir(&folder)
            .with_context(|| format!("cannot use the model in {}", shown(&folder)))?;
        Ok((files, shown(&folder)))
    }
}

#[cfg(feature = "hub")]
impl HubArgs {
    /// The `config.json` of the model `id`.
    pub fn config(&self, id: &str) -> Result<PathBuf> {
        Ok(self.model(id).0.fetch_config()?)
    }

    /// The files of the encoder `id`, and a name for people.
    pub fn encoder(&self, id: &str) -> Result<(ModelFiles, String)> {
        let (model, name) = self.model(id);
        Ok((model.fetch()?, name))
    }

    /// The path of the decoder `id`, which is the file `gguf` if there is one, and a name for
    /// people.
    pub fn decoder(&self, id: &str, gguf: Option<&str>) -> Result<(PathBuf, String)> {
        let (model, name) = self.model(id);
        Ok((model.fetch_llama(gguf)?, name))
    }

    fn model(&self, id: &str) -> (candle_int8_attention::hub::HubModel, String) {
        let (revision, offline) = (self.revision.clone(), self.offline);
        let name = format!("{id} at {}", revision.as_deref().unwrap_or("main"));
        (candle_int8_attention::hub::HubModel { revision, offline, id: id.to_string() }, name)
    }
}

/// Said when a model of the Hub is named.
#[cfg(not(feature = "hub"))]
const NO_HUB: &str = "--model-id needs the feature hub, and this program was built without it: \
run it with `cargo run --release --features hub --example ...`, or download the model yourself and \
name it with --model";

#[cfg(not(feature = "hub"))]
impl HubArgs {
    pub fn config(&self, _id: &str) -> Result<PathBuf> {
        anyhow::bail!(NO_HUB)
    }

    pub fn encoder(&self, _id: &str) -> Result<(ModelFiles, String)> {
        anyhow::bail!(NO_HUB)
    }

    pub fn decoder(&self, _id: &str, _gguf: Option<&str>) -> Result<(PathBuf, String)> {
        anyhow::bail!(NO_HUB)
    }
}
