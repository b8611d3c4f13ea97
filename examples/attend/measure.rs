//! Both backends on the same tensors.

use crate::args::{Args, BackendName};
use crate::exact::{fp32_attention, fp32_scores};
use crate::input::Inputs;
use crate::masking::Masking;
use anyhow::Result;
use candle_core::Tensor;
use candle_int8_attention::attention::{attention_probs, attention_scores};
use candle_int8_attention::drift::{Drift, ProbabilityDrift};
use candle_int8_attention::{AttentionConfig, attention};
use serde::Serialize;

/// Above this many scores the probabilities are not compared: both would be in memory whole.
pub const MAX_PROBABILITIES: usize = 1 << 25;

/// What the chosen backend gives, and how far that is from fp32.
pub struct Results {
    /// `[B, H, M, Dv]`
    pub out: Tensor,
    /// Scaled scores `[B, H, M, N]`, if they are to be saved.
    pub scores: Option<Tensor>,
    pub drift: Drift,
    pub heads: Vec<HeadDrift>,
    /// `None` if they are too many.
    pub probabilities: Option<ProbabilityDrift>,
}

/// The drift of the output of one head of one sequence.
#[derive(Debug, Clone, Serialize)]
pub struct HeadDrift {
    pub batch: usize,
    pub head: usize,
    #[serde(flatten)]
    pub drift: Drift,
}

impl Results {
    pub fn of(args: &Args, inputs: &Inputs, masking: &Masking) -> Result<Self> {
        let (q, k, v) = (&inputs.q, &inputs.k, &inputs.v);
        let fp32 = fp32_attention(inputs, masking, &args.fp32())?;
        let (out, config) = match args.backend {
            BackendName::Fp32 => (fp32.clone(), args.fp32()),
            BackendName::Int8 => {
                let (call, config) = masking.whole(args.int8())?;
                (attention(q, k, v, call, &config)?, args.int8())
            }
        };
        Ok(Self {
            scores: args.save_scores.then(|| scaled_scores(args, inputs)).transpose()?,
            drift: Drift::of_outputs(&flat(&fp32)?, &flat(&out)?)?,
            heads: heads(&fp32, &out)?,
            probabilities: probabilities(inputs, masking, (args.fp32(), config))?,
            out,
        })
    }
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn scaled_scores(args: &Args, inputs: &Inputs) -> Result<Tensor> {
    let scores = match args.backend {
        BackendName::Fp32 => fp32_scores(inputs)?,
        BackendName::Int8 => attention_scores(&inputs.q, &inputs.k, &args.scores())?,
    };
    Ok((scores * f64::from(args.scale(inputs)?))?)
}

fn heads(fp32: &Tensor, out: &Tensor) -> Result<Vec<HeadDrift>> {
    let (_, h, m, dv) = fp32.dims4()?;
    let (fp32, out) = (flat(fp32)?, flat(out)?);
    let len = (m * dv).max(1);
    let pairs = fp32.chunks_exact(len).zip(out.chunks_exact(len)).enumerate();
    pairs
        .map(|(i, (a, b))| {
            Ok(HeadDrift { batch: i / h, head: i % h, drift: Drift::of_outputs(a, b)? })
        })
        .collect()
}

fn probabilities(
    inputs: &Inputs,
    masking: &Masking,
    (reference, candidate): (AttentionConfig, AttentionConfig),
) -> Result<Option<ProbabilityDrift>> {
    let (b, h, m, n) = inputs.dims()?;
    if b * h * m * n > MAX_PROBABILITIES {
        return Ok(None);
    }
    let probs = |config| -> Result<Vec<f32>> {
        let (call, config) = masking.whole(config)?;
        flat(&attention_probs(&inputs.q, &inputs.k, call, &config)?)
    };
    Ok(Some(ProbabilityDrift::of_rows(&probs(reference)?, &probs(candidate)?, n.max(1))?))
}
