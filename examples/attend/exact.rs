//! Attention in fp32, part by part: what it needs in memory does not grow with `M * N`.

use crate::input::Inputs;
use crate::masking::Masking;
use anyhow::Result;
use candle_core::Tensor;
use candle_int8_attention::{AttentionConfig, attention};

/// Scores that are in memory at a time: 64 MB.
const SCORES_AT_ONCE: usize = 1 << 24;

/// `[B, H, M, Dv]`.
pub fn fp32_attention(
    inputs: &Inputs,
    masking: &Masking,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let (b, h, m, n) = inputs.dims()?;
    let h_kv = inputs.k.dim(1)?;
    if b * h * m == 0 {
        return Ok(inputs.q.narrow(3, 0, 0)?.pad_with_zeros(3, 0, inputs.v.dim(3)?)?);
    }
    let group = h / h_kv;
    let queries = (SCORES_AT_ONCE / (group * n).max(1)).clamp(1, m);
    let of_key_head = |batch: usize, head: usize| -> Result<Tensor> {
        let heads = head * group..(head + 1) * group;
        let one = |x: &Tensor, start, len| x.narrow(0, batch, 1)?.narrow(1, start, len);
        let q = one(&inputs.q, heads.start, group)?;
        let (k, v) = (one(&inputs.k, head, 1)?, one(&inputs.v, head, 1)?);
        let parts = (0..m).step_by(queries).map(|start| {
            let rows = start..(start + queries).min(m);
            let q = q.narrow(2, start, rows.len())?;
            let call = masking.part(batch, heads.clone(), rows)?;
            Ok(attention(&q, &k, &v, call, config)?)
        });
        Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)?)
    };
    let of_sequence = |batch: usize| -> Result<Tensor> {
        let heads = (0..h_kv).map(|head| of_key_head(batch, head)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&heads, 1)?)
    };
    Ok(Tensor::cat(&(0..b).map(of_sequence).collect::<Result<Vec<_>>>()?, 0)?)
}

/// `q·k^T`, `[B, H, M, N]`.
pub fn fp32_scores(inputs: &Inputs) -> Result<Tensor> {
    let ((b, h, m, d), (_, h_kv, n, _)) = (inputs.q.dims4()?, inputs.k.dims4()?);
    if b * h * m * n * d == 0 {
        return Ok(Tensor::zeros((b, h, m, n), inputs.q.dtype(), inputs.q.device())?);
    }
    // The query heads of a key head are rows of one taller matrix.
    let tall = inputs.q.reshape((b, h_kv, h / h_kv * m, d))?;
    Ok(tall.matmul(&inputs.k.t()?)?.reshape((b, h, m, n))?)
}
