//! Raw attention scores `q·k^T` through int8: the custom op, and the variants that return integers.

use super::config::{RequantConfig, ScoreConfig};
use super::failure::Failure;
use super::requantized::requantize;
use super::scorer::{ScoreScale, Scorer, check_product};
use super::shapes::{self, check_scores};
use crate::quant::QuantizedTensor;
use crate::view::{View, cpu};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp2, D, DType, Device, Layout, Shape, Tensor};

const OP: &str = "attention_scores";

/// `q·k^T` with both sides quantized to int8 and int32 sums, as a Candle op.
///
/// `q` `[B, H, M, D]` and `k` `[B, H_kv, N, D]` are f32, f16 or bf16 with any strides; `H_kv`
/// divides `H`, and query head `h` uses key head `h / (H / H_kv)`. The result is f32
/// `[B, H, M, N]`, straight from the int32 sums: `scale_q * scale_k * sum`. It is not scaled by
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
/// [`tensor_ops::attention_scores`](crate::reference::tensor_ops::attention_scores)), [`Error::Depth`] beyond
/// the depth limit, [`Error::Contradiction`] for a configuration that contradicts itself,
/// [`Error::Mismatch`] for static parameters that do not match the shapes,
/// [`Error::InvalidArgument`] for a block of 0 tokens, [`Error::Level`] if
/// [`LEVEL_VARIABLE`](crate::cpu::LEVEL_VARIABLE) names a level that cannot be used.
pub fn attention_scores(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<Tensor> {
    check(q, k, config)?;
    ScoreOp::apply(q, k, config, None)
}

/// The int32 sums themselves, zero points corrected, as an I32 tensor `[B, H, M, N]`; arguments as
/// for [`attention_scores`]. It has no gradient.
///
/// # Errors
/// Those of [`attention_scores`], and [`Error::Contradiction`] while smoothing is on, because an
/// int32 cannot hold its correction.
pub fn attention_scores_int32(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<Tensor> {
    check(q, k, config)?;
    config.check_int32()?;
    let (q, k) = (q.storage_and_layout(), k.storage_and_layout());
    let (q, k) = (View::new(OP, "q", cpu(&q.0)?, q.1)?, View::new(OP, "k", cpu(&k.0)?, k.1)?);
    let scorer = Scorer::of_all(q, k, config, ScoreScale::RAW)?;
    Ok(Tensor::from_vec(scorer.all_sums(), &scorer.dims(), &Device::Cpu)?)
}

/// [`attention_scores`] that went through int8: requantized, then dequantized, f32 `[B, H, M, N]`.
/// The classic pipeline of integer-only inference, and the largest error of all (see the
/// `affine_walkthrough` example). Its gradient is that of [`attention_scores`].
///
/// # Errors
/// Those of [`attention_scores_int8`].
pub fn attention_scores_requantized(
    q: &Tensor,
    k: &Tensor,
    config: &ScoreConfig,
    to: &RequantConfig,
) -> Result<Tensor> {
    check(q, k, config)?;
    to.check(config)?;
    ScoreOp::apply(q, k, config, Some(to.clone()))
}

/// The int8 codes of the scores `[B, H, M, N]`, with their scales and zero points; arguments as
/// for [`attention_scores`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::attention::attention_scores_int8;
/// use candle_int8_attention::quant::{Granularity, Scheme};
/// use candle_int8_attention::{RequantConfig, ScoreConfig};
///
/// let a = Tensor::randn(0f32, 1., (1, 4, 64, 32), &Device::Cpu)?;
/// let scores = ScoreConfig::plain(Scheme::Symmetric, Granularity::PerHead);
/// let codes = attention_scores_int8(&a, &a, &scores, &RequantConfig::default())?;
/// assert_eq!((codes.values().len(), codes.all_params().len()), (4 * 64 * 64, 4 * 64));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`attention_scores`]; [`Error::NonFinite`] for scores that are not finite;
/// [`Error::Contradiction`] for the fixed-point mode while smoothing is on, or static parameters
/// of another scheme; [`Error::QuantParams`] for a multiplier that the mode cannot hold.
pub fn attention_scores_int8(
    q: &Tensor,
    k: &Tensor,
    config: &ScoreConfig,
    to: &RequantConfig,
) -> Result<QuantizedTensor> {
    check(q, k, config)?;
    let (q, k) = (q.storage_and_layout(), k.storage_and_layout());
    let (q, k) = (View::new(OP, "q", cpu(&q.0)?, q.1)?, View::new(OP, "k", cpu(&k.0)?, k.1)?);
    requantize(q, k, config, to)
}

fn check(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<()> {
    shapes::check_float(OP, &[("q", q), ("k", k)])?;
    shapes::check_cpu(OP, &[("q", q), ("k", k)])?;
    check_scores(OP, q.dims(), k.dims())?;
    check_product(q.dim(D::Minus1)?, config).map(|_| ())
}

impl ScoreConfig {
    /// # Errors
    /// [`Error::Contradiction`] if an int32 cannot hold the scores.
    pub(crate) fn check_int32(&self) -> Result<()> {
        match self.adds_floats() {
            Some(found) => Err(Error::Contradiction(format!(
                "int32 scores with {found}: an int32 cannot hold what those add to the sums; turn them \
                 off or ask for dequantized scores"
            ))),
            None => Ok(()),
        }
    }
}

struct ScoreOp {
    config: ScoreConfig,
    /// How scores go through int8, if they do.
    through: Option<RequantConfig>,
    failure: Failure,
}

impl ScoreOp {
    fn apply(
        q: &Tensor,
        k: &Tensor,
        config: &ScoreConfig,
        through: Option<RequantConfig>,
    ) -> Result<Tensor> {
        let failure = Failure::default();
        let op = Self { config: config.clone(), through, failure: failure.clone() };
        failure.of(q.apply_op2(k, op))
    }

    fn forward(
        &self,
        (q, q_layout): (&CpuStorage, &Layout),
        (k, k_layout): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let q = View::new(OP, "q", q, q_layout)?;
        let k = View::new(OP, "k", k, k_layout)?;
        if let Some(to) = &self.through {
            let codes = requantize(q, k, &self.config, to)?;
            let shape = Shape::from(codes.shape());
            return Ok((CpuStorage::F32(codes.dequantize_to_vec()), shape));
        }
        let scorer = Scorer::of_all(q, k, &self.config, ScoreScale::RAW)?;
        Ok((CpuStorage::F32(scorer.all_scores()), Shape::from(scorer.dims().to_vec())))
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
        self.failure.keep(self.forward((q, q_layout), (k, k_layout)))
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
