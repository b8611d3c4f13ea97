//! A Llama-family decoder: RMSNorm, rotary position embeddings, grouped queries, SwiGLU.
//!
//! ```text
//! token ids -> embeddings
//!   layers: x += W_o · attention(rope(W_q·n), cache(rope(W_k·n), W_v·n))    n = RMSNorm(x)
//!           x += W_down · (silu(W_gate·n) * W_up·n)                         n = RMSNorm(x)
//! RMSNorm -> logits
//! ```
//!
//! * [`LlamaModel`]: the decoder, from a [`Gguf`] file or a folder with safetensors, with an
//!   attention per layer that can be switched between fp32 and int8.
//! * [`LlamaCache`]: keys and values of the tokens so far, in int8 where attention is.
//! * [`LlamaTokenizer`]: text to ids and back, where to stop, and the template of a chat.

mod cache;
mod config;
mod gguf;
mod gguf_header;
mod gguf_tokenizer;
mod layer;
mod layered;
mod linear;
mod model;
pub(super) mod rope;
mod tokenizer;
mod weights;

pub use cache::{FullCache, LayerCache, LlamaCache};
pub use config::{LlamaConfig, RopeConfig, RopePairs, RopeScaling};
pub use gguf::Gguf;
pub use layer::LlamaLayer;
pub use linear::WeightFormat;
pub use model::LlamaModel;
pub use tokenizer::LlamaTokenizer;
