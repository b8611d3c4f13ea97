//! `flash_attn` and `flash_attn_varlen_cpu` beside Candle's functions of the same names.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_int8_attention::{
    AttentionConfig, AttnMask, attention, flash_attn, flash_attn_varlen_cpu,
};
use candle_nn::attention as candle;
use common::{largest_difference, randn};
use half::{bf16, f16};

/// What int8 scores may change on N(0, 1) data: one element, and the root mean square of all.
const LARGEST: f32 = 0.08;
const RMS: f32 = 0.01;

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
}

fn errors(found: &Tensor, expected: &Tensor) -> (f32, f32) {
    let largest = largest_difference(found, expected) as f32;
    let (found, expected) = (values(found), values(expected));
    let squares: f32 = found.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
    (largest, (squares / found.len().max(1) as f32).sqrt())
}

fn check(found: &Tensor, expected: &Tensor, case: &str) {
    assert_eq!(found.dims(), expected.dims(), "{case}");
    assert_eq!(found.dtype(), expected.dtype(), "{case}");
    let (largest, rms) = errors(found, expected);
    assert!(largest < LARGEST && rms < RMS, "{case}: largest {largest}, rms {rms}");
}

type FlashFunction =
    fn(&Tensor, &Tensor, &Tensor, f32, AttnMask, Option<f32>, Option<f32>) -> Result<Tensor>;

/// One of the two functions, for the dtype of the queries.
macro_rules! flash {
    ($($function:ident)::+, $call:expr) => {{
        let Call { q, k, v, scale, mask, bias, cap } = $call.clone();
        let function: FlashFunction = match q.dtype() {
            DType::F16 => $($function)::+::<f16>,
            DType::BF16 => $($function)::+::<bf16>,
            DType::F64 => $($function)::+::<f64>,
            _ => $($function)::+::<f32>,
        };
        function(&q, &k, &v, scale, mask, bias, cap)
    }};
}

/// The arguments of `flash_attn`.
#[derive(Clone)]
struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f32,
    mask: AttnMask,
    bias: Option<f32>,
    cap: Option<f32>,
}

impl Call {
    /// Queries `(B, S, H, D)`, keys `(B, N, H_k, D)`, values `(B, N, H_v, D)`.
    fn new(b: usize, (s, n): (usize, usize), (h, h_k, h_v): (usize, usize, usize)) -> Self {
        let (q, k, v) = (randn(&[b, s, h, 32]), randn(&[b, n, h_k, 32]), randn(&[b, n, h_v, 32]));
        Self { q, k, v, scale: 0.15, mask: AttnMask::None, bias: None, cap: None }
    }

    fn dtype(&self, dtype: DType) -> Self {
        let to = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let mask = match &self.mask {
            AttnMask::Mask(mask) => AttnMask::Mask(to(mask)),
            other => other.clone(),
        };
        Self { q: to(&self.q), k: to(&self.k), v: to(&self.v), mask, ..self.clone() }
    }

    fn check(&self, case: &str) {
        let expected = flash!(candle::flash_attn, self).unwrap();
        check(&flash!(flash_attn, self).unwrap(), &expected, case);
    }
}

const HEADS: [(usize, usize, usize); 4] = [(4, 4, 4), (6, 2, 2), (12, 3, 3), (8, 4, 2)];

