//! Flags that say where the model's files are.

use anyhow::{Context, Result};
use candle_core::Device;
use candle_int8_attention::models::{ModelFiles, TextEncoder};
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
    /// Folder with the weights (safetensors), config.json and tokenizer.json of a BERT model
    /// [default: models/paraphrase-MiniLM-L3-v2 of this project]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,

    /// Take this BERT model of the Hugging Face Hub instead, from the cache or downloaded
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "OWNER/NAME", conflicts_with = "model")]
    pub model_id: Option<String>,

    /// Branch, tag or commit of --model-id [default: main]
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "REVISION", requires = "model_id")]
    pub revision: Option<String>,

    /// Use what is in the cache of the Hub, and no network
    #[cfg(feature = "hub")]
    #[arg(long, requires = "model_id")]
    pub offline: bool,
}

impl ModelArgs {
    /// The encoder, and a name for people.
    pub fn encoder(&self) -> Result<(TextEncoder, String)> {
        let (encoder, name, _) = self.encoder_and_files()?;
        Ok((encoder, name))
    }

    /// [`ModelArgs::encoder`], and where its files are.
    pub fn encoder_and_files(&self) -> Result<(TextEncoder, String, ModelFiles)> {
        let (files, name) = self.files()?;
        let encoder = TextEncoder::load(&files, &Device::Cpu)
            .with_context(|| format!("cannot load the model {name}"))?;
        Ok((encoder, name, files))
    }

    /// The files, and a name for people.
    fn files(&self) -> Result<(ModelFiles, String)> {
        #[cfg(feature = "hub")]
        if let Some(id) = &self.model_id {
            return self.hub_files(id);
        }
        let folder = self.model.clone().unwrap_or_else(|| project_file(BUNDLED));
        let files = ModelFiles::from_dir(&folder)
            .with_context(|| format!("cannot use the model in {}", shown(&folder)))?;
        Ok((files, shown(&folder)))
    }

    #[cfg(feature = "hub")]
    fn hub_files(&self, id: &str) -> Result<(ModelFiles, String)> {
        let (revision, offline) = (self.revision.clone(), self.offline);
        let name = format!("{id} at {}", revision.as_deref().unwrap_or("main"));
        let model = candle_int8_attention::hub::HubModel { revision, offline, id: id.to_string() };
        Ok((model.fetch()?, name))
    }
}
