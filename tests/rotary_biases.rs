//! Key biases under rotary embeddings, as Qwen2.5 has them: large numbers that turn with the position, some
//! from one key to the next, some over hundreds.

mod common;

use candle_core::{Device, Result, Tensor};
use candle_int8_attention::{
    AttentionCall, AttentionConfig, Int8KvCache, KvCacheConfig, PvPrecision, attention,
};
use common::randn;

const CPU: Device = Device::Cpu;
const TOKENS: usize = 512;
const DEPTH: usize = 64;

/// Turns each pair `(i, i + 32)` of a row by its position, slower from pair to pair.
fn rotate(rows: &Tensor) -> Result<Tensor> {
    let half = DEPTH / 2;
    let angle =
        |token: usize, pair: usize| token as f64 * 1e6f64.powf(-(pair as f64) / half as f64);
    let table = |f: fn(f64) -> f64| {
        let all = (0..TOKENS * half).map(|i| f(angle(i / half, i % half)) as f32).collect();
        Tensor::from_vec(all, (1, 1, TOKENS, half), &CPU)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (a, b) = (rows.narrow(3, 0, half)?, rows.narrow(3, half, half)?);
    let turned = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let other = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    Tensor::cat(&[turned, other], 3)
}

/// Queries `[1, 2, N, D]` and keys `[1, 1, N, D]` with a bias of 60 on a fast, a middle and a slow pair.
fn planted() -> Result<(Tensor, Tensor)> {
    let mut bias = vec![0f32; DEPTH];
    for pair in [0, 12, 28] {
        (bias[pair], bias[pair + DEPTH / 2]) = (48.0, 36.0);
    }
    let bias = Tensor::from_vec(bias, (1, 1, 1, DEPTH), &CPU)?;
    let k = rotate(&randn((1, 1, TOKENS, DEPTH)).broadcast_add(&bias)?)?;
    // A model that has such biases does not ask for them: its queries are small there.
    let q = (randn((1, 2, TOKENS, DEPTH)) * 1.0)?;
    Ok((rotate(&q)?, k))
}

/// The mean KL divergence over queries, of probabilities `[1, H, N, N]`.
fn mean_kl(p: &Tensor, q: &Tensor) -> Result<f64> {
    let (p, q) = (p.flatten_all()?.to_vec1::<f32>()?, q.flatten_all()?.to_vec1::<f32>()?);
    let term = |(p, q): (&f32, &f32)| match *p > 0.0 {
        true => f64::from(*p) * (f64::from(*p) / f64::from(q.max(1e-12))).ln(),
        false => 0.0,
    };
    Ok(p.iter().zip(&q).map(term).sum::<f64>() / (p.len() / TOKENS) as f64)
}

#[test]
fn biases_that_turn_leave_the_probabilities_as_they_are() -> Result<()> {
    let (q, k) = planted()?;
    // Values that pick out one key each: the output is the probabilities.
    let v = Tensor::eye(TOKENS, candle_core::DType::F32, &CPU)?.reshape((1, 1, TOKENS, TOKENS))?;
    let of = |config| attention(&q, &k, &v, AttentionCall::causal(), &config);
    let exact = of(AttentionConfig::fp32())?;
    let int8 = of(AttentionConfig::int8().pv(PvPrecision::F32))?;
    let found = mean_kl(&exact, &int8)?;
    let mut cache = Int8KvCache::new(KvCacheConfig::default());
    cache.append(&k, &v)?;
    let config = AttentionConfig::int8().pv(PvPrecision::F32);
    let cached = cache.attention(&q, AttentionCall::causal(), &config)?;
    let in_cache = mean_kl(&exact, &cached)?;
    println!("KL {found:.2e}, in a cache {in_cache:.2e}");
    assert!(found < 1e-3 && in_cache < 1e-3, "{found} {in_cache}");
    Ok(())
}
