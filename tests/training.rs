//! Training through the int8 op: its gradients, and a block that learns with it.

mod common;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_int8_attention::reference::tensor_ops;
use candle_int8_attention::{AttentionCall, AttentionConfig, AttnMask, attention};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use common::randn;

type TestResult = Result<(), Box<dyn std::error::Error>>;

/// The gradient is recomputed in fp32 from the same inputs, so only the order of sums differs.
const TOLERANCE: f32 = 1e-5;

fn largest(x: &Tensor) -> candle_core::Result<f32> {
    Ok(common::largest(x) as f32)
}

/// Attention from Candle's operations alone: `bias` is added to the scaled scores `[B, H, M, N]`.
fn unfused(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    config: &AttentionConfig,
    bias: Option<&Tensor>,
) -> candle_core::Result<Tensor> {
    let (b, h, _, d) = q.dims4()?;
    let repeat = |x: &Tensor| {
        let (_, h_kv, n, d) = x.dims4()?;
        x.unsqueeze(2)?.broadcast_as((b, h_kv, h / h_kv, n, d))?.reshape((b, h, n, d))
    };
    let mut scores = (q.matmul(&repeat(k)?.t()?)? / (d as f64).sqrt())?;
    if let Some(cap) = config.spec.softcap.map(f64::from) {
        scores = ((scores / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = bias {
        scores = scores.broadcast_add(bias)?;
    }
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)
}

/// A bias of minus infinity where `hidden`, else 0: `[B, 1, M, N]`.
fn bias(
    (b, m, n): (usize, usize, usize),
    hidden: impl Fn(usize, usize, usize) -> bool,
) -> candle_core::Result<Tensor> {
    let at = |i: usize| (i / (m * n), i / n % m, i % n);
    let of = |(b, i, j)| if hidden(b, i, j) { f32::NEG_INFINITY } else { 0.0 };
    Tensor::from_vec((0..b * m * n).map(|i| of(at(i))).collect(), (b, 1, m, n), &Device::Cpu)
}

#[test]
fn gradients_are_those_of_candles_unfused_attention() -> TestResult {
    let (b, h, h_kv, m, n, d, dv) = (2, 4, 2, 6, 9, 8, 5);
    let vars = [vec![b, h, m, d], vec![b, h_kv, n, d], vec![b, h_kv, n, dv]]
        .map(|shape| Var::from_tensor(&randn(shape)).unwrap());
    let [q, k, v] = &vars;
    let weight = randn(&[b, h, m, dv]);

    let boolean: Vec<u8> = (0..b * n).map(|i| u8::from(i % 4 != 1)).collect();
    let additive = randn(&[1, h, m, n]);
    let slopes = vec![0.7f32, 0.2, 0.1, 0.0];
    let distance: Vec<f32> =
        (0..m * n).map(|i| -((i / n + n - m) as f32 - (i % n) as f32).abs()).collect();
    let alibi = Tensor::from_vec(distance, (1, 1, m, n), &Device::Cpu)?
        .broadcast_mul(&Tensor::new(slopes.as_slice(), &Device::Cpu)?.reshape((1, h, 1, 1))?)?;
    let int8 = AttentionConfig::int8;
    let cases: Vec<(&str, AttentionCall, AttentionConfig, Option<Tensor>)> = vec![
        ("none", AttnMask::None.into(), int8(), None),
        (
            "causal",
            AttnMask::causal_with_offset(3).into(),
            int8(),
            Some(bias((b, m, n), |_, i, j| j > i + 3)?),
        ),
        (
            "boolean",
            AttnMask::Mask(Tensor::from_vec(boolean.clone(), (b, 1, 1, n), &Device::Cpu)?).into(),
            int8(),
            Some(bias((b, m, n), |b, _, j| boolean[b * n + j] == 0)?),
        ),
        ("additive", AttnMask::Mask(additive.clone()).into(), int8(), Some(additive)),
        ("softcap", AttnMask::None.into(), int8().softcap(1.5), None),
        ("ALiBi", AttnMask::None.into(), int8().alibi_slopes(slopes), Some(alibi)),
        (
            "lengths and a window",
            AttentionCall::default().with_kv_lens(vec![9, 7]),
            int8().window(Some(4), None),
            Some(bias((b, m, n), |b, i, j| j + 4 < i + 3 || (b == 1 && j >= 7))?),
        ),
    ];
    for (name, call, config, bias) in cases {
        let expected = (unfused((q, k, v), &config, bias.as_ref())? * &weight)?.sum_all()?;
        let expected = expected.backward()?;
        for (path, out) in [
            ("fused", attention(q, k, v, &call, &config)?),
            ("tensor_ops", tensor_ops::attention(q, k, v, &call, &config)?),
        ] {
            let grads = (out * &weight)?.sum_all()?.backward()?;
            for (tensor, var) in ["q", "k", "v"].into_iter().zip(&vars) {
                let (found, expected) = (grads.get(var).unwrap(), expected.get(var).unwrap());
                let size = largest(expected)?;
                let error = largest(&(found - expected)?)?;
                // Softmax and values are differentiated where int8 put them on the second path.
                let bound = if path == "fused" { TOLERANCE } else { 0.05 };
                assert!(size > 0.1, "{name}: no gradient for {tensor}");
                assert!(error <= bound * size.max(1.0), "{name} {path} {tensor}: {error}, {size}");
            }
        }
    }
    Ok(())
}

/// A relative position bias, as in T5 and Swin: one number for each head and distance.
#[test]
fn a_learned_mask_gets_its_gradient() -> TestResult {
    let (b, h, m, d) = (2, 4, 6, 8);
    let [q, k, v] = [0; 3].map(|_| Var::from_tensor(&randn((b, h, m, d))).unwrap());
    let table = Var::from_tensor(&randn((h, 2 * m - 1)))?;
    let weight = randn((b, h, m, d));
    let distances: Vec<u32> = (0..m * m).map(|i| (m - 1 + i / m - i % m) as u32).collect();
    let distances = Tensor::new(distances, &Device::Cpu)?;
    let bias = || table.index_select(&distances, 1)?.reshape((1, h, m, m));
    let gradients = |out: Tensor| (out * &weight)?.sum_all()?.backward();
    let plain = AttentionConfig::fp32();
    let expected = gradients(unfused((&q, &k, &v), &plain, Some(&bias()?))?)?;
    for (name, config, bound) in
        [("fp32", plain, TOLERANCE), ("int8", AttentionConfig::int8(), 0.05)]
    {
        let found = gradients(attention(&q, &k, &v, AttnMask::Mask(bias()?), &config)?)?;
        for var in [&table, &q, &k, &v] {
            let found = found.get(var).unwrap_or_else(|| panic!("{name}: no gradient"));
            let expected = expected.get(var).unwrap();
            let size = largest(expected)?;
            assert!(size > 0.1, "{name}: {size}");
            let error = largest(&(found - expected)?)?;
            assert!(error <= bound * size.max(1.0), "{name}: {error}, {size}");
        }
    }
    Ok(())
}

#[test]
fn a_query_that_sees_nothing_has_no_gradient() -> TestResult {
    let q = Var::from_tensor(&randn(&[1, 2, 4, 8]))?;
    let keep = Tensor::new(&[[1u8, 1, 0, 1], [0; 4], [1; 4], [0, 0, 0, 1]], &Device::Cpu)?;
    let out = attention(&q, &q, &q, AttnMask::Mask(keep), &AttentionConfig::int8())?;
    let grads = out.sqr()?.sum_all()?.backward()?;
    let grad = grads.get(&q).unwrap().flatten_all()?.to_vec1::<f32>()?;
    assert!(grad.iter().all(|x| x.is_finite()), "{grad:?}");
    Ok(())
}

#[test]
fn half_precision_gradients_keep_their_dtype() -> TestResult {
    let half = |shape: &[usize]| Var::from_tensor(&randn(shape).to_dtype(DType::BF16)?);
    let (q, kv) = (half(&[1, 4, 5, 8])?, half(&[1, 2, 5, 8])?);
    let out = attention(&q, &kv, &kv, AttnMask::causal(), &AttentionConfig::int8())?;
    let grads = out.sum_all()?.backward()?;
    for var in [&q, &kv] {
        assert_eq!(grads.get(var).unwrap().dtype(), DType::BF16);
        assert_eq!(grads.get(var).unwrap().dims(), var.dims());
    }
    Ok(())
}

/// One block of a transformer: attention with a residual, then a head that names a class for each
/// token.
struct Block {
    projections: [Linear; 3],
    out: Linear,
    head: Linear,
    heads: usize,
    attention: AttentionConfig,
}

impl Block {
    fn new(vb: &VarBuilder, attention: AttentionConfig) -> candle_core::Result<Self> {
        let linear = |name: &str, out| candle_nn::linear(WIDTH, out, vb.pp(name));
        Ok(Self {
            projections: [linear("q", WIDTH)?, linear("k", WIDTH)?, linear("v", WIDTH)?],
            out: linear("out", WIDTH)?,
            head: linear("head", CLASSES)?,
            heads: 4,
            attention,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, candle_core::Error> {
        let (b, n, width) = x.dims3()?;
        let [q, k, v] = self.projections.each_ref().map(|projection| {
            projection.forward(x)?.reshape((b, n, self.heads, ()))?.transpose(1, 2)
        });
        let mixed = attention(&q?, &k?, &v?, AttnMask::causal(), &self.attention)?;
        let mixed = mixed.transpose(1, 2)?.reshape((b, n, width))?;
        self.head.forward(&(self.out.forward(&mixed)? + x)?)
    }
}

const WIDTH: usize = 32;
const CLASSES: usize = 4;
const TOKENS: usize = 24;

/// Each token is one of four; the class to name is the token two places before.
fn recall_task(batch: usize) -> candle_core::Result<(Tensor, Tensor)> {
    let embeddings = randn((CLASSES, WIDTH));
    let places = randn((TOKENS, WIDTH));
    let tokens: Vec<u32> = (0..batch * TOKENS).map(|i| (i * i / 7 + i / 3) as u32 % 4).collect();
    let before = |i: usize| if i % TOKENS < 2 { 0 } else { tokens[i - 2] };
    let classes: Vec<u32> = (0..tokens.len()).map(before).collect();
    let x = embeddings.embedding(&Tensor::new(tokens, &Device::Cpu)?)?;
    let x = x.reshape((batch, TOKENS, WIDTH))?.broadcast_add(&places)?;
    Ok((x, Tensor::new(classes, &Device::Cpu)?))
}

/// The loss of every step, from these weights.
fn train(
    weights: &VarMap,
    (x, classes): &(Tensor, Tensor),
    attention: AttentionConfig,
) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let copy = VarMap::new();
    for (name, var) in weights.data().lock().unwrap().iter() {
        copy.data().lock().unwrap().insert(name.clone(), Var::from_tensor(&var.copy()?)?);
    }
    let vb = VarBuilder::from_varmap(&copy, DType::F32, &Device::Cpu);
    let block = Block::new(&vb, attention)?;
    let mut optimizer =
        AdamW::new(copy.all_vars(), ParamsAdamW { lr: 0.01, ..ParamsAdamW::default() })?;
    let mut losses = Vec::new();
    for _ in 0..80 {
        let logits = block.forward(x)?.flatten_to(1)?;
        let loss = candle_nn::loss::cross_entropy(&logits, classes)?;
        optimizer.backward_step(&loss)?;
        losses.push(loss.to_scalar()?);
    }
    Ok(losses)
}

#[test]
fn a_block_learns_through_int8_as_through_fp32() -> TestResult {
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
    Block::new(&vb, AttentionConfig::fp32())?;
    let task = recall_task(4)?;
    let fp32 = train(&weights, &task, AttentionConfig::fp32())?;
    let int8 = train(&weights, &task, AttentionConfig::int8())?;
    let (start, end) = (fp32[0], fp32[79]);
    assert!(end < 0.3 * start, "fp32 does not learn: {start} to {end}");
    for (step, (int8, fp32)) in int8.iter().zip(&fp32).enumerate() {
        let difference = (int8 - fp32).abs();
        assert!(difference < 0.1 * start, "step {step}: int8 {int8}, fp32 {fp32}");
    }
    println!("loss {start:.4}, after 80 steps fp32 {end:.4}, int8 {:.4}", int8[79]);
    Ok(())
}
