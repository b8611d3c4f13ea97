//! What takes part: this crate and its peers, each as a closure over the same tensors.

use crate::args::{Args, What};
use crate::fresh;
use crate::shape::Shape;
use candle_core::{D, DType, Device, Error, Result, Tensor};
use candle_int8_attention::quant::{Granularity, Scheme};
use candle_int8_attention::{
    AttentionConfig, AttnMask, ScoreConfig, attention as int8_attention, attention_scores,
};
use candle_nn::attention::flash_attn;
use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions};
use rten_tensor::NdTensor;
use rten_tensor::prelude::*;

/// Who keeps all scores in memory does not run where they take more bytes.
const LARGEST_SCORES: usize = 2_000_000_000;

/// One way to compute.
pub struct Contender {
    /// For programs.
    pub id: &'static str,
    /// For people.
    pub name: &'static str,
    run: Box<dyn FnMut() -> Result<Option<Tensor>>>,
}

impl Contender {
    /// A contender that returns its result.
    pub fn new(
        id: &'static str,
        name: &'static str,
        mut run: impl FnMut() -> Result<Tensor> + 'static,
    ) -> Self {
        Self { id, name, run: Box::new(move || run().map(Some)) }
    }

    /// Computes once. Freeing the result is part of it.
    pub fn call(&mut self) -> Result<()> {
        (self.run)().map(drop)
    }

    /// The result of one call; `None` where the contender keeps it to itself.
    pub fn output(&mut self) -> Result<Option<Tensor>> {
        (self.run)()
    }
}

/// Queries, keys and values.
#[derive(Clone)]
pub struct Inputs {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Inputs {
    /// From the standard normal distribution.
    pub fn random(shape: Shape, dtype: DType) -> Result<Self> {
        let tensor = || Tensor::randn(0f32, 1., &shape.0, &Device::Cpu)?.to_dtype(dtype);
        Ok(Self { q: tensor()?, k: tensor()?, v: tensor()? })
    }

    /// This crate's attention.
    pub fn attend(&self, config: &AttentionConfig) -> Result<Tensor> {
        Ok(int8_attention(&self.q, &self.k, &self.v, &AttnMask::None, config)?)
    }

    fn scale(&self) -> Result<f64> {
        Ok(1.0 / (self.q.dim(D::Minus1)? as f64).sqrt())
    }

    fn check_scores(&self) -> Result<()> {
        let (b, h, m, _) = self.q.dims4()?;
        let bytes = b * h * m * self.k.dim(2)? * self.q.dtype().size_in_bytes();
        if bytes > LARGEST_SCORES {
            let gb = |bytes: usize| bytes as f64 / 1e9;
            let (all, most) = (gb(bytes), gb(LARGEST_SCORES));
            // Not `bail!`: its backtrace is for errors that nobody foresees.
            return Err(Error::Msg(format!("all scores take {all:.1} GB, more than {most} GB")));
        }
        Ok(())
    }
}

/// Everyone who computes `what`; the first is this crate.
pub fn all(what: What, inputs: &Inputs, args: &Args) -> Result<Vec<Contender>> {
    match what {
        What::Scores => {
            inputs.check_scores()?;
            // What others quantize, beside what this crate does.
            let plain = ScoreConfig::plain(Scheme::Affine, Granularity::PerTensor);
            let ours = our_scores("ours", "this crate", inputs, ScoreConfig::default());
            let plain = our_scores("ours-plain", "this crate, one scale a tensor", inputs, plain);
            Ok(vec![ours, plain, fresh::writing(inputs)?, candle_scores(inputs), rten(inputs)?])
        }
        What::Attention => {
            let ours = our_attention("ours", "this crate", inputs, args.attention());
            // int8 is always seen beside the best fp32 of this crate.
            let fp32 = AttentionConfig::fp32();
            let fp32 = our_attention("ours-fp32", "this crate in fp32", inputs, fp32);
            Ok(vec![ours, fp32, candle_unfused(inputs), candle_flash(inputs)?])
        }
    }
}

fn our_scores(
    id: &'static str,
    name: &'static str,
    inputs: &Inputs,
    config: ScoreConfig,
) -> Contender {
    let Inputs { q, k, .. } = inputs.clone();
    Contender::new(id, name, move || Ok(attention_scores(&q, &k, &config)?))
}

fn candle_scores(inputs: &Inputs) -> Contender {
    let Inputs { q, k, .. } = inputs.clone();
    Contender::new("candle", "Candle matmul", move || q.matmul(&k.t()?))
}

fn our_attention(
    id: &'static str,
    name: &'static str,
    inputs: &Inputs,
    config: AttentionConfig,
) -> Contender {
    let inputs = inputs.clone();
    Contender::new(id, name, move || inputs.attend(&config))
}

fn candle_unfused(inputs: &Inputs) -> Contender {
    let inputs = inputs.clone();
    Contender::new("candle", "Candle unfused", move || {
        inputs.check_scores()?;
        let scores = (inputs.q.matmul(&inputs.k.t()?)? * inputs.scale()?)?;
        candle_nn::ops::softmax_last_dim(&scores)?.matmul(&inputs.v)
    })
}

/// Its inputs are `[B, N, H, D]`: they are transposed before, which is not timed.
fn candle_flash(inputs: &Inputs) -> Result<Contender> {
    let bshd = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let (q, k, v) = (bshd(&inputs.q)?, bshd(&inputs.k)?, bshd(&inputs.v)?);
    let scale = inputs.scale()? as f32;
    Ok(Contender::new("candle-flash", "Candle flash_attn", move || match q.dtype() {
        DType::F16 => flash_attn::<half::f16>(&q, &k, &v, scale, AttnMask::None, None, None),
        DType::BF16 => flash_attn::<half::bf16>(&q, &k, &v, scale, AttnMask::None, None, None),
        _ => flash_attn::<f32>(&q, &k, &v, scale, AttnMask::None, None, None),
    }))
}

/// rten-gemm's u8 x i8 product alone: its operands are quantized and its keys transposed before,
/// its output is written again and again, and nothing is dequantized.
fn rten(inputs: &Inputs) -> Result<Contender> {
    let (b, h, m, d) = inputs.q.dims4()?;
    let n = inputs.k.dim(2)?;
    let codes = |x: &Tensor| -> Result<Vec<f32>> {
        ((x.to_dtype(DType::F32)? * 30.0)?.clamp(-127f32, 127f32))?.flatten_all()?.to_vec1()
    };
    let (q, k) = (codes(&inputs.q)?, codes(&inputs.k)?);
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
            gemm.gemm(out, a, b, GemmOptions::default()).map_err(Error::debug)?;
        }
        Ok(None)
    };
    Ok(Contender { id: "rten", name: "rten-gemm, product alone", run: Box::new(run) })
}
