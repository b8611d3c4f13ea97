//! One call of a layer's attention: what went in, and what fp32 makes of it.

use crate::attention::attention_probs;
use crate::attention::{AttentionCall, AttentionConfig, Backend, attention};
use crate::cpu::Level;
use crate::drift::layers::flat;
use crate::drift::metrics::entropy;
use crate::drift::{Candidate, bf16};
use crate::models::Attend;
use crate::quant::{
    ConditionedHead, Conditioning, KEY_BLOCK, QUERY_BLOCK, QuantConfig, QuantizedTensor,
};
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use std::time::Instant;

/// The arguments of one call, and the configuration of the layer that makes it.
pub(crate) struct Call {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
    pub call: AttentionCall,
    pub config: AttentionConfig,
}

/// Who computes attention: fp32, or a candidate.
pub(crate) type Path<'a> = Option<&'a Candidate>;

/// `H`, `H_kv`, `M`, `N`, `D` and `Dv` of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub heads: usize,
    pub kv_heads: usize,
    pub queries: usize,
    pub keys: usize,
    pub depth: usize,
    pub value_dim: usize,
}

impl Dims {
    /// The key head that a query head uses.
    pub fn key_head(&self, head: usize) -> usize {
        head * self.kv_heads / self.heads
    }
}

/// A layer's output with the one call of attention that it made.
pub(crate) struct Ran {
    pub hidden: Tensor,
    pub call: Call,
    /// Attention output, `[H, M, Dv]` flat.
    pub output: Vec<f32>,
    /// How long the attention took.
    pub seconds: f64,
}

/// Runs a layer that is configured as `config` with attention by `path`, and keeps what it called
/// attention with.
pub(crate) fn run(
    index: usize,
    path: Path<'_>,
    config: &AttentionConfig,
    layer: &mut dyn FnMut(&mut Attend<'_>) -> Result<Tensor>,
) -> Result<Ran> {
    let mut calls = Vec::new();
    let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor, call: &AttentionCall| {
        let (q, k, v, call) = (q.clone(), k.clone(), v.clone(), call.clone());
        let call = Call { q, k, v, call, config: config.clone() };
        let start = Instant::now();
        let out = call.attention(path, &call.q, &call.k)?;
        let seconds = start.elapsed().as_secs_f64();
        calls.push((call, out.clone(), seconds));
        Ok(out)
    };
    let hidden = layer(&mut attend)?;
    let count = calls.len();
    match (calls.pop(), count) {
        (Some((call, out, seconds)), 1) => Ok(Ran { hidden, call, output: flat(&out)?, seconds }),
        _ => Err(Error::Mismatch(format!(
            "layer {index} called attention {count} times, expected once"
        ))),
    }
}

impl Call {
    /// # Errors
    /// [`Error::Shape`] for more than one sequence.
    pub fn dims(&self) -> Result<Dims> {
        let (b, heads, queries, depth) = self.q.dims4()?;
        if b != 1 {
            return Err(Error::Shape {
                op: "Recorder::record",
                tensor: "q",
                shape: self.q.dims().to_vec(),
                expected: "[1, H, M, D]: one sequence at a time".into(),
            });
        }
        let (_, kv_heads, keys, value_dim) = self.v.dims4()?;
        Ok(Dims { heads, kv_heads, queries, keys, depth, value_dim })
    }

    fn attention(&self, path: Path<'_>, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        match path {
            Some(candidate) => candidate.attention((q, k, &self.v), &self.call, &self.config),
            None => attention(q, k, &self.v, &self.call, &self.config.with_backend(Backend::Fp32)),
        }
    }

    /// The probabilities, `[H, M, N]` flat.
    pub fn probabilities(&self, path: Path<'_>) -> Result<Vec<f32>> {
        let (q, k) = (&self.q, &self.k);
        flat(&match path {
            Some(candidate) => candidate.probabilities((q, k), &self.call, &self.config)?,
            None => attention_probs(q, k, &self.call, &self.config.with_backend(Backend::Fp32))?,
        })
    }

    /// The attention output with other queries, keys, or both.
    pub fn output_of(&self, q: &Tensor, k: &Tensor, path: Path<'_>) -> Result<Vec<f32>> {
        flat(&self.attention(path, q, k)?)
    }

    /// The raw scores `q·k^T` in fp32, `[H, M, N]` flat.
    pub fn fp32_scores(&self) -> Result<Vec<f32>> {
        let dims = self.dims()?;
        let group = dims.heads / dims.kv_heads.max(1);
        // Query heads that share a key head are rows of one taller matrix.
        let rows = (dims.kv_heads, group * dims.queries, dims.depth);
        let q = self.q.to_dtype(DType::F32)?.contiguous()?.reshape(rows)?;
        let k = self.k.to_dtype(DType::F32)?.squeeze(0)?.contiguous()?;
        flat(&q.matmul(&k.t()?)?)
    }
}

