//! Models whose attention can be switched between fp32 and int8, layer by layer.
//!
//! * [`BertModel`]: a BERT encoder from safetensors; [`TextEncoder`] adds its tokenizer.
//! * [`llama`]: a Llama-family decoder from GGUF or safetensors, with its cache and tokenizer.
//! * [`WordEmbeddings`]: static word vectors with one self-attention block over them.
//! * [`ModelFiles`], [`Weights`]: where a model comes from, with an error of its own for each way
//!   in which files can be wrong.

mod bert;
mod bert_config;
mod files;
pub mod llama;
mod text_encoder;
mod word_embeddings;

pub use bert::{BertLayer, BertModel, mean_pool, padding_mask};
pub use bert_config::{BertConfig, HiddenAct};
pub use files::{ModelFiles, Weights};
pub use text_encoder::{TextEncoder, TokenBatch};
pub use word_embeddings::{Word, WordEmbeddings};
