//! Int8 attention for Candle tensors.
//!
//! * [`attention_scores`]: `q·k^T` through int8, a differentiable Candle op.
//! * [`attention`]: scores, scale, mask, softmax, times V, with the backend of its configuration.
//! * [`QuantizedAttention`]: the same as a module that a model holds, one per layer.
//! * [`tensor_ops`]: the same numbers from ordinary tensor operations, on any device.

mod config;
mod mask;
mod module;
mod operand;
mod scorer;
mod scores;
mod shapes;
pub mod tensor_ops;
mod unfused;
mod view;

pub use config::{AttentionConfig, Backend, Int8Config, RequantConfig, ScoreConfig, ScoreOutput};
pub use mask::{apply_mask, masked_softmax};
pub use module::QuantizedAttention;
pub use scores::{attention_scores, attention_scores_int8};
pub use unfused::{attention, attention_probs};
