//! Models whose attention can be switched between fp32 and int8, layer by layer.
//!
//! * [`BertModel`]: a BERT encoder from safetensors; [`TextEncoder`] adds its tokenizer.
//! * [`llama`]: a Llama-family decoder from GGUF or safetensors, with its cache and tokenizer.
//! * [`WordEmbeddings`]: static word vectors with one self-attention block over them.
//! * [`LayeredModel`]: what these models have in common, and yours may implement.
//! * [`Calibration`]: static ranges for the attention of a model, collected by [`calibrate`].
//! * [`LayerSettings`]: the attention of each layer, from a file.
//! * [`ModelFiles`], [`Weights`]: where a model comes from, with an error of its own for each way
//!   in which files can be wrong.

mod bert;
mod bert_config;
mod calibration;
mod files;
mod layer_settings;
mod layered;
pub mod llama;
mod packed;
mod pooling;
mod text_encoder;
mod tokenizer_file;
mod word_embeddings;

pub use bert::{BertLayer, BertModel, mean_pool, padding_mask};
pub use bert_config::{BertConfig, HiddenAct};
pub use calibration::{
    Calibration, CalibrationConfig, Calibrator, LayerRanges, StaticScales, calibrate,
};
pub use files::{ModelFiles, Weights};
pub use layer_settings::LayerSettings;
pub use layered::{Attend, AttentionInput, LayeredModel, NamedLinear, run_layers};
pub use text_encoder::{Embeddings, TextEmbedding, TextEncoder, TokenBatch};
pub use word_embeddings::{Word, WordEmbeddings};
