//! Models whose attention can be switched between fp32 and int8, layer by layer.
//!
//! * [`EncoderModel`]: an encoder from safetensors: BERT ([`BertModel`]), RoBERTa and XLM-RoBERTa,
//!   DistilBERT, ModernBERT.
//! * [`TextEncoder`]: one with its tokenizer, and with what sentence-transformers stores beside a
//!   model; texts to embeddings.
//! * [`SequenceClassifier`]: one with a head: texts or pairs of texts to scores.
//! * [`llama`]: a Llama-family decoder from GGUF or safetensors, with its cache and tokenizer.
//! * [`WordEmbeddings`]: static word vectors with one self-attention block over them.
//! * [`LayeredModel`]: what these models have in common, and yours may implement.
//! * [`Calibration`]: static ranges for the attention of a model, collected by [`calibrate`].
//! * [`LayerSettings`]: the attention of each layer and the precision of each linear layer, from a file.
//! * [`ModelFiles`], [`Weights`]: where a model comes from, with an error of its own for each way
//!   in which files can be wrong.

mod bert;
mod bert_config;
mod calibration;
mod classifier;
mod distilbert;
mod encoder;
mod encoder_model;
mod files;
mod layer_settings;
mod layered;
pub mod llama;
mod loader;
mod modernbert;
mod packed;
mod padding;
mod pooling;
mod roberta;
mod sentence;
mod text_encoder;
mod text_tokenizer;
mod tokenizer_file;
mod weights;
mod word_embeddings;

pub use bert::{BertLayer, BertModel};
pub use bert_config::{BertConfig, HiddenAct};
pub use calibration::{
    Calibration, CalibrationConfig, Calibrator, LayerRanges, StaticScales, calibrate,
};
pub use classifier::SequenceClassifier;
pub use encoder::EncoderConfig;
pub use encoder_model::EncoderModel;
pub use files::ModelFiles;
pub use layer_settings::{LayerSettings, LinearSetting};
pub use layered::{Attend, AttentionInput, LayeredModel, NamedLinear, run_layers};
pub(crate) use layered::{forward, linear_in};
pub use padding::padding_mask;
pub use pooling::{Pooling, mean_pool};
#[cfg(feature = "hub")]
pub(crate) use sentence::{FILES as SENTENCE_FILES, Module, read_modules};
pub use text_encoder::{Embeddings, TextEmbedding, TextEncoder};
pub use text_tokenizer::TokenBatch;
pub use weights::Weights;
#[cfg(feature = "hub")]
pub(crate) use weights::shard_files;
pub use word_embeddings::{Word, WordEmbeddings};
