//! RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2019,
//! arXiv:1911.02116): BERT's layers behind other embeddings. One token type, and positions that begin
//! behind the number of the padding token; tokens that are padding all have that position.

use super::bert::{BERT, BertFamily, LayerShape};
use super::encoder::{EncoderConfig, Opened};
use super::loader::{Loader, TableRows};
use super::{BertConfig, Weights};
use crate::{Error, Result};
use candle_core::Device;
use std::path::Path;

/// The padding token where a configuration names none.
const PAD: u32 = 1;

pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<Opened> {
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
    let from = Loader::new(&weights, config.layer_norm_eps, device);
    let max_tokens = rows - 1 - pad;
    let own = EncoderConfig { max_tokens, pad_token_id, ..EncoderConfig::of("roberta", &config) };
    let (rows, shape) = (TableRows::of(&config), LayerShape::of(&config));
    let family = BertFamily::load(own, &from, &BERT, rows, shape)?;
    Ok((Box::new(family.with_positions_behind(pad_token_id)), weights))
}
