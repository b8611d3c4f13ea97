//! DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's layers, half as many, without token types.

use super::bert::{BertFamily, LayerNames, LayerShape};
use super::bert_config::check_heads;
use super::encoder::{EncoderConfig, Opened};
use super::files::read_config;
use super::loader::{Loader, TableRows};
use super::{HiddenAct, Weights};
use crate::Result;
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

pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<Opened> {
    let config: Config = read_config(path, "DistilBERT")?;
    check_heads(config.dim, config.n_heads)?;
    let weights = weights.with_prefix_if_present("distilbert.");
    let from = Loader::new(&weights, NORM_EPS, device);
    let (words, positions) = (config.vocab_size, config.max_position_embeddings);
    let rows = TableRows { words, positions, types: None };
    let shape = LayerShape {
        hidden: config.dim,
        inner: config.hidden_dim,
        heads: config.n_heads,
        act: config.activation,
    };
    let own = EncoderConfig {
        family: "distilbert",
        vocab_size: words,
        hidden_size: config.dim,
        num_hidden_layers: config.n_layers,
        num_attention_heads: config.n_heads,
        max_tokens: positions,
        type_vocab_size: 1,
        pad_token_id: config.pad_token_id.unwrap_or(0),
    };
    Ok((Box::new(BertFamily::load(own, &from, &NAMES, rows, shape)?), weights))
}
