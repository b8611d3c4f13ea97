//! Int8 attention for Candle tensors.
//!
//! * [`attention`]: scores, scale, mask, softmax, times V, in one fused op or in fp32.
//! * [`QuantizedAttention`]: the same as a module that a model holds, one per layer.
//! * [`attention_scores`]: raw `q·k^T` through int8, a differentiable Candle op;
//!   [`attention_scores_int32`], [`attention_scores_requantized`] and [`attention_scores_int8`] are
//!   its integers.
//! * [`position_mask`], [`restrict_mask`]: several conditions as one mask tensor.
//! * [`flash_attn`], [`flash_attn_varlen_cpu`]: the same with Candle's signatures and layouts.
//! * [`Int8KvCache`]: keys and values of past tokens, and attention over them.
//! * [`attention_probs`]: the probabilities, all of them in memory.

mod call;
mod combine;
mod config;
mod dispatch;
mod engine;
mod failure;
mod flash;
mod float_head;
pub(crate) mod heads;
mod int8_head;
mod keys;
mod kv_cache;
mod mask;
mod module;
mod op;
mod operand;
pub(crate) mod reference;
mod requantized;
mod room;
mod scorer;
mod scores;
mod seen;
mod shapes;
mod spec;
mod tensor_values;
mod visible;
mod words;

pub use call::{AttentionCall, Causal};
pub use combine::{position_mask, restrict_mask};
pub use config::{
    AttentionConfig, Backend, Int8Config, PvPrecision, RequantConfig, RequantMode, ScoreConfig,
};
pub use dispatch::attention;
pub use flash::{flash_attn, flash_attn_varlen_cpu};
pub use kv_cache::{CacheValues, Int8KvCache, KeySmoothing, KvCacheConfig};
pub use module::QuantizedAttention;
pub use reference::unfused::attention_probs;
pub use scores::{
    attention_scores, attention_scores_int8, attention_scores_int32, attention_scores_requantized,
};
pub use spec::{AttentionSpec, alibi_slopes};
