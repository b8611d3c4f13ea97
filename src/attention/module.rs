//! Attention as a module that a model holds, one a layer.

use super::dispatch::attention;
use super::{AttentionCall, AttentionConfig};
use crate::Result;
use candle_core::Tensor;

/// Scaled dot-product attention with a switchable backend: `softmax(scale * q·k^T + mask)·v`.
///
/// It holds no weights. A model that keeps one per layer can run some layers in int8 and others
/// in fp32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{AttentionConfig, AttnMask, QuantizedAttention};
///
/// let q = Tensor::randn(0f32, 1., (1, 4, 16, 32), &Device::Cpu)?;
/// let int8 = QuantizedAttention::new(AttentionConfig::int8());
/// let fp32 = QuantizedAttention::new(AttentionConfig::fp32());
/// let drift = (int8.forward(&q, &q, &q, &AttnMask::None)?
///     - fp32.forward(&q, &q, &q, &AttnMask::None)?)?;
/// assert!(drift.abs()?.max_all()?.to_scalar::<f32>()? < 0.05);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct QuantizedAttention {
    config: AttentionConfig,
}

impl QuantizedAttention {
    /// A module with this configuration.
    pub fn new(config: AttentionConfig) -> Self {
        Self { config }
    }

    /// The configuration in use.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Switches the configuration, and with it the backend.
    pub fn set_config(&mut self, config: AttentionConfig) {
        self.config = config;
    }

    /// `q` `[B, H, M, D]`, `k` `[B, H_kv, N, D]`, `v` `[B, H_kv, N, Dv]` to `[B, H, M, Dv]`; see
    /// [`attention`].
    ///
    /// # Errors
    /// Those of [`attention`].
    pub fn forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        call: impl Into<AttentionCall>,
    ) -> Result<Tensor> {
        attention(q, k, v, call, &self.config)
    }
}
