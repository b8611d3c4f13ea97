//! The path of other devices, in ordinary tensor operations, exercised on the CPU.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_int8_attention::quant::{Granularity, Scheme, Smoothing};
use candle_int8_attention::reference::{tensor_ops, unfused};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, AttnMask, Causal, PvPrecision, attention,
};
use common::randn;

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!((a.dims(), a.dtype()), (b.dims(), b.dtype()));
    Ok(common::largest_difference(a, b) as f32)
}

#[test]
fn the_same_numbers_as_the_kernels() -> Result<()> {
    let (b, h, h_kv, m, n, d, dv) = (2, 4, 2, 20, 70, 48, 24);
    let (q, k, v) = (randn((b, h, m, d)), randn((b, h_kv, n, d)), randn((b, h_kv, n, dv)));
    let keep: Vec<u8> = (0..b * n).map(|i| u8::from(i % 5 != 1)).collect();
    let keep = Tensor::from_vec(keep, (b, 1, 1, n), &Device::Cpu)?;
    let int8 = AttentionConfig::int8().pv(PvPrecision::F32);
    let blocks = int8.clone().scheme(Scheme::Affine).granularity(Granularity::PerBlock(16));
    let keep = AttentionCall::default().with_mask(keep);
    for config in [
        int8.clone(),
        blocks.smoothing(Smoothing::None, Smoothing::None),
        int8.clone().softcap(2.0),
        int8.alibi_slopes(vec![0.5, 0.25, 0.1, 0.0]).window(Some(30), None),
    ] {
        for call in [
            AttentionCall::default(),
            AttnMask::causal_with_offset(n - m).into(),
            AttentionCall::causal().with_kv_lens(vec![n, 33]),
            keep.clone(),
            keep.clone().with_causal(Causal::From(vec![0, 40])).with_kv_lens(vec![n, 45]),
        ] {
            let anywhere = tensor_ops::attention(&q, &k, &v, &call, &config)?;
            // The same int8 scores and f32 operations, so only the rounding of sums differs.
            let unfused = unfused::attention(&q, &k, &v, &call, &config)?;
            let fused = attention(&q, &k, &v, &call, &config)?;
            for other in [unfused, fused] {
                let difference = largest_difference(&anywhere, &other)?;
                assert!(difference < 1e-5, "{difference} with {call:?} {config:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_and_empty_tensors() -> Result<()> {
    let config = AttentionConfig::int8();
    for dtype in [DType::F16, DType::BF16] {
        let q = randn((1, 4, 12, 32)).to_dtype(dtype)?;
        let anywhere = tensor_ops::attention(&q, &q, &q, AttnMask::causal(), &config)?;
        let fused = attention(&q, &q, &q, AttnMask::causal(), &config)?;
        assert!(largest_difference(&anywhere, &fused)? < 0.02);
    }
    let (q, kv) = (randn((1, 2, 3, 8)), randn((1, 2, 0, 8)));
    let out = tensor_ops::attention(&q, &kv, &kv, &AttnMask::None, &config)?;
    assert_eq!(out.dims(), [1, 2, 3, 8]);
    Ok(())
}
