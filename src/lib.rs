//! x
pub mod attention;
pub mod error;
pub mod models;
pub mod quant;

pub use attention::{AttentionConfig, Backend, Int8Config, QuantizedAttention, ScoreConfig, ScoreOutput, RequantConfig, attention};
pub use candle_nn::attention::AttnMask;
pub use error::{Error, Result};
