//! The same numbers with ordinary Candle tensor operations only.
//!
//! It shares no code with the kernels: it is their oracle, and it runs on every device Candle has.
//! Without smoothing the results are the same to the bit; with it they can differ by one code
//! where the two sums of a mean round differently. [`attention()`](crate::attention()) comes here
//! by itself where its tensors are not on a CPU. Codes are held as integers in floating point,
//! which is exact: in f32 up to a sum of 2^24, in f64 beyond (which needs a device with f64).

use super::steps::{attention_with, straight_through};
use crate::attention::heads::repeat_heads;
use crate::attention::shapes::{check_float, check_scores};
use crate::attention::{AttentionCall, AttentionConfig, RequantConfig, RequantMode, ScoreConfig};
use crate::quant::{Granularity, QuantConfig, QuantParams, RangeSource, Scheme, Smoothing};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};

/// Adding and subtracting `1.5 * 2^23` rounds a small f32 to an integer, ties to even
/// (`Tensor::round` rounds them away from zero).
const ROUND: f64 = 12_582_912.0;

/// A quantized `[B, H, S, D]` tensor as floating point tensors.
struct Codes {
    /// `q - zero_point`, integers.
    steps: Tensor,
    /// `[B, H, S, 1]`.
    scales: Tensor,
    /// The f32 rows.
    rows: Tensor,
    /// `[B, H, S, D]`, what smoothing took away from each.
    means: Option<Tensor>,
    /// `[B, H, S, 1]`, U8: the rows that stand out.
    outliers: Option<Tensor>,
}

/// [`attention()`](crate::attention()) with Candle's tensor operations, on any device: the same
/// arguments, gradients and errors. All `M * N` scores are in memory, and P·V is in f32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::reference::tensor_ops;
/// use candle_int8_attention::{AttentionConfig, AttnMask, attention};
///
/// let q = Tensor::randn(0f32, 1., (1, 4, 32, 64), &Device::Cpu)?;
/// let config = AttentionConfig::int8();
/// let fused = attention(&q, &q, &q, &AttnMask::causal(), &config)?;
/// let anywhere = tensor_ops::attention(&q, &q, &q, &AttnMask::causal(), &config)?;
/// assert!((fused - anywhere)?.abs()?.max_all()?.to_scalar::<f32>()? < 0.02);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of [`attention()`](crate::attention()).
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: impl Into<AttentionCall>,
    config: &AttentionConfig,
) -> Result<Tensor> {
    attention_with(&attention_scores, q, k, v, &call.into(), config)
}