/// What fp32 makes of a call.
pub(crate) struct Reference {
    pub dims: Dims,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub scores: Vec<f32>,
    pub probabilities: Vec<f32>,
    /// Of each row of the probabilities.
    pub entropies: Vec<f64>,
}

impl Reference {
    pub fn of(call: &Call) -> Result<Self> {
        let dims = call.dims()?;
        let probabilities = call.probabilities(None)?;
        let entropies = probabilities.par_chunks(dims.keys.max(1)).map(entropy).collect();
        Ok(Self {
            dims,
            q: flat(&call.q)?,
            k: flat(&call.k)?,
            scores: call.fp32_scores()?,
            probabilities,
            entropies,
        })
    }
}

/// What a candidate makes of a call, up to the probabilities.
pub(crate) struct Stages {
    pub q: Rounded,
    pub k: Rounded,
    pub scores: Vec<f32>,
    pub probabilities: Vec<f32>,
}

impl Stages {
    pub fn of(call: &Call, candidate: &Candidate) -> Result<Self> {
        let scores = &candidate.config.scores;
        let (q, k) = if candidate.in_bf16 {
            (Rounded::to_bf16(&call.q)?, Rounded::to_bf16(&call.k)?)
        } else {
            let (of_q, of_k) = scores.conditioning(call.q.dim(D::Minus1)?);
            (
                Rounded::of(&call.q, &scores.q, (&of_q, QUERY_BLOCK))?,
                Rounded::of(&call.k, &scores.k, (&of_k, KEY_BLOCK))?,
            )
        };
        Ok(Self {
            q,
            k,
            scores: flat(&candidate.scores(&call.q, &call.k)?)?,
            probabilities: call.probabilities(Some(candidate))?,
        })
    }
}

/// A tensor `[1, H, S, D]` as its int8 codes have it, conditioned, quantized, and back; or in bf16.
pub(crate) struct Rounded {
    /// Flat.
    pub values: Vec<f32>,
    /// Codes beyond the range, one count a head.
    pub clipped: Vec<u64>,
    shape: Vec<usize>,
}

impl Rounded {
    pub fn of(
        tensor: &Tensor,
        config: &QuantConfig,
        (conditioning, block): (&Conditioning, usize),
    ) -> Result<Self> {
        let shape = tensor.dims().to_vec();
        let (_, _, tokens, depth) = tensor.dims4()?;
        let original = flat(&tensor.to_dtype(DType::F32)?)?;
        let matrix = (tokens * depth).max(1);
        let level = Level::active()?;
        let condition = |head| ConditionedHead::new(level, conditioning, head, depth, block);
        let conditioned: Vec<_> = original.chunks(matrix).map(condition).collect();
        // What stands out is not in the range of the others.
        let outliers = conditioned.iter().enumerate().flat_map(|(head, conditioned)| {
            conditioned.outliers.iter().map(move |row| head * tokens + row)
        });
        let outliers: Vec<usize> = outliers.collect();
        let mut values =
            conditioned.iter().flat_map(|head| head.values.clone()).collect::<Vec<_>>();
        for row in &outliers {
            values[row * depth..(row + 1) * depth].fill(0.0);
        }
        let quantized = QuantizedTensor::quantize_slice(&values, &shape, config)?;
        let mut real = quantized.dequantize_to_vec();
        let beyond = |(i, (x, y)): (usize, (&f32, &f32))| {
            Ok((x - y).abs() > 0.75 * quantized.params(i / depth.max(1))?.scale())
        };
        let pairs = values.iter().zip(&real).enumerate();
        let all = pairs.map(beyond).collect::<Result<Vec<bool>>>()?;
        let count = |head: &[bool]| head.iter().filter(|&&clipped| clipped).count() as u64;
        let clipped = all.chunks(matrix).map(count).collect();
        for (real, head) in real.chunks_mut(matrix).zip(&conditioned) {
            head.undo(real, depth);
        }
        for row in outliers {
            let elements = row * depth..(row + 1) * depth;
            real[elements.clone()].copy_from_slice(&original[elements]);
        }
        Ok(Self { values: real, clipped, shape })
    }

    /// In bf16, whose range is that of f32: nothing is clipped.
    pub fn to_bf16(tensor: &Tensor) -> Result<Self> {
        let values = flat(&bf16::rounded(tensor)?)?;
        let clipped = vec![0; tensor.dim(1)?];
        Ok(Self { values, clipped, shape: tensor.dims().to_vec() })
    }

    pub fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.values, self.shape.as_slice(), &Device::Cpu)?)
    }
}
