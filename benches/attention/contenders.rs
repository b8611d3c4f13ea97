//! What takes part: this crate and its peers, each as a closure over the same tensors.

use candle_core::{D, Result, Tensor};
use candle_int8_attention::{AttentionConfig, AttnMask, ScoreConfig, attention, attention_scores};
use candle_nn::attention::flash_attn;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::NdTensor;
use rten_tensor::prelude::*;

/// `[B, H, N, D]`, for queries, keys and values alike.
pub type Shape = [usize; 4];

/// One way to compute, by name.
pub struct Contender {
    pub name: &'static str,
    pub run: Box<dyn FnMut() -> Result<()>>,
}

fn contender(name: &'static str, mut run: impl FnMut() -> Result<Tensor> + 'static) -> Contender {
    Contender { name, run: Box::new(move || run().map(drop)) }
}

/// Raw scores, f32 in and f32 out; the first is this crate.
pub fn scores(q: &Tensor, k: &Tensor) -> Result<Vec<Contender>> {
    let config = ScoreConfig::default();
    let ours = {
        let (q, k) = (q.clone(), k.clone());
        contender("this crate", move || Ok(attention_scores(&q, &k, &config)?))
    };
    let candle = {
        let (q, k) = (q.clone(), k.clone());
        contender("Candle matmul", move || q.matmul(&k.t()?))
    };
    Ok(vec![ours, candle, rten(q, k)?])
}

/// Attention, f32 in and f32 out; the first is this crate.
pub fn attentions(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Vec<Contender>> {
    let all = || (q.clone(), k.clone(), v.clone());
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let ours = {
        let ((q, k, v), config) = (all(), AttentionConfig::int8());
        contender("this crate", move || Ok(attention(&q, &k, &v, &AttnMask::None, &config)?))
    };
    let unfused = {
        let (q, k, v) = all();
        contender("Candle unfused", move || {
            let scores = (q.matmul(&k.t()?)? * scale)?;
            candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)
        })
    };
    let flash = {
        let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        let (q, k, v) = (bshd(q)?, bshd(k)?, bshd(v)?);
        contender("Candle flash_attn", move || {
            flash_attn::<f32>(&q, &k, &v, scale as f32, AttnMask::None, None, None)
        })
    };
    Ok(vec![ours, unfused, flash])
}

/// rten-gemm's u8 x i8 product alone: its operands are quantized and its keys transposed already.
fn rten(q: &Tensor, k: &Tensor) -> Result<Contender> {
    let (b, h, m, d) = q.dims4()?;
    let n = k.dim(2)?;
    let codes = |x: &Tensor| -> Result<Vec<f32>> { ((x * 30.0)?.clamp(-127f32, 127f32))?.flatten_all()?.to_vec1() };
    let (q, k) = (codes(q)?, codes(k)?);
    let heads: Vec<(NdTensor<u8, 2>, NdTensor<i8, 2>)> = (0..b * h)
        .map(|head| {
            let rows = q[head * m * d..(head + 1) * m * d].iter().map(|&x| (x + 128.0) as u8);
            let keys = k[head * n * d..(head + 1) * n * d].iter().map(|&x| x as i8);
            (
                NdTensor::from_data([m, d], rows.collect::<Vec<_>>()),
                NdTensor::from_data([n, d], keys.collect::<Vec<_>>()),
            )
        })
        .collect();
    let gemm = GemmExecutor::<u8, i8, i32>::default();
    let mut out = vec![0i32; b * h * m * n];
    let run = move || {
        for ((q, k), out) in heads.iter().zip(out.chunks_exact_mut(m * n)) {
            let (a, b) = (GemmInputA::Unpacked(q.view()), GemmInputB::Unpacked(k.transposed()));
            gemm.gemm(out, a, b, GemmOptions::default()).map_err(candle_core::Error::debug)?;
        }
        Ok(())
    };
    Ok(Contender { name: "rten-gemm u8i8 only", run: Box::new(run) })
}
