//! Every stage between word embeddings and the encoder's answer: its range, its scales, its error.

use crate::common::extremes::largest;
use crate::heads::{Path, Qkv, flat};
use anyhow::Result;
use candle_core::{D, DType, Tensor};
use candle_int8_attention::attention::{attention_scores_int32, attention_scores_requantized};
use candle_int8_attention::drift::Candidate;
use candle_int8_attention::drift::metrics::{lowest, sqnr_db};
use candle_int8_attention::quant::{
    Granularity, KEY_BLOCK, QUERY_BLOCK, QuantConfig, QuantizedTensor, Rotation, Scheme, Smoothing,
};
use candle_int8_attention::{ScoreConfig, attention_scores};
use serde::Serialize;

/// One row of the table.
#[derive(Debug, Serialize)]
pub struct Stage {
    pub name: String,
    pub shape: Vec<usize>,
    pub min: f64,
    pub max: f64,
    /// Real size of one integer step, smallest and largest group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<[f64; 2]>,
    /// Codes of real zero, smallest and largest group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_point: Option<[i8; 2]>,
    /// Against the same stage in fp32; `None` where int8 has changed nothing yet.
    pub sqnr_db: Option<f64>,
}

impl Stage {
    /// A stage that is the same in both paths.
    pub fn shared(name: &str, tensor: &Tensor) -> Result<Self> {
        Self::new(name, tensor, None)
    }

    /// A stage of the int8 path beside the fp32 path's.
    pub fn compared(name: &str, fp32: &Tensor, int8: &Tensor) -> Result<Self> {
        Self::new(name, int8, Some(sqnr_db(&flat(fp32)?, &flat(int8)?)?))
    }

    fn new(name: &str, tensor: &Tensor, sqnr_db: Option<f64>) -> Result<Self> {
        let values = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let min = lowest(values.iter().copied());
        let max = largest(values.iter().copied());
        let shape = tensor.dims().to_vec();
        Ok(Self { name: name.into(), shape, min, max, scale: None, zero_point: None, sqnr_db })
    }

    fn with_params(self, quantized: &QuantizedTensor) -> Self {
        let params = quantized.all_params();
        let scales = params.iter().map(|p| f64::from(p.scale()));
        let zeros = params.iter().map(|p| p.zero_point());
        Self {
            scale: bounds(scales, f64::total_cmp),
            zero_point: bounds(zeros, i8::cmp).filter(|zeros| *zeros != [0, 0]),
            ..self
        }
    }
}

/// Smallest and largest.
fn bounds<T: Copy>(
    values: impl Iterator<Item = T> + Clone,
    order: impl Fn(&T, &T) -> std::cmp::Ordering,
) -> Option<[T; 2]> {
    Some([values.clone().min_by(&order)?, values.max_by(&order)?])
}

/// The stages of one attention block, from Q, K and V to its output.
pub fn of_attention(
    block: &Qkv,
    candidate: &Candidate,
    (fp32, int8): (&Path, &Path),
) -> Result<Vec<Stage>> {
    let config = &candidate.config.scores;
    let (q, k) = (&block.q, &block.k);
    let mut stages = vec![
        Stage::shared("queries Q", q)?,
        Stage::shared("keys K", k)?,
        Stage::shared("values V (not in int8)", &block.v)?,
    ];
    let q_smooth = smooth("Q", q, (config.smooth_q, QUERY_BLOCK), config.rotate, &mut stages)?;
    let k_smooth = smooth("K", k, (config.smooth_k, KEY_BLOCK), config.rotate, &mut stages)?;
    stages.push(codes("Q as int8", &q_smooth, &config.q)?);
    stages.push(codes("K as int8", &k_smooth, &config.k)?);
    stages.extend(scores(block, (&q_smooth, &k_smooth), candidate)?);
    stages.push(Stage::compared("probabilities (softmax)", &fp32.probs, &int8.probs)?);
    stages.push(Stage::compared("attention output", &fp32.output, &int8.output)?);
    Ok(stages)
}

/// `x` minus its mean over tokens, rotated, with a stage for each of these that is on.
fn smooth(
    name: &str,
    x: &Tensor,
    (smoothing, block): (Smoothing, usize),
    rotate: bool,
    stages: &mut Vec<Stage>,
) -> Result<Tensor> {
    let mut smoothed = x.clone();
    if smoothing != Smoothing::None {
        let tokens = x.dim(D::Minus2)?;
        let block = if smoothing == Smoothing::Block { block } else { tokens.max(1) };
        let less_mean = |start: usize| {
            let rows = x.narrow(D::Minus2, start, block.min(tokens - start))?;
            rows.broadcast_sub(&rows.mean_keepdim(D::Minus2)?)
        };
        let blocks = (0..tokens).step_by(block).map(less_mean);
        smoothed = Tensor::cat(&blocks.collect::<candle_core::Result<Vec<_>>>()?, D::Minus2)?;
        stages.push(Stage::shared(&format!("{name} minus its mean"), &smoothed)?);
    }
    if rotate {
        let mut rows = flat(&smoothed)?;
        Rotation::new(x.dim(D::Minus1)?).apply(&mut rows)?;
        smoothed = Tensor::from_vec(rows, x.dims(), x.device())?;
        stages.push(Stage::shared(&format!("{name} rotated"), &smoothed)?);
    }
    Ok(smoothed)
}

/// The int8 codes; their error is that of the numbers they stand for.
fn codes(name: &str, x: &Tensor, config: &QuantConfig) -> Result<Stage> {
    let quantized = QuantizedTensor::quantize(x, config)?;
    let real = quantized.dequantize(x.device())?;
    let codes: Vec<f32> = quantized.values().iter().map(|&code| f32::from(code)).collect();
    let codes = Tensor::from_vec(codes, x.dims(), x.device())?;
    let sqnr = sqnr_db(&flat(x)?, &flat(&real)?)?;
    Ok(Stage::new(name, &codes, Some(sqnr))?.with_params(&quantized))
}

/// The int32 product of the codes, and the scores that leave the op.
fn scores(
    block: &Qkv,
    (q_smooth, k_smooth): (&Tensor, &Tensor),
    candidate: &Candidate,
) -> Result<Vec<Stage>> {
    let config = &candidate.config.scores;
    let fp32 = block.q.contiguous()?.matmul(&block.k.t()?.contiguous()?)?;
    // An int32 cannot hold what smoothing adds back, so the smoothed tensors go in as they are.
    let (q, k) = (config.q.clone(), config.k.clone());
    let raw = ScoreConfig { q, k, ..ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken) };
    let int32 = attention_scores_int32(q_smooth, k_smooth, &raw)?;
    let dequantized = attention_scores(&block.q, &block.k, config)?;
    let mut stages = vec![
        Stage::shared("Q·K as int32 (exact)", &int32)?,
        Stage::compared("scores Q·K in f32", &fp32, &dequantized)?,
    ];
    if let Some(to) = &candidate.requant {
        let requantized = attention_scores_requantized(&block.q, &block.k, config, to)?;
        stages.push(Stage::compared("scores via int8", &fp32, &requantized)?);
    }
    Ok(stages)
}
