//! x
mod aligned;
pub mod attention;
pub mod drift;
pub mod error;
pub mod gemm;
pub mod models;
mod pv;
pub mod quant;
mod simd;

pub use attention::{
    AttentionConfig, Backend, Int8Config, PvPrecision, QuantizedAttention, RequantConfig,
    ScoreConfig, ScoreOutput, attention, attention_scores,
};
pub use candle_nn::attention::AttnMask;
pub use error::{Error, Result};
