//! RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2019,
//! arXiv:1911.02116): BERT's layers behind other embeddings. One token type, and positions that begin
//! behind the number of the padding token; tokens that are padding all have that position.

use super::bert::{BERT, BertFamily, BertLayer, LayerShape};
use super::encoder::{self, EncoderConfig, look_up};
use super::files::read_config;
use super::loader::Loader;
use super::{BertConfig, Weights};
use crate::nn::LayerNorm;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::Path;

/// The padding token where a configuration names none.
const PAD: u32 = 1;

pub(super) struct RobertaModel {
    config: BertConfig,
    pad: u32,
    words: Tensor,
    positions: Tensor,
    token_types: Tensor,
    norm: LayerNorm,
    layers: Vec<BertLayer>,
}

impl RobertaModel {
    pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<(Self, Weights)> {
        let config: BertConfig = read_config(path, "RoBERTa")?;
        config.check_values()?;
        let pad_token_id = config.pad_token_id.unwrap_or(PAD);
        let (rows, pad) = (config.max_position_embeddings, pad_token_id as usize);
        if rows <= pad + 1 {
            return Err(Error::Contradiction(format!(
                "max_position_embeddings {rows} with pad_token_id {pad}, expected more than {}: \
                 positions begin behind it",
                pad + 1
            )));
        }
        let weights = weights.with_prefix_if_present("roberta.");
        encoder::check_layers(&weights, config.num_hidden_layers, BERT.layers)?;
        let from = Loader::new(&weights, config.layer_norm_eps, device);
        let table = |name: &str, rows: usize| {
            from.get(&format!("embeddings.{name}_embeddings.weight"), &[rows, config.hidden_size])
        };
        let layer = |index| BertLayer::load(&from, &BERT, index, LayerShape::of(&config));
        let model = Self {
            words: table("word", config.vocab_size)?,
            positions: table("position", rows)?,
            token_types: table("token_type", config.type_vocab_size)?,
            norm: from.norm("embeddings.LayerNorm", config.hidden_size)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            pad: pad_token_id,
            config,
        };
        Ok((model, weights))
    }

    /// `pad + 1, pad + 2, ..` for the tokens of each sequence, `pad` for padding.
    fn positions_of(&self, ids: &Tensor) -> Result<Tensor> {
        let pad = self.pad;
        let of_sequence = |ids: Vec<u32>| {
            let mut last = pad;
            let position = move |id| {
                last += u32::from(id != pad);
                if id == pad { pad } else { last }
            };
            ids.into_iter().map(position).collect::<Vec<u32>>()
        };
        let positions = ids.to_vec2::<u32>()?.into_iter().flat_map(of_sequence).collect();
        Ok(Tensor::from_vec::<_, u32>(positions, ids.dims(), ids.device())?)
    }
}

impl BertFamily for RobertaModel {
    fn config(&self) -> EncoderConfig {
        EncoderConfig {
            max_tokens: self.config.max_position_embeddings - 1 - self.pad as usize,
            pad_token_id: self.pad,
            ..EncoderConfig::of("roberta", &self.config)
        }
    }

    fn words(&self) -> &Tensor {
        &self.words
    }

    /// `norm(word + position + token type)`.
    fn embed(&self, ids: &Tensor, types: Option<&Tensor>) -> Result<Tensor> {
        let types = match types {
            Some(types) => look_up(&self.token_types, types)?,
            None => self.token_types.narrow(0, 0, 1)?,
        };
        let sum = look_up(&self.words, ids)?.broadcast_add(&types)?;
        self.norm.forward(&(sum + look_up(&self.positions, &self.positions_of(ids)?)?)?)
    }

    fn layers(&self) -> &[BertLayer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [BertLayer] {
        &mut self.layers
    }
}