#[test]
fn one_sequence_as_in_candle() {
    for heads in HEADS {
        for (s, n) in [(1, 1), (1, 70), (7, 7), (33, 90), (90, 33)] {
            let base = Call::new(1, (s, n), heads);
            let offset = n.saturating_sub(s);
            let additive = randn(&[s, n]);
            let hidden: Vec<f32> =
                (0..s * n).map(|i| if i % 3 == 1 { f32::NEG_INFINITY } else { 0.5 }).collect();
            let hidden = Tensor::from_vec(hidden, (1, 1, s, n), &Device::Cpu).unwrap();
            for mask in [
                AttnMask::None,
                AttnMask::causal(),
                AttnMask::causal_with_offset(offset),
                AttnMask::causal_with_offset(offset + 3),
                AttnMask::Mask(additive.clone()),
                AttnMask::Mask(additive.unsqueeze(0).unwrap()),
                AttnMask::Mask(hidden),
            ] {
                for (bias, cap) in [
                    (None, None),
                    (Some(8.0), None),
                    (Some(0.0), Some(0.0)),
                    (Some(4.0), Some(2.0)),
                    (None, Some(-1.5)),
                ] {
                    let odd = s == 1 && mask.is_causal() && bias.is_none() && cap.is_some();
                    if odd {
                        continue; // `a_single_query_with_softcap_has_no_bias_of_its_own`
                    }
                    let call = Call { mask: mask.clone(), bias, cap, ..base.clone() };
                    call.check(&format!("{heads:?} {s} {n} {mask:?} {bias:?} {cap:?}"));
                }
            }
        }
    }
}

#[test]
fn one_sequence_of_every_dtype() {
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        for s in [1, 20] {
            let base = Call::new(1, (s, 50), (6, 3, 3));
            let mask = AttnMask::Mask(randn(&[s, 50]));
            for mask in [AttnMask::None, AttnMask::causal_with_offset(50 - s), mask] {
                let call = Call { mask: mask.clone(), bias: Some(6.0), ..base.clone() };
                call.dtype(dtype).check(&format!("{dtype:?} {s} {mask:?}"));
            }
        }
    }
}

#[test]
fn batches_as_in_candle() {
    // Candle's batches have as many heads of values as of keys.
    for heads in HEADS.map(|(h, h_k, _)| (h, h_k, h_k)) {
        for (s, n) in [(1, 40), (20, 20), (20, 65), (65, 20)] {
            for dtype in [DType::F32, DType::F16] {
                let base = Call::new(3, (s, n), heads).dtype(dtype);
                for mask in [AttnMask::None, AttnMask::causal(), AttnMask::causal_with_offset(2)] {
                    if mask.is_causal() && s > n {
                        continue; // refused there
                    }
                    for bias in [None, Some(8.0)] {
                        let call = Call { mask: mask.clone(), bias, ..base.clone() };
                        call.check(&format!("{heads:?} {s} {n} {dtype:?} {mask:?} {bias:?}"));
                    }
                }
            }
        }
    }
}

/// Both functions on views with the memory order `[B, H, S, D]`.
#[test]
fn transposed_views_are_read_as_they_lie() -> Result<()> {
    let call = Call::new(1, (20, 50), (4, 2, 2));
    let contiguous = flash!(flash_attn, call)?;
    let strided = |x: &Tensor| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    let (q, k, v) = (strided(&call.q)?, strided(&call.k)?, strided(&call.v)?);
    assert!(!q.is_contiguous());
    let call = Call { q, k, v, ..call };
    call.check("views");
    assert_eq!(values(&flash!(flash_attn, call)?), values(&contiguous));
    Ok(())
}

/// One sequence of a batch at a time through Candle.
fn one_by_one(call: &Call) -> Result<Tensor> {
    let b = call.q.dim(0)?;
    let outputs = (0..b).map(|i| {
        let of = |x: &Tensor| x.narrow(0, i, 1);
        let mask = match &call.mask {
            AttnMask::Mask(mask) => AttnMask::Mask(of(mask)?),
            other => other.clone(),
        };
        let (q, k, v) = (of(&call.q)?, of(&call.k)?, of(&call.v)?);
        flash!(candle::flash_attn, Call { q, k, v, mask, ..call.clone() })
    });
    Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)
}

