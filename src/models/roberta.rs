//! RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2019,
//! arXiv:1911.02116): BERT's layers behind other embeddings. One token type, and positions that begin
//! behind the number of the padding token; tokens that are padding all have that position.

use super::bert::{BERT, BertFamily, BertLayer, LayerShape};
use super::encoder::{self, EncoderConfig};
use super::loader::{Loader, TableRows};
use super::{BertConfig, Weights};
use crate::nn::Embeddings;
use crate::{Error, Result};
use candle_core::Device;
use std::path::Path;

/// The padding token where a configuration names none.
const PAD: u32 = 1;

pub(super) struct RobertaModel {
    config: BertConfig,
    pad: u32,
    embeddings: Embeddings,
    layers: Vec<BertLayer>,
}

impl RobertaModel {
    pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<(Self, Weights)> {
        let config = BertConfig::read(path, "RoBERTa")?;
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
        let layer = |index| BertLayer::load(&from, &BERT, index, LayerShape::of(&config));
        let model = Self {
            embeddings: from.embeddings(TableRows::of(&config), config.hidden_size)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            pad: pad_token_id,
            config,
        };
        Ok((model, weights))
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

    fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    /// `pad + 1, pad + 2, ..` for the tokens, `pad` for padding.
    fn positions(&self, ids: &[u32], rows: &mut Vec<u32>) {
        let pad = self.pad;
        let mut last = pad;
        rows.extend(ids.iter().map(|&id| {
            last += u32::from(id != pad);
            if id == pad { pad } else { last }
        }));
    }

    fn layers(&self) -> &[BertLayer] {
        &self.layers
    }

    fn layers_mut(&mut self) -> &mut [BertLayer] {
        &mut self.layers
    }
}
