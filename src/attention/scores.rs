//! Raw attention scores `q·k^T` through int8: the custom op, and the variants that return integers.

use super::config::{RequantConfig, ScoreConfig, ScoreOutput};
use super::scorer::{ScoreScale, Scorer, check_product};
use super::shapes::{self, check_scores};
use crate::quant::{QuantConfig, QuantizedTensor, RangeSource};
use crate::view::View;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Shape, Tensor};

const OP: &str = "attention_scores";

/// `q·k^T` with both sides quantized to int8 and int32 sums, as a Candle op.
///
/// `q` `[B, H, M, D]` and `k` `[B, H_kv, N, D]` are f32, f16 or bf16 with any strides; `H_kv`
/// divides `H`, and query head `h` uses key head `h / (H / H_kv)`. The result is `[B, H, M, N]`:
/// f32 by default, I32 or U8 where [`ScoreConfig::output`] says so. It is not scaled by
/// `1 / sqrt(D)`. B, H, M, N and D may be 0.
///
/// Smoothing corrections are included, so the result approximates `q·k^T` in every configuration.
/// A query row or key row that holds NaN or infinity has NaN scores, and no influence on others.
///
/// The gradient is straight-through: that of `q·k^T` in floating point.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::{ScoreConfig, attention_scores};
///
/// let a = Tensor::randn(0f32, 1., (1, 4, 64, 32), &Device::Cpu)?;
/// let int8 = attention_scores(&a, &a, &ScoreConfig::default())?;
/// let fp32 = a.matmul(&a.t()?)?;
/// assert_eq!(int8.dims(), [1, 4, 64, 64]);
/// assert!((int8 - fp32)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// [`Error::Rank`], [`Error::Shape`] and [`Error::DType`] for tensors that do not fit,
/// [`Error::Device`] unless both are on the CPU (elsewhere use
/// [`tensor_ops::attention_scores`](super::tensor_ops::attention_scores)), [`Error::Depth`] beyond
/// the depth limit, [`Error::Contradiction`] for a configuration that contradicts itself,
/// [`Error::Mismatch`] for static parameters that do not match the shapes,
/// [`Error::InvalidArgument`] for a block of 0 tokens,
/// [`Error::NonFinite`] when scores to be requantized are not finite, [`Error::Level`] if
/// [`LEVEL_VARIABLE`](crate::cpu::LEVEL_VARIABLE) names a level that cannot be used.
pub fn attention_scores(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<Tensor> {
    shapes::check_float(OP, &[("q", q), ("k", k)])?;
    shapes::check_cpu(OP, &[("q", q), ("k", k)])?;
    check_scores(OP, q.dims(), k.dims())?;
    config.check()?;
    check_product(q.dim(D::Minus1)?, config)?;
    Ok(q.apply_op2(k, ScoreOp { config: config.clone() })?)
}

/// The int8 codes of the requantized scores, with their scales and zero points, `[B, H, M, N]`.
///
/// `requant` says what shares a scale; the rest of `config` is as for [`attention_scores`].
///
/// # Errors
/// Those of [`attention_scores`].
pub fn attention_scores_int8(
    q: &Tensor,
    k: &Tensor,
    config: &ScoreConfig,
    requant: RequantConfig,
) -> Result<QuantizedTensor> {
    let config = ScoreConfig { output: ScoreOutput::Dequantized, ..config.clone() };
    let scores = attention_scores(&q.detach(), &k.detach(), &config)?;
    QuantizedTensor::quantize(&scores, &requant.as_quant_config())
}

impl RequantConfig {
    /// The same choices for [`QuantizedTensor::quantize`].
    pub fn as_quant_config(self) -> QuantConfig {
        let RequantConfig { scheme, granularity } = self;
        QuantConfig { scheme, granularity, range: RangeSource::Dynamic }
    }
}

impl ScoreConfig {
    /// # Errors
    /// [`Error::Contradiction`] if the parts contradict each other.
    pub(super) fn check(&self) -> Result<()> {
        if self.output == ScoreOutput::Int32 && (self.smooth_k || self.smooth_q) {
            return Err(Error::Contradiction(format!(
                "int32 scores with smooth_k = {} and smooth_q = {}: an int32 cannot hold the \
                 correction; turn smoothing off or ask for dequantized scores",
                self.smooth_k, self.smooth_q
            )));
        }
        Ok(())
    }
}

struct ScoreOp {
    config: ScoreConfig,
}

impl ScoreOp {
    fn forward(
        &self,
        (q, q_layout): (&CpuStorage, &Layout),
        (k, k_layout): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let q = View::new(OP, "q", q, q_layout)?;
        let k = View::new(OP, "k", k, k_layout)?;
        let scorer = Scorer::prepare(q, k, &self.config, ScoreScale::RAW)?;
        let dims = scorer.dims();
        let requantize = |requant: RequantConfig| {
            let scores = scorer.all_scores();
            QuantizedTensor::quantize_slice(&scores, &dims, &requant.as_quant_config())
        };
        let storage = match self.config.output {
            ScoreOutput::Dequantized => CpuStorage::F32(scorer.all_scores()),
            ScoreOutput::Requantized(to) => CpuStorage::F32(requantize(to)?.dequantize_to_vec()),
            ScoreOutput::Int8(to) => CpuStorage::U8(requantize(to)?.u8_codes()),
            ScoreOutput::Int32 => CpuStorage::I32(scorer.all_sums()),
        };
        Ok((storage, Shape::from(dims.to_vec())))
    }
}

impl CustomOp2 for ScoreOp {
    fn name(&self) -> &'static str {
        "int8-attention-scores"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward((q, q_layout), (k, k_layout))?)
    }

    /// Straight-through: `dq = g·k` and `dk = g^T·q`, summed over the query heads of a key head.
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        _scores: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (b, h, m, n) = grad.dims4()?;
        let (h_kv, d) = (k.dim(1)?, q.dim(D::Minus1)?);
        if grad.elem_count() == 0 || d == 0 {
            return Ok((Some(q.zeros_like()?), Some(k.zeros_like()?)));
        }
        // Query heads that share a key head are rows of one taller matrix.
        let group = h / h_kv;
        let tall = |x: &Tensor, columns: usize| {
            x.to_dtype(DType::F32)?.contiguous()?.reshape((b, h_kv, group * m, columns))
        };
        let (grad, tall_q) = (tall(grad, n)?, tall(q, d)?);
        let grad_q = grad.matmul(&k.to_dtype(DType::F32)?.contiguous()?)?;
        let grad_k = grad.t()?.matmul(&tall_q)?;
        let grad_q = grad_q.reshape((b, h, m, d))?.to_dtype(q.dtype())?;
        Ok((Some(grad_q), Some(grad_k.to_dtype(k.dtype())?)))
    }
}