#[test]
fn batches_that_candle_refuses() -> Result<()> {
    let (b, s, n) = (3, 20, 65);
    let base = Call::new(b, (s, n), (6, 2, 2));
    let mask = AttnMask::Mask(randn(&[b, 1, s, n]));
    let causal = AttnMask::causal_with_offset(n - s);
    for (mask, bias, cap, dtype) in [
        (mask.clone(), None, None, DType::F32),
        (mask.clone(), Some(8.0), None, DType::F32),
        (mask, None, Some(1.5), DType::F32),
        (AttnMask::None, None, Some(1.5), DType::F32),
        (causal.clone(), Some(8.0), Some(1.5), DType::F32),
        (causal, None, None, DType::BF16),
    ] {
        let case = format!("{mask:?} {bias:?} {cap:?} {dtype:?}");
        let call = Call { mask, bias, cap, ..base.clone() }.dtype(dtype);
        let refused = flash!(candle::flash_attn, call).unwrap_err().to_string();
        assert!(refused.contains("B>1 requires"), "{refused}");
        let expected = one_by_one(&call)?.to_dtype(dtype)?;
        check(&flash!(flash_attn, call)?, &expected, &case);
    }
    Ok(())
}

#[test]
fn masks_that_candle_refuses_or_misreads() -> Result<()> {
    let (b, s, n, h) = (2, 9, 40, 4);
    let base = Call::new(b, (s, n), (h, 2, 2));
    // Padding, as models have it: boolean, one row for each sequence.
    let keep: Vec<u8> = (0..b * n).map(|i| u8::from(i < 60)).collect();
    let padding = Tensor::from_vec(keep, (b, 1, 1, n), &Device::Cpu)?;
    let call = Call { mask: AttnMask::Mask(padding), ..base.clone() };
    let out = flash!(flash_attn, call)?;
    for (i, len) in [40, 20].into_iter().enumerate() {
        let of = |x: &Tensor, len| x.narrow(0, i, 1)?.narrow(1, 0, len)?.contiguous();
        let (q, k, v) = (of(&call.q, s)?, of(&call.k, len)?, of(&call.v, len)?);
        let call = Call { q, k, v, mask: AttnMask::None, ..call.clone() };
        check(&out.narrow(0, i, 1)?, &flash!(candle::flash_attn, call)?, "padding");
    }
    // A mask for each head.
    let per_head = randn(&[1, h, s, n]);
    let call = Call { mask: AttnMask::Mask(per_head.clone()), ..Call::new(1, (s, n), (h, h, h)) };
    let out = flash!(flash_attn, call)?;
    for head in 0..h {
        let of = |x: &Tensor| x.narrow(2, head, 1)?.contiguous();
        let mask = AttnMask::Mask(per_head.narrow(1, head, 1)?.contiguous()?);
        let (q, k, v) = (of(&call.q)?, of(&call.k)?, of(&call.v)?);
        let expected = flash!(candle::flash_attn, Call { q, k, v, mask, ..call.clone() })?;
        check(&out.narrow(1, head, 1)?, &expected, "a head of its own");
    }
    Ok(())
}

/// Candle's f32 path for one causal query with softcap adds `j - (N - 1)` to the scores, as if
/// there were ALiBi with slope 1; its f16 path and its path for masks do not.
#[test]
fn a_single_query_with_softcap_has_no_bias_of_its_own() -> Result<()> {
    let call =
        Call { mask: AttnMask::causal(), cap: Some(1.5), ..Call::new(1, (1, 50), (4, 2, 2)) };
    let ours = flash!(flash_attn, call)?;
    let in_f16 = flash!(candle::flash_attn, call.dtype(DType::F16))?;
    check(&ours, &in_f16, "f16");
    let unmasked = Call {
        mask: AttnMask::Mask(Tensor::zeros((1, 50), DType::F32, &Device::Cpu)?),
        ..call.clone()
    };
    check(&ours, &flash!(candle::flash_attn, unmasked)?, "mask of zeros");
    let (largest, _) = errors(&ours, &flash!(candle::flash_attn, call)?);
    assert!(largest > 0.5, "Candle has changed: {largest}; the docs of flash_attn name this");
    Ok(())
}

