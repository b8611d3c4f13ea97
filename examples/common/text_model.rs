//! A model that reads text, of whichever kind its files are.

use super::cutter::Cutter;
use super::cutter::decoder::DecoderCutter;
use super::cutter::encoder::EncoderCutter;
use super::llama::{Decoder, GgufArgs, LlamaArgs};
use super::model::{HubArgs, ModelArgs};
use super::precision::PrecisionArgs;
use super::text;
use anyhow::{Result, bail, ensure};
use candle_core::Tensor;
use candle_int8_attention::models::{Attend, EncoderModel, LayeredModel, NamedLinear, TextEncoder};
use candle_int8_attention::nn::Precision;
use candle_int8_attention::{Error, QuantizedAttention};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Where an encoder or a decoder is.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Model")]
pub struct TextModelArgs {
    /// Folder with the weights (safetensors), config.json and tokenizer.json of an encoder or a
    /// Llama-family decoder, or GGUF file of such a decoder
    /// [default: models/paraphrase-MiniLM-L3-v2 of this project, an encoder]
    #[arg(long, value_name = "FILE|DIR")]
    pub model: Option<PathBuf>,

    #[command(flatten)]
    pub hub: HubArgs,

    /// With fp32 and with int8 attention alike.
    #[command(flatten)]
    pub linear: PrecisionArgs,

    #[command(flatten)]
    pub format: GgufArgs,
}

/// An encoder or a Llama-family decoder, with its tokenizer.
pub enum TextModel {
    Encoder(Box<TextEncoder>),
    Decoder(Box<Decoder>),
}

/// A model, a name for people, and the files that it is from.
pub struct Loaded {
    pub model: TextModel,
    pub name: String,
    pub files: Vec<PathBuf>,
}

/// What the files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Encoder,
    Decoder,
}

impl TextModelArgs {
    /// The model; a decoder's layers all have fp32 attention.
    pub fn load(&self) -> Result<Loaded> {
        let (model, hub, precision) = (self.model.clone(), self.hub.clone(), self.linear.precision);
        match self.kind()? {
            Kind::Encoder => {
                let (mut encoder, name, files) = ModelArgs { model, hub }.encoder_and_files()?;
                self.format.refuse_for(&name)?;
                encoder.model.set_linear(precision)?;
                let (name, files) = (name + &self.linear.suffix(), files.all()?);
                Ok(Loaded { model: TextModel::Encoder(Box::new(encoder)), name, files })
            }
            Kind::Decoder => {
                ensure!(
                    precision == Precision::F32,
                    "--precision {precision} is for the linear layers of an encoder, and this is a decoder"
                );
                let decoder = LlamaArgs { model, hub, format: self.format.clone() }.load()?;
                let (name, files) = (decoder.name.clone(), decoder.files()?);
                Ok(Loaded { model: TextModel::Decoder(Box::new(decoder)), name, files })
            }
        }
    }

    fn kind(&self) -> Result<Kind> {
        if self.format.gguf.is_some() {
            return Ok(Kind::Decoder);
        }
        if let Some(id) = &self.hub.model_id {
            return Kind::of_config(&self.hub.config(id)?);
        }
        match &self.model {
            Some(path) if path.is_file() => Ok(Kind::Decoder),
            Some(path) => Kind::of_config(&path.join("config.json")),
            None => Ok(Kind::Encoder),
        }
    }
}

impl Kind {
    /// What a `config.json` describes. One that is not there, or is none, is for the loader of
    /// encoders, which says what is wrong with it.
    fn of_config(path: &Path) -> Result<Self> {
        #[derive(Deserialize, Default)]
        struct Config {
            model_type: Option<String>,
        }
        let text = text::read(path).unwrap_or_default();
        let config: Config = serde_json::from_str(&text).unwrap_or_default();
        match config.model_type.as_deref() {
            Some("llama") => Ok(Kind::Decoder),
            None => Ok(Kind::Encoder),
            Some(family) if EncoderModel::FAMILIES.contains(&family) => Ok(Kind::Encoder),
            Some(other) => bail!(
                "{}: model_type {other:?}, expected \"llama\" or one of {:?}",
                path.display(),
                EncoderModel::FAMILIES
            ),
        }
    }
}

impl TextModel {
    /// Cuts text into passages of `tokens` tokens, or as many as is usual for the model.
    pub fn cutter(&self, tokens: Option<usize>) -> Result<Box<dyn Cutter + '_>> {
        Ok(match self {
            TextModel::Encoder(encoder) => Box::new(EncoderCutter::new(encoder, tokens)?),
            TextModel::Decoder(decoder) => {
                Box::new(DecoderCutter::new(&decoder.tokenizer, self.longest(), tokens)?)
            }
        })
    }

    /// Tokens that the model reads at once.
    pub fn longest(&self) -> usize {
        match self {
            TextModel::Encoder(encoder) => encoder.max_tokens(),
            TextModel::Decoder(decoder) => decoder.model.config().max_position_embeddings,
        }
    }

    fn layered(&self) -> &dyn LayeredModel<Input = Tensor> {
        match self {
            TextModel::Encoder(encoder) => &**encoder,
            TextModel::Decoder(decoder) => &decoder.model,
        }
    }
}

/// The input is token ids, U32 `[B, N]`.
impl LayeredModel for TextModel {
    type Input = Tensor;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layered().attention()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        match self {
            TextModel::Encoder(encoder) => encoder.attention_mut(),
            TextModel::Decoder(decoder) => decoder.model.attention_mut(),
        }
    }

    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        match self {
            TextModel::Encoder(encoder) => encoder.linear_mut(),
            TextModel::Decoder(decoder) => decoder.model.linear_mut(),
        }
    }

    fn embed(&self, ids: &Tensor) -> Result<Tensor, Error> {
        self.layered().embed(ids)
    }

    fn sample(&self) -> Result<Option<Tensor>, Error> {
        self.layered().sample()
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, Error> {
        self.layered().layer(index, hidden, attend)
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor, Error> {
        self.layered().embedding(hidden)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        self.layered().head_counts()
    }
}
