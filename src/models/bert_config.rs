//! The part of a BERT `config.json` that decides what is computed.

use super::files::read_config;
use crate::nn::Activation;
use crate::{Error, Result};
use std::path::Path;

/// The activation between the two feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HiddenAct {
    /// `x * Phi(x)` with the exact error function.
    Gelu,
    /// GELU by its tanh approximation.
    #[serde(alias = "gelu_pytorch_tanh", alias = "gelu_approximate")]
    GeluNew,
    /// `max(x, 0)`.
    Relu,
}

impl HiddenAct {
    pub(super) fn activation(self) -> Activation {
        match self {
            HiddenAct::Gelu => Activation::Gelu,
            HiddenAct::GeluNew => Activation::GeluTanh,
            HiddenAct::Relu => Activation::Relu,
        }
    }
}

/// A BERT configuration, as Hugging Face writes it; other fields are ignored.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
pub struct BertConfig {
    /// Rows of the word embedding table.
    pub vocab_size: usize,
    /// Width of a token's vector.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads; their dim is `hidden_size / num_attention_heads`.
    pub num_attention_heads: usize,
    /// Width between the two feed-forward layers.
    pub intermediate_size: usize,
    /// Activation there.
    pub hidden_act: HiddenAct,
    /// The longest input, `[CLS]` and `[SEP]` included.
    pub max_position_embeddings: usize,
    /// Rows of the token type table.
    pub type_vocab_size: usize,
    /// Added to the variance by layer norm.
    pub layer_norm_eps: f64,
    /// Only `bert`, where it is given.
    pub model_type: Option<String>,
    /// What fills up shorter sequences of a batch.
    pub pad_token_id: Option<u32>,
    /// Only `absolute` is supported.
    #[serde(default = "absolute")]
    pub position_embedding_type: String,
}

fn absolute() -> String {
    "absolute".to_string()
}

impl BertConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], [`Error::Corrupt`] for JSON that is not such a
    /// configuration, [`Error::Unsupported`] for a `quantization_config` or a decoder, and those of its `check`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let config = Self::read(path.as_ref(), "BERT")?;
        config.check()?;
        Ok(config)
    }

    /// Reads and checks that of any family with BERT's layers.
    pub(super) fn read(path: &Path, of: &str) -> Result<Self> {
        /// What makes a decoder of these layers, where queries see no later key.
        #[derive(serde::Deserialize)]
        struct Decoder {
            is_decoder: Option<bool>,
            add_cross_attention: Option<bool>,
        }
        let Decoder { is_decoder, add_cross_attention } = read_config(path, of)?;
        for (name, on) in [("is_decoder", is_decoder), ("add_cross_attention", add_cross_attention)]
        {
            if on == Some(true) {
                let problem = format!("{}: {name} true, expected an encoder", path.display());
                return Err(Error::Unsupported(problem));
            }
        }
        let config: Self = read_config(path, of)?;
        config.check_values()?;
        Ok(config)
    }

    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::Contradiction`] or [`Error::Unsupported`], naming the first
    /// value that cannot work.
    pub fn check(&self) -> Result<()> {
        self.check_values()?;
        if let Some(other) = self.model_type.as_ref().filter(|name| *name != "bert") {
            return Err(Error::Unsupported(format!("model_type {other:?}, expected \"bert\"")));
        }
        Ok(())
    }

    /// [`BertConfig::check`] for any family that has such a configuration.
    fn check_values(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        if self.position_embedding_type != "absolute" {
            return Err(Error::Unsupported(format!(
                "position_embedding_type {:?}, expected \"absolute\"",
                self.position_embedding_type
            )));
        }
        check_eps(self.layer_norm_eps)
    }

    /// `hidden_size / num_attention_heads`; 0 without any head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0)
    }
}

/// # Errors
/// [`Error::Contradiction`] unless the heads divide the hidden size.
pub(super) fn check_heads(hidden: usize, heads: usize) -> Result<()> {
    if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
        return Err(Error::Contradiction(format!(
            "hidden_size {hidden} with num_attention_heads {heads}, expected a multiple of it"
        )));
    }
    Ok(())
}

/// # Errors
/// [`Error::InvalidArgument`] unless it can be added to a variance.
pub(super) fn check_eps(eps: f64) -> Result<()> {
    if !(eps.is_finite() && eps >= 0.0) {
        let problem = format!("layer_norm_eps {eps}, expected a small positive number");
        return Err(Error::InvalidArgument(problem));
    }
    Ok(())
}
