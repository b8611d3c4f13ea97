//! Attention in bf16, which most readers of a report use today, for int8 to be seen beside it.
//!
//! ```text
//! S = bf16(Q)·bf16(K)^T      products of the rounded numbers, sums in f32
//! P = softmax(scale * S)     in f32
//! O = bf16(P)·bf16(V)        sums in f32
//! ```
//!
//! Rounding is to nearest, ties to even. The output stays f32 as that of int8 attention does: a model in bf16
//! rounds it whoever computes attention. Its time says nothing, because the numbers are multiplied in f32.

use crate::Result;
use crate::attention::heads::repeat_heads;
use crate::attention::reference::unfused;
use crate::attention::{AttentionCall, AttentionConfig, Backend};
use candle_core::{DType, Tensor};

/// The nearest numbers of bf16, in f32.
pub(super) fn rounded(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)
}

/// The raw scores `[B, H, M, N]`.
pub(super) fn scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    let k = repeat_heads(&rounded(k)?, q.dim(1)?)?.contiguous()?;
    Ok(rounded(q)?.contiguous()?.matmul(&k.t()?)?)
}

/// The probabilities `[B, H, M, N]`, rounded.
pub(super) fn probabilities(
    (q, k): (&Tensor, &Tensor),
    call: &AttentionCall,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let config = config.with_backend(Backend::Fp32);
    rounded(&unfused::attention_probs(&rounded(q)?, &rounded(k)?, call, &config)?)
}

/// The attention output `[B, H, M, Dv]` in the dtype of `q`.
pub(super) fn attention(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    call: &AttentionCall,
    config: &AttentionConfig,
) -> Result<Tensor> {
    let v = repeat_heads(&rounded(v)?, q.dim(1)?)?.contiguous()?;
    let probs = probabilities((q, k), call, config)?;
    Ok(probs.matmul(&v)?.to_dtype(q.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Causal;
    use candle_core::Device;
    use half::bf16;

    /// By the definition, in f64 from the rounded numbers: the sums in f32 differ by less than this.
    const OF_F32_SUMS: f64 = 1e-5;

    #[test]
    fn outputs_are_those_of_rounded_operands() {
        let (heads, queries, keys, depth) = (2, 3, 5, 8);
        let numbers = |count: usize, seed: usize| -> Vec<f32> {
            (0..count).map(|i| (((i * 7919 + seed) % 1013) as f32 / 506.5 - 1.0) * 3.1).collect()
        };
        let tensor = |x: &[f32], heads: usize, rows: usize| {
            Tensor::from_slice(x, (1, heads, rows, depth), &Device::Cpu).unwrap()
        };
        let q = numbers(heads * queries * depth, 3);
        let (k, v) = (numbers(keys * depth, 5), numbers(keys * depth, 11));
        let (qt, kt, vt) = (tensor(&q, heads, queries), tensor(&k, 1, keys), tensor(&v, 1, keys));
        let call = AttentionCall::from(Causal::Offset(1));
        let config = AttentionConfig::fp32().softmax_scale(0.5);
        let out = attention((&qt, &kt, &vt), &call, &config).unwrap();
        let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();

        let near = |x: f32| f64::from(bf16::from_f32(x).to_f32());
        for (row, q) in q.chunks(depth).enumerate() {
            let seen = row % queries + 2;
            let score = |j: usize| {
                let k = &k[j * depth..][..depth];
                0.5 * q.iter().zip(k).map(|(a, b)| near(*a) * near(*b)).sum::<f64>()
            };
            let weights: Vec<f64> = (0..seen).map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..depth {
                let term = |j: usize| near((weights[j] / sum) as f32) * near(v[j * depth + d]);
                let expected: f64 = (0..seen).map(term).sum();
                let found = f64::from(out[row * depth + d]);
                // A probability at the middle of two numbers of bf16 may be rounded either way.
                let either = 3.1 / 256.0 * weights.iter().map(|w| w / sum).fold(0.0, f64::max);
                assert!(
                    (found - expected).abs() < OF_F32_SUMS + either,
                    "{row} {d}: {found}, {expected}"
                );
            }
        }
        let scores = scores(&qt, &kt).unwrap();
        let first = scores.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
        let expected: f64 = q[..depth].iter().zip(&k).map(|(a, b)| near(*a) * near(*b)).sum();
        assert!((f64::from(first) - expected).abs() < OF_F32_SUMS);
    }
}