/// `attention_scores` with Candle's tensor operations, on any device, with the gradient of `q·k^T`,
/// straight through the rounding.
///
/// # Errors
/// As for [`attention_scores`](crate::attention::attention_scores), without those for devices and kernels.
pub fn attention_scores(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<Tensor> {
    let scores = |q: Codes, k: Codes| q.dequantize(&k, &q.product(&k)?.to_dtype(DType::F32)?);
    straight_through(q, k, of_codes(q, k, config, DType::F32, scores)?)
}

/// `attention_scores_int32` with Candle's tensor operations, on any device.
///
/// # Errors
/// As for [`attention_scores_int32`](crate::attention::attention_scores_int32), without those for devices and
/// kernels.
#[doc(hidden)]
pub fn attention_scores_int32(q: &Tensor, k: &Tensor, config: &ScoreConfig) -> Result<Tensor> {
    config.check_int32()?;
    of_codes(q, k, config, DType::I32, |q, k| Ok(q.product(&k)?.to_dtype(DType::I32)?))
}

/// `attention_scores_requantized` with Candle's tensor operations, on any device, with the gradient
/// of [`attention_scores`].
///
/// # Errors
/// As for [`attention_scores_requantized`](crate::attention::attention_scores_requantized), without those for
/// devices and kernels, and [`Error::Unsupported`] for the fixed-point mode. Scores that are not
/// finite are no error, but NaN.
pub fn attention_scores_requantized(
    q: &Tensor,
    k: &Tensor,
    config: &ScoreConfig,
    to: &RequantConfig,
) -> Result<Tensor> {
    to.check(config)?;
    if to.mode != RequantMode::Fp32 {
        let problem = format!("requantization in mode {:?} by tensor operations", to.mode);
        return Err(Error::Unsupported(problem));
    }
    let scores = |q: Codes, k: Codes| {
        let sums = q.product(&k)?.to_dtype(DType::F32)?;
        let real = q.dequantize(&k, &sums)?;
        let to = to.to_quant_config();
        to.groups(real.dims())?;
        if config.adds_floats().is_some() {
            let codes = Codes::quantize(&real, &to, &Conditioner::NONE)?;
            return Ok(codes.steps.broadcast_mul(&codes.scales)?);
        }
        let (_, clean) = without_bad_rows(&real)?;
        let (scales, zeros) = params(&clean, &to)?;
        let multiplier = q.scales.broadcast_mul(&k.scales.t()?)?.broadcast_div(&scales)?;
        let steps = round(&(sums * multiplier)?, &zeros, to.scheme)?;
        Ok(steps.broadcast_mul(&scales)?)
    };
    straight_through(q, k, of_codes(q, k, config, DType::F32, scores)?)
}

/// What `scores` makes of the codes of `q` and `k`, `[B, H, M, N]`; zeros of `dtype` where there is
/// nothing to multiply.
fn of_codes(
    q: &Tensor,
    k: &Tensor,
    config: &ScoreConfig,
    dtype: DType,
    scores: impl FnOnce(Codes, Codes) -> Result<Tensor>,
) -> Result<Tensor> {
    const OP: &str = "tensor_ops::attention_scores";
    check_float(OP, &[("q", q), ("k", k)])?;
    check_scores(OP, q.dims(), k.dims())?;
    config.check(q.dims(), k.dims())?;
    let (q, k) = (q.detach(), repeat_heads(&k.detach(), q.dim(1)?)?);
    let (b, h, m, d) = q.dims4()?;
    let n = k.dim(2)?;
    if [b, h, m, n, d].contains(&0) {
        return Ok(Tensor::zeros((b, h, m, n), dtype, q.device())?);
    }
    let of = |smoothing, block, is_key| {
        let ScoreConfig { rotate, outliers, .. } = *config;
        Conditioner { smoothing, rotate, outliers, sink: outliers && is_key, block }
    };
    scores(
        Codes::quantize(&q, &config.q, &of(config.smooth_q, 48, false))?,
        Codes::quantize(&k, &config.k, &of(config.smooth_k, 64, true))?,
    )
}

impl Codes {
    fn quantize(x: &Tensor, config: &QuantConfig, how: &Conditioner) -> Result<Self> {
        let rows = x.to_dtype(DType::F32)?.contiguous()?;
        let Conditioned { values, means, outliers } = how.apply(&rows)?;
        let (finite, clean) = without_bad_rows(&values)?;
        let counted = match &outliers {
            Some(outliers) => without(&clean, outliers)?,
            None => clean.clone(),
        };
        let (scales, zeros) = params(&counted, config)?;
        let (scales, zeros) = match (&outliers, &config.range) {
            // Those have ranges of their own.
            (Some(outliers), RangeSource::Dynamic) => {
                let token = QuantConfig { granularity: Granularity::PerToken, ..config.clone() };
                let (own_scales, own_zeros) = params(&clean, &token)?;
                (
                    outliers.where_cond(&own_scales, &scales)?,
                    outliers.where_cond(&own_zeros, &zeros)?,
                )
            }
            _ => (scales, zeros),
        };
        let steps = round(&clean.broadcast_div(&scales)?, &zeros, config.scheme)?;
        let nan = Tensor::new(f32::NAN, clean.device())?.broadcast_as(scales.shape())?;
        let scales = finite.where_cond(&scales, &nan)?;
        Ok(Self { steps, scales, rows, means, outliers })
    }

    /// The exact integer product, in f32 where that is exact and in f64 elsewhere.
    fn product(&self, k: &Codes) -> Result<Tensor> {
        let largest = 255.0 * 255.0 * self.steps.dim(D::Minus1)? as f64;
        let dtype = if largest <= f64::from(1 << 24) { DType::F32 } else { DType::F64 };
        let (q, k) = (self.steps.to_dtype(dtype)?, k.steps.to_dtype(dtype)?);
        Ok(q.matmul(&k.t()?)?)
    }

    /// `sums * scale_q * scale_k + mean(q)·(k - mean(k)) + q·mean(k)`, and `q·k` for keys that stand out.
    fn dequantize(&self, k: &Codes, sums: &Tensor) -> Result<Tensor> {
        let mut scores = sums.broadcast_mul(&self.scales)?.broadcast_mul(&k.scales.t()?)?;
        if let Some(means) = &self.means {
            let smoothed = match &k.means {
                Some(means) => (&k.rows - means)?,
                None => k.rows.clone(),
            };
            scores = (scores + means.matmul(&smoothed.t()?)?)?;
        }
        if let Some(means) = &k.means {
            scores = (scores + self.rows.matmul(&means.t()?)?)?;
        }
        let Some(outliers) = &k.outliers else { return Ok(scores) };
        // Those of a query that is not finite are NaN, as with all other keys.
        let exact = self.rows.matmul(&k.rows.t()?)?.broadcast_add(&(&self.scales * 0.0)?)?;
        let outliers = outliers.t()?.broadcast_as(scores.shape())?;
        Ok(outliers.where_cond(&exact, &scores)?)
    }
}

/// What is done to rows before they are quantized.
struct Conditioner {
    smoothing: Smoothing,
    rotate: bool,
    outliers: bool,
    /// Whether the first row stands out.
    sink: bool,
    /// Rows of a block.
    block: usize,
}

struct Conditioned {
    values: Tensor,
    /// `[B, H, S, D]`
    means: Option<Tensor>,
    /// `[B, H, S, 1]`, U8.
    outliers: Option<Tensor>,
}

impl Conditioner {
    const NONE: Self =
        Self { smoothing: Smoothing::None, rotate: false, outliers: false, sink: false, block: 1 };

    fn apply(&self, rows: &Tensor) -> Result<Conditioned> {
        let (b, h, s, _) = rows.dims4()?;
        let mut marks = vec![0u8; b * h * s];
        if self.sink && s > 1 {
            let first =
                without_bad_rows(&rows.narrow(2, 0, 1)?)?.0.flatten_all()?.to_vec1::<u8>()?;
            marks.iter_mut().step_by(s).zip(first).for_each(|(mark, finite)| *mark = finite);
        }
        loop {
            let outliers = Tensor::from_slice(&marks, (b, h, s, 1), rows.device())?;
            let means = self.means(rows, &outliers)?;
            let values = match &means {
                Some(means) => (rows - means)?,
                None => rows.clone(),
            };
            let values = if self.rotate { rotate(&values)? } else { values };
            if !self.outliers {
                return Ok(Conditioned { values, means, outliers: None });
            }
            if !self.mark_outliers(&values, &mut marks)? {
                return Ok(Conditioned { values, means, outliers: Some(outliers) });
            }
        }
    }

    /// What is subtracted from each row.
    fn means(&self, rows: &Tensor, outliers: &Tensor) -> Result<Option<Tensor>> {
        let block = match self.smoothing {
            Smoothing::None => return Ok(None),
            Smoothing::Head => rows.dim(2)?,
            Smoothing::Block => self.block,
        };
        let (finite, clean) = without_bad_rows(rows)?;
        let (counts, clean) = match self.smoothing {
            Smoothing::Block => ((&finite - (&finite * outliers)?)?, without(&clean, outliers)?),
            _ => (finite, clean),
        };
        let of_block = |start: usize| -> Result<Tensor> {
            let len = block.min(rows.dim(2)? - start);
            let mean = token_mean(&clean.narrow(2, start, len)?, &counts.narrow(2, start, len)?)?;
            Ok(mean.broadcast_as(rows.narrow(2, start, len)?.shape())?)
        };
        let blocks = (0..rows.dim(2)?).step_by(block.max(1)).map(of_block);
        Ok(Some(Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 2)?.contiguous()?))
    }

    /// Marks in each block the row that stands out most; returns whether there was one.
    fn mark_outliers(&self, values: &Tensor, marks: &mut [u8]) -> Result<bool> {
        let magnitudes = values.abs()?.max(D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
        let finite = without_bad_rows(values)?.0.flatten_all()?.to_vec1::<u8>()?;
        let tokens = values.dim(2)?.max(1);
        let mut found = false;
        for head in 0..marks.len() / tokens {
            for start in (0..tokens).step_by(self.block) {
                let rows = head * tokens + start..head * tokens + tokens.min(start + self.block);
                let sink =
                    usize::from(self.sink && start == 0 && tokens > 1 && finite[rows.start] != 0);
                let most = (rows.len() / 4).max(1) + sink;
                let marked = rows.clone().filter(|&row| marks[row] != 0).count();
                let others = rows.filter(|&row| finite[row] != 0 && marks[row] == 0);
                if marked < most
                    && let Some(row) = stands_out(others, &magnitudes)
                {
                    marks[row] = 1;
                    found = true;
                }
            }
        }
        Ok(found)
    }
}

/// The row with the largest magnitude, if that is 4 times what the others have on average, or among `n` rows
/// `0.7 (n - 1)` times.
fn stands_out(rows: impl Iterator<Item = usize> + Clone, magnitudes: &[f32]) -> Option<usize> {
    let mut largest = None::<usize>;
    for row in rows.clone() {
        if magnitudes[row] > largest.map_or(0.0, |row| magnitudes[row]) {
            largest = Some(row);
        }
    }
    let largest = largest?;
    let others = rows.clone().filter(|&row| row != largest).map(|row| f64::from(magnitudes[row]));
    let count = rows.count();
    let mean = others.sum::<f64>() / (count - 1).max(1) as f64;
    let limit = 4f64.min(f64::from(0.7 * (count - 1) as f32));
    (count > 1 && f64::from(magnitudes[largest]) > limit * mean).then_some(largest)
}

/// Every row times an orthonormal Hadamard matrix in blocks of powers of two, at most 128: see
/// [`Rotation`](crate::quant::Rotation).
fn rotate(rows: &Tensor) -> Result<Tensor> {
    let (depth, mut start) = (rows.dim(D::Minus1)?, 0);
    let mut blocks = Vec::new();
    while start < depth {
        let size = 1 << (depth - start).min(128).ilog2();
        let mut block =
            (rows.narrow(D::Minus1, start, size)?.contiguous()? / f64::from(size as f32).sqrt())?;
        let mut apart = 1;
        while apart < size {
            let (pairs, whole) = (block.elem_count() / (2 * apart), block.shape().clone());
            let halves = block.reshape((pairs, 2, apart))?;
            let (a, b) = (halves.narrow(1, 0, 1)?, halves.narrow(1, 1, 1)?);
            block = Tensor::cat(&[(&a + &b)?, (a - b)?], 1)?.reshape(whole)?;
            apart *= 2;
        }
        blocks.push(block);
        start += size;
    }
    Ok(Tensor::cat(&blocks, D::Minus1)?)
}

/// `x` with zeros in the rows that are marked.
fn without(x: &Tensor, marks: &Tensor) -> Result<Tensor> {
    Ok(marks.broadcast_as(x.shape())?.where_cond(&x.zeros_like()?, x)?)
}

/// Which rows are finite, `[B, H, S, 1]` U8, and `x` with zeros in the others.
fn without_bad_rows(x: &Tensor) -> Result<(Tensor, Tensor)> {
    // x * 0 is 0 for a finite number and NaN otherwise.
    let finite = (x * 0.0)?.sum_keepdim(D::Minus1)?.eq(0f32)?;
    let clean = finite.broadcast_as(x.shape())?.where_cond(x, &x.zeros_like()?)?;
    Ok((finite, clean))
}

/// The mean over finite rows, summed in f64 where the device has it.
fn token_mean(clean: &Tensor, finite: &Tensor) -> Result<Tensor> {
    let dtype = if clean.device().is_metal() { DType::F32 } else { DType::F64 };
    let rows = finite.to_dtype(dtype)?.sum_keepdim(2)?.maximum(1.0)?;
    let mean = clean.to_dtype(dtype)?.sum_keepdim(2)?.broadcast_div(&rows)?;
    Ok(mean.to_dtype(DType::F32)?)
}

/// Reduces the rows of each group with `reduce` and gives the result back to each row:
/// `[B, H, S, D]` to `[B, H, S, 1]`.
fn reduce_groups(
    x: &Tensor,
    granularity: Granularity,
    reduce: impl Fn(&Tensor, usize) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let (b, h, s, _) = x.dims4()?;
    let rows = reduce(x, 3)?;
    let grouped = match granularity {
        Granularity::PerToken => rows,
        Granularity::PerHead => reduce(&rows, 2)?.broadcast_as((b, h, s, 1))?,
        Granularity::PerTensor => {
            reduce(&rows.flatten_all()?, 0)?.reshape((1, 1, 1, 1))?.broadcast_as((b, h, s, 1))?
        }
        Granularity::PerBlock(n) => {
            let blocks = (0..s).step_by(n).map(|start| {
                let len = n.min(s - start);
                reduce(&rows.narrow(2, start, len)?, 2)?.broadcast_as((b, h, len, 1))
            });
            Tensor::cat(&blocks.collect::<candle_core::Result<Vec<_>>>()?, 2)?
        }
    };
    Ok(grouped.contiguous()?)
}

/// Scale and zero point of each row, `[B, H, S, 1]` each.
fn params(clean: &Tensor, config: &QuantConfig) -> Result<(Tensor, Tensor)> {
    match config.groups(clean.dims())? {
        (_, Some(given)) => given_params(clean, &given, config.granularity),
        (_, None) => dynamic_params(clean, config),
    }
}

/// The nearest steps from the zero point that have a code, ties to even.
fn round(steps: &Tensor, zeros: &Tensor, scheme: Scheme) -> Result<Tensor> {
    let low = (zeros.neg()? + f64::from(scheme.qmin()))?;
    let high = (zeros.neg()? + f64::from(scheme.qmax()))?;
    let steps = steps.broadcast_maximum(&low)?.broadcast_minimum(&high)?;
    Ok(((steps + ROUND)? - ROUND)?)
}

/// Scale and zero point of each row from the data, `[B, H, S, 1]` each.
fn dynamic_params(clean: &Tensor, config: &QuantConfig) -> Result<(Tensor, Tensor)> {
    let min = reduce_groups(clean, config.granularity, |x, dim| x.min_keepdim(dim))?;
    let max = reduce_groups(clean, config.granularity, |x, dim| x.max_keepdim(dim))?;
    let device = clean.device();
    let constant = |x: f32| Tensor::new(x, device)?.broadcast_as(min.shape());
    // Division by a tensor: dividing by a number multiplies by its rounded reciprocal.
    let usable = |width: &Tensor, levels: f32| -> Result<Tensor> {
        let scale = (width / constant(levels)?)?.maximum(f64::from(f32::MIN_POSITIVE))?;
        Ok(width.eq(0f32)?.where_cond(&constant(1.0)?, &scale)?)
    };
    match config.scheme {
        Scheme::Symmetric => {
            let scales = usable(&max.maximum(&min.neg()?)?, 127.0)?;
            let zeros = scales.zeros_like()?;
            Ok((scales, zeros))
        }
        Scheme::Affine => {
            let (min, max) = (min.minimum(0.0)?, max.maximum(0.0)?);
            let width = (&max - &min)?;
            // Where the width is no number of f32, its part is.
            let apart = ((max / constant(255.0)?)? - (&min / constant(255.0)?)?)?;
            let is_wide = width.gt(f64::from(f32::MAX))?;
            let scales = is_wide.where_cond(&apart, &usable(&width, 255.0)?)?;
            let unsigned = (min.neg()? / &scales)?.clamp(0f32, 255f32)?;
            let zeros = (((unsigned + ROUND)? - ROUND)? - 128.0)?;
            Ok((scales, width.eq(0f32)?.where_cond(&constant(0.0)?, &zeros)?))
        }
    }
}

/// Given scale and zero point of each group, spread to each row.
fn given_params(
    clean: &Tensor,
    given: &[QuantParams],
    granularity: Granularity,
) -> Result<(Tensor, Tensor)> {
    let (b, h, s, _) = clean.dims4()?;
    let of_rows = |f: &dyn Fn(usize) -> f32| {
        let row = |row: usize| f(granularity.group(row / s, row % s, s));
        Tensor::from_vec((0..b * h * s).map(row).collect(), (b, h, s, 1), clean.device())
    };
    let scales = of_rows(&|group| given[group].scale())?;
    let zeros = of_rows(&|group| f32::from(given[group].zero_point()))?;
    Ok((scales, zeros))
}
