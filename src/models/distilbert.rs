//! DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layers, half as many, without token types.

use super::bert::{BertFamily, BertLayer, LayerNames, LayerShape};
use super::bert_config::check_heads;
use super::encoder::{self, EncoderConfig};
use super::files::read_config;
use super::loader::{Loader, TableRows};
use super::{HiddenAct, Weights};
use crate::Result;
use crate::nn::Embeddings;
use candle_core::Device;
use serde::Deserialize;
use std::path::Path;

/// Not in its configuration: the same in all of its models.
const NORM_EPS: f64 = 1e-12;

const NAMES: LayerNames = LayerNames {
    layers: "transformer.layer",
    qkv: ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    output: "attention.out_lin",
    output_norm: "sa_layer_norm",
    up: "ffn.lin1",
    down: "ffn.lin2",
    down_norm: "output_layer_norm",
};

/// The part of `config.json` that decides what is computed.
#[derive(Deserialize)]
struct Config {
    vocab_size: usize,
    dim: usize,
    hidden_dim: usize,
    n_layers: usize,
    n_heads: usize,
    activation: HiddenAct,
    max_position_embeddings: usize,
    pad_token_id: Option<u32>,
}

pub(super) struct DistilBertModel {
    config: Config,
    embeddings: Embeddings,
    layers: Vec<BertLayer>,
}

impl DistilBertModel {
    pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<(Self, Weights)> {
        let config: Config = read_config(path, "DistilBERT")?;
        check_heads(config.dim, config.n_heads)?;
        let weights = weights.with_prefix_if_present("distilbert.");
        encoder::check_layers(&weights, config.n_layers, NAMES.layers)?;
        let from = Loader::new(&weights, NORM_EPS, device);
        let (words, positions) = (config.vocab_size, config.max_position_embeddings);
        let rows = TableRows { words, positions, types: None };
        let shape = LayerShape {
            hidden: config.dim,
            inner: config.hidden_dim,
            heads: config.n_heads,
            act: config.activation,
        };
        let layer = |index| BertLayer::load(&from, &NAMES, index, shape);
        let model = Self {
            embeddings: from.embeddings(rows, config.dim)?,
            layers: (0..config.n_layers).map(layer).collect::<Result<_>>()?,
            config,
        };
        Ok((model, weights))
    }
}

impl BertFamily for DistilBertModel {
    fn config(&self) -> EncoderConfig {
        EncoderConfig {
            family: "distilbert",
            vocab_size: self.config.vocab_size,
            hidden_size: self.config.dim,
            num_hidden_layers: self.config.n_layers,
            num_attention_heads: self.config.n_heads,
            max_tokens: self.config.max_position_embeddings,
            type_vocab_size: 1,
            pad_token_id: self.config.pad_token_id.unwrap_or(0),
        }
    }

    fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    fn layers(&self) -> &[BertLayer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [BertLayer] {
        &mut self.layers
    }
}