#[test]
fn arguments_that_do_not_fit_are_named() -> Result<()> {
    let call = Call::new(2, (5, 8), (4, 2, 2));
    let message = |call: Call| flash!(flash_attn, call).unwrap_err().to_string();
    let text = message(Call { q: call.q.flatten(0, 1)?, ..call.clone() });
    assert!(text.contains("q has shape [10, 4, 32]") && text.contains("(B, S, H, D)"), "{text}");
    let text = message(Call { v: randn(&[2, 8, 3, 32]), ..call.clone() });
    assert!(text.contains("[2, 3, 8, 32]") && text.contains("heads"), "{text}");
    let text = message(Call { k: randn(&[2, 9, 2, 32]), ..call.clone() });
    assert!(text.contains("v has shape [2, 2, 8, 32], expected [2, 2, 9, Dv]"), "{text}");
    let boolean = Tensor::ones((5, 8), DType::U8, &Device::Cpu)?;
    let text = message(Call { mask: AttnMask::Mask(boolean), bias: Some(8.0), ..call.clone() });
    assert!(text.contains("max_bias with a mask of dtype U8"), "{text}");
    let text = message(Call { mask: AttnMask::Mask(randn(&[6, 8])), ..call.clone() });
    assert!(text.contains("[6, 8]") && text.contains("[2, 4, 5, 8]"), "{text}");
    let text = message(Call { scale: f32::INFINITY, ..call });
    assert!(text.contains("softmax scale inf"), "{text}");
    Ok(())
}

// ---- sequences of different lengths -------------------------------------------------------------

/// The arguments of `flash_attn_varlen_cpu`.
#[derive(Clone)]
struct Varlen {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Option<Tensor>,
    lens: [Vec<u32>; 2],
    causal: bool,
    window: [Option<usize>; 2],
}

type VarlenFunction = fn(
    &Tensor,
    &Tensor,
    &Tensor,
    Option<&Tensor>,
    &Tensor,
    &Tensor,
    usize,
    usize,
    f32,
    bool,
    Option<usize>,
    Option<usize>,
) -> Result<Tensor>;

impl Varlen {
    fn new(lens_q: &[u32], lens_k: &[u32], (h, h_k, h_v): (usize, usize, usize)) -> Self {
        let total = |lens: &[u32]| lens.iter().sum::<u32>() as usize;
        Self {
            q: randn(&[total(lens_q), h, 32]),
            k: randn(&[total(lens_k), h_k, 32]),
            v: randn(&[total(lens_k), h_v, 32]),
            slopes: None,
            lens: [lens_q.to_vec(), lens_k.to_vec()],
            causal: false,
            window: [None; 2],
        }
    }

    fn call(&self, function: VarlenFunction) -> Result<Tensor> {
        let lens = |lens: &Vec<u32>| Tensor::from_slice(lens, lens.len(), &Device::Cpu);
        let [lens_q, lens_k] = [lens(&self.lens[0])?, lens(&self.lens[1])?];
        let largest = |lens: &Vec<u32>| lens.iter().max().copied().unwrap_or(0) as usize;
        function(
            &self.q,
            &self.k,
            &self.v,
            self.slopes.as_ref(),
            &lens_q,
            &lens_k,
            largest(&self.lens[0]),
            largest(&self.lens[1]),
            0.15,
            self.causal,
            self.window[0],
            self.window[1],
        )
    }

    fn check(&self, case: &str) {
        let expected = self.call(candle::flash_attn_varlen_cpu).unwrap();
        check(&self.call(flash_attn_varlen_cpu).unwrap(), &expected, case);
    }
}

