//! Int8 attention for Candle models on CPUs.
//!
//! ```text
//! q, k (f32, f16 or bf16)
//!   -> quantize    per token, head, block or tensor: int8 codes, scales, zero points    quant
//!   -> multiply    u8 or i8 x i8 into exact int32 sums, zero points corrected            product
//!   -> f32         scale_q * scale_k * sum, straight from int32                          attention
//!        or int8   requantized and dequantized, for those who must store int8 scores
//!   -> softmax     scale, mask, running maximum and sum, tile by tile
//!   -> times v     16-bit integers with exact sums over runs; or f32, int8, bf16 on Arm
//! ```
//!
//! [`flash_attn`] is all of it with the signature of Candle's function of that name,
//! [`attention()`] the same with everything that can be chosen, [`attention_scores`] the part up to
//! the scores, and [`QuantizedAttention`] a module that switches between int8 and fp32 in a model's
//! layer.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_int8_attention::{AttentionConfig, AttnMask, attention};
//!
//! let q = Tensor::randn(0f32, 1., (1, 4, 128, 64), &Device::Cpu)?;
//! let int8 = attention(&q, &q, &q, &AttnMask::None, &AttentionConfig::int8())?;
//! let fp32 = attention(&q, &q, &q, &AttnMask::None, &AttentionConfig::fp32())?;
//! let drift = (int8 - fp32)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(drift < 0.1);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Words
//! * *real = scale * (q - zero_point)*. *Symmetric*: zero point 0, `q` in `[-127, 127]`. *Affine*:
//!   any zero point, `q` in `[-128, 127]`.
//! * *B* batch, *H* query heads, *H_kv* key and value heads, *M* queries, *N* keys, *D* head dim,
//!   *Dv* value dim. A *head* is one `[M, D]` matrix, a *token* one row of it.
//! * *granularity*: what shares one scale: tensor, head, token, or block of tokens.
//! * *smooth-K*, *smooth-Q*: subtract the mean over tokens before quantizing, add its exact effect
//!   back to the scores.
//! * *dynamic*, *static*: the range is from this very tensor, or given.
//! * *drift*: what differs between fp32 and int8 on the same inputs.
//!
//! # In a model
//! [`recipes`] has whole programs: the swap of one line, a layer of BERT, a layer of Llama with an
//! [`Int8KvCache`]. [`encoders`] tells which encoders load, and what of their files is obeyed.
//!
//! # Devices
//! The kernels are for CPUs. Where tensors are on a CUDA or Metal device, [`attention()`],
//! [`flash_attn`] and [`QuantizedAttention`] compute the same numbers with Candle's own operations
//! ([`reference::tensor_ops`]), which shows what int8 changes there, but is not faster than fp32.
//! [`Int8KvCache`] and [`attention_scores`] are for CPUs only, and say so. The features `cuda`,
//! `cudnn`, `metal`, `mkl` and `accelerate` are Candle's, passed on.
//!
//! # Rooms
//! `cpu` <- `quant` <- `product` <- `attention` <- `nn` <- `models`; [`drift`] measures, [`mod@reference`] proves,
//! `hub` (feature) downloads.

pub mod attention;
pub mod cpu;
pub mod drift;
pub mod error;
mod files;
#[cfg(feature = "hub")]
pub mod hub;
mod memory;
pub mod models;
pub mod nn;
mod parallel;
pub mod product;
pub mod quant;
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}
#[doc = include_str!("../docs/encoders.md")]
pub mod encoders {}
/// The same numbers by plainer ways: what the kernels are held against, and what runs where they do
/// not.
///
/// ```text
/// tensor_ops    int8 scores and attention by Candle's tensor operations   every device
/// unfused       attention step by step, with all M * N probabilities      fp32, probabilities to look at
/// int_product   the integer product as a plain triple loop                tests
/// ```
pub mod reference {
    pub use crate::attention::reference::{tensor_ops, unfused};
    #[doc(hidden)]
    pub use crate::product::int_product;
}
// Integration tests draw from it too, and see of this crate only what is public.
#[cfg(test)]
#[path = "../tests/common/numbers.rs"]
mod testing;
mod view;

pub use attention::{
    AttentionCall, AttentionConfig, AttentionSpec, Backend, CacheValues, Causal, Int8Config,
    Int8KvCache, KeySmoothing, KvCacheConfig, PvPrecision, QuantizedAttention, RequantConfig,
    RequantMode, ScoreConfig, attention, attention_scores, flash_attn, flash_attn_varlen_cpu,
};
pub use candle_nn::attention::AttnMask;
pub use error::{Error, Result};

/// The examples of the README and of `docs`, compiled and run as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../docs/int8.md")]
struct Documents;