#[test]
fn packed_sequences_as_in_candle() -> Result<()> {
    for heads in HEADS {
        for (lens_q, lens_k) in [
            (vec![7], vec![7]),
            (vec![1, 30, 5], vec![40, 30, 5]),
            (vec![0, 9, 0, 3, 0], vec![4, 9, 0, 70, 0]),
        ] {
            let base = Varlen::new(&lens_q, &lens_k, heads);
            let slopes: Vec<f32> = (0..heads.0).map(|h| 0.5 / (h + 1) as f32).collect();
            for slopes in [None, Some(Tensor::from_vec(slopes, heads.0, &Device::Cpu)?)] {
                for causal in [false, true] {
                    for window in
                        [[None, None], [Some(3), None], [Some(3), Some(2)], [Some(0), Some(0)]]
                    {
                        let slopes = slopes.clone();
                        let case = format!("{heads:?} {lens_q:?} {causal} {window:?}");
                        Varlen { slopes, causal, window, ..base.clone() }.check(&case);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn packed_sequences_of_other_lengths_and_in_f16() -> Result<()> {
    // Fewer keys than queries, or none, which Candle allows without a causal mask.
    let call = Varlen::new(&[9, 4, 5], &[2, 0, 7], (4, 2, 2));
    call.check("f32");
    let half = |x: &Tensor| x.to_dtype(DType::F16);
    let (q, k, v) = (half(&call.q)?, half(&call.k)?, half(&call.v)?);
    Varlen { q, k, v, ..call.clone() }.check("f16");
    Varlen { window: [Some(1), Some(1)], ..call.clone() }.check("window");

    // With a causal mask the first queries see nothing.
    let causal = Varlen { causal: true, ..call };
    assert!(causal.call(candle::flash_attn_varlen_cpu).is_err());
    let out = causal.call(flash_attn_varlen_cpu)?;
    let seen = |i: usize| values(&out.get(i).unwrap()).iter().any(|&x| x != 0.0);
    let expected: Vec<bool> = (0..18).map(|i| matches!(i, 7..9 | 13..18)).collect();
    assert_eq!((0..18).map(seen).collect::<Vec<_>>(), expected);
    Ok(())
}

#[test]
fn packed_sequences_beyond_candle() -> Result<()> {
    // A window to the right alone, bf16 values of another dim.
    let (lens_q, lens_k) = ([5, 12], [8, 12]);
    let call = Varlen::new(&lens_q, &lens_k, (4, 2, 2));
    let v = randn(&[20, 2, 20]).to_dtype(DType::BF16)?;
    let call = Varlen { v, window: [None, Some(1)], ..call };
    let out = call.call(flash_attn_varlen_cpu)?;
    assert_eq!(out.dims(), [17, 4, 20]);
    let config = AttentionConfig::fp32().softmax_scale(0.15).window(None, Some(1));
    let (mut q_start, mut k_start) = (0, 0);
    for (m, n) in [(5, 8), (12, 12)] {
        let of = |x: &Tensor, start, len| x.narrow(0, start, len)?.transpose(0, 1)?.unsqueeze(0);
        let (k, v) = (of(&call.k, k_start, n)?, of(&call.v, k_start, n)?);
        let expected = attention(&of(&call.q, q_start, m)?, &k, &v, &AttnMask::None, &config)?;
        check(&of(&out, q_start, m)?, &expected, "beyond");
        (q_start, k_start) = (q_start + m, k_start + n);
    }
    // No sequence at all.
    let nothing = Varlen::new(&[], &[], (4, 2, 2)).call(flash_attn_varlen_cpu)?;
    assert_eq!(nothing.dims(), [0, 4, 32]);
    Ok(())
}

#[test]
fn packed_arguments_that_do_not_fit_are_named() -> Result<()> {
    let call = Varlen::new(&[5, 3], &[5, 3], (4, 2, 2));
    let message = |call: Varlen| call.call(flash_attn_varlen_cpu).unwrap_err().to_string();
    let text = message(Varlen { lens: [vec![5, 4], vec![5, 3]], ..call.clone() });
    assert!(text.contains("q has shape [8, 4, 32]") && text.contains("sums up to 9"), "{text}");
    let text = message(Varlen { lens: [vec![5, 3], vec![8]], ..call.clone() });
    assert!(text.contains("seqlens_k has shape [1], expected [2]"), "{text}");
    let text = message(Varlen { v: randn(&[7, 2, 32]), ..call.clone() });
    assert!(text.contains("v has shape [7, 2, 32]"), "{text}");
    let text = message(Varlen { q: randn(&[8, 128]), ..call.clone() });
    assert!(text.contains("[8, 128], expected [total, H, D]"), "{text}");
    let text = message(Varlen { slopes: Some(randn(&[3])), ..call });
    assert!(text.contains("3 ALiBi slopes for 4 heads"), "{text}");
    Ok(())
}
