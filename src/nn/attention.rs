//! Attention in f32 as an encoder asks for it: as many key heads as query heads, and a mask that
//! hides whole keys, if any.
//!
//! The keys of a head are a linear layer to scores and its values one back from probabilities, so
//! it is the product of the other layers, twice:
//!
//! ```text
//! once a head:      keys * scale -> weights [N, D]      values -> weights [Dv, N]
//! for 48 queries:   scores = q·keys^T  ->  softmax  ->  probabilities·values
//! ```
//!
//! Keys that are masked are left out before anything is computed, and cost nothing.

use super::packed::PackedWeights;
use super::product::multiply_rows;
use super::rows::Rows;
use super::softmax::softmax;
use super::tasks::BLOCK;
use super::{is_plain_f32, vectors};
use crate::Result;
use crate::gemm::SERIAL_BELOW;
use crate::uninit::{overwrite, written};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};
use candle_nn::attention::AttnMask;
use pulp::Arch;
use rayon::prelude::*;
use std::f32::consts::LOG2_E;
use std::mem::MaybeUninit;

/// `softmax(q·k^T / sqrt(D))·v` for `q` `[B, H, M, D]`, `k` `[B, H, N, D]`, `v` `[B, H, N, Dv]`
/// with any strides, and a boolean `mask` `[B, 1, 1, N]` or none. A query that sees no key gives
/// zeros.
///
/// `None` if this is not what it is given; the caller has another way then.
pub(crate) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &AttnMask,
) -> Result<Option<Tensor>> {
    let (Some(arch), true) = (vectors(), is_plain_f32(&[q, k, v])) else { return Ok(None) };
    let (&[b, h, _, d], &[b_k, h_k, n, d_k], &[b_v, h_v, n_v, _]) = (q.dims(), k.dims(), v.dims())
    else {
        return Ok(None);
    };
    if (b, h, d) != (b_k, h_k, d_k) || (b, h, n) != (b_v, h_v, n_v) {
        return Ok(None);
    }
    let visible = match mask {
        AttnMask::None => vec![(0..n).collect(); b],
        AttnMask::Mask(mask) if mask.dims() == [b, 1, 1, n] && mask.dtype() == DType::U8 => {
            let keep = |row: Vec<u8>| (0..n).filter(|&key| row[key] != 0).collect();
            mask.reshape((b, n))?.to_vec2()?.into_iter().map(keep).collect()
        }
        _ => return Ok(None),
    };
    Ok(Some(q.apply_op3_no_bwd(k, v, &Attention { arch, visible })?))
}

struct Attention {
    arch: Arch,
    /// The keys that are not masked, of each sequence of the batch.
    visible: Vec<Vec<usize>>,
}

/// Keys and values of a head.
struct Head {
    keys: PackedWeights,
    values: PackedWeights,
}

/// A head, the first of its queries, and where their output goes.
type Block<'a> = (usize, (usize, &'a mut [MaybeUninit<f32>]));

/// Buffers of one worker.
#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
}

impl Attention {
    /// Packs a head, counted over the batch.
    fn pack(&self, index: usize, k: &Rows<'_>, v: &Rows<'_>) -> Head {
        let [_, heads, _, _] = k.dims();
        let visible = &self.visible[index / heads];
        // Whole vectors of scores, the last ones minus infinity.
        let padded = visible.len().next_multiple_of(PackedWeights::lanes(self.arch));
        let mut bias = vec![0f32; padded];
        bias[visible.len()..].fill(f32::NEG_INFINITY);
        let mut buffer = Vec::new();
        let (k, v) = (k.matrix(index), v.matrix(index));
        let (depth, value_dim) = (k.width(), v.width());
        let scale = LOG2_E / (depth.max(1) as f32).sqrt();
        let rows = k.read(0..k.count(), &mut buffer);
        let keys = PackedWeights::pack(self.arch, &bias, depth, |key, i| {
            visible.get(key).map_or(0.0, |key| rows[key * depth + i] * scale)
        });
        let rows = v.read(0..v.count(), &mut buffer);
        let values =
            PackedWeights::pack(self.arch, &vec![0.0; value_dim], padded, |channel, key| {
                visible.get(key).map_or(0.0, |key| rows[key * value_dim + channel])
            });
        Head { keys, values }
    }

    fn run(&self, q: &Rows<'_>, k: &Rows<'_>, v: &Rows<'_>, out: &mut [MaybeUninit<f32>]) {
        let ([b, h, m, d], [_, _, n, value_dim]) = (q.dims(), v.dims());
        if out.is_empty() {
            return;
        }
        let blocks = out.chunks_mut(m * value_dim).enumerate().flat_map(|(head, out)| {
            let starts = (0..m).step_by(BLOCK);
            starts.zip(out.chunks_mut(BLOCK * value_dim)).map(move |block| (head, block))
        });
        let attend = |heads: &[Head], scratch: &mut Scratch, (head, (start, out)): Block<'_>| {
            let matrix = q.matrix(head);
            let rows = matrix.read(start..(start + BLOCK).min(m), &mut scratch.queries);
            self.attend(&heads[head], rows, &mut scratch.scores, out);
        };
        let work = [b, h, m, n].iter().product::<usize>().saturating_mul(d + value_dim);
        if work < SERIAL_BELOW {
            let heads: Vec<Head> = (0..b * h).map(|head| self.pack(head, k, v)).collect();
            let mut scratch = Scratch::default();
            blocks.for_each(|block| attend(&heads, &mut scratch, block));
        } else {
            let heads: Vec<Head> =
                (0..b * h).into_par_iter().map(|head| self.pack(head, k, v)).collect();
            let blocks: Vec<Block<'_>> = blocks.collect();
            let attend = |scratch: &mut Scratch, block| attend(&heads, scratch, block);
            blocks.into_par_iter().for_each_init(Scratch::default, attend);
        }
    }

    /// Writes the output of some queries of a head.
    fn attend(
        &self,
        head: &Head,
        queries: &[f32],
        scores: &mut Vec<f32>,
        out: &mut [MaybeUninit<f32>],
    ) {
        let (rows, width) = (out.len() / head.values.outputs(), head.keys.outputs());
        scores.resize(rows * width, 0.0);
        // SAFETY: `multiply_rows` writes numbers.
        multiply_rows(queries, &head.keys, unsafe { overwrite(scores) });
        softmax(self.arch, scores, width);
        multiply_rows(scores, &head.values, out);
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "fp32-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (q, k, v) = (Rows::new(q, q_layout)?, Rows::new(k, k_layout)?, Rows::new(v, v_layout)?);
        let [b, h, m, _] = q.dims();
        let shape = [b, h, m, v.dims()[3]];
        let len = shape.iter().product();
        // SAFETY: every block of every head is written.
        let out = unsafe { written(len, |out| self.run(&q, &k, &v, out)) };
        Ok((CpuStorage::F32(out), Shape::from(shape.to_vec())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::all_vectors;
    use crate::testing::{largest_difference, randn};
    use candle_core::{Device, Var};

    const CPU: Device = Device::Cpu;

    fn to_f64(x: &Tensor) -> Tensor {
        x.to_dtype(DType::F64).unwrap().contiguous().unwrap()
    }

    /// In f64, over the keys `visible` alone.
    fn exact(q: &Tensor, k: &Tensor, v: &Tensor, visible: &[u32]) -> Tensor {
        let visible = Tensor::new(visible, &CPU).unwrap();
        let (k, v) = (k.index_select(&visible, 2).unwrap(), v.index_select(&visible, 2).unwrap());
        let scale = 1.0 / (q.dim(3).unwrap() as f64).sqrt();
        let scores = to_f64(q).matmul(&to_f64(&k).t().unwrap()).unwrap();
        let probs = candle_nn::ops::softmax(&(scores * scale).unwrap(), 3).unwrap();
        probs.matmul(&to_f64(&v)).unwrap()
    }

    fn run(op: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        q.apply_op3_no_bwd(k, v, op).unwrap()
    }

    #[test]
    fn every_shape_against_f64() {
        for arch in all_vectors() {
            for (m, n) in [(1, 1), (1, 70), (5, 15), (6, 16), (7, 17), (47, 32), (49, 33), (97, 65)]
            {
                for (d, value_dim) in [(1, 1), (32, 32), (7, 33), (64, 80)] {
                    let (q, k) = (randn(&[2, 3, m, d]), randn(&[2, 3, n, d]));
                    let v = randn(&[2, 3, n, value_dim]);
                    let op = Attention { arch, visible: vec![(0..n).collect(); 2] };
                    let all: Vec<u32> = (0..n as u32).collect();
                    let off = largest_difference(&run(&op, &q, &k, &v), &exact(&q, &k, &v, &all));
                    assert!(off < 1e-5, "{arch:?} {m} {n} {d} {value_dim}: {off}");
                }
            }
        }
    }

    #[test]
    fn masked_keys_are_not_there_and_do_not_leak() {
        let (q, k, v) = (randn(&[2, 2, 9, 8]), randn(&[2, 2, 21, 8]), randn(&[2, 2, 21, 8]));
        let keep = |key: u32| u8::from(key % 3 != 1);
        let mask: Vec<u8> = (0..21).map(keep).chain([0; 21]).collect();
        let visible: Vec<u32> = (0..21).filter(|&key| keep(key) != 0).collect();
        let mask = AttnMask::Mask(Tensor::from_vec(mask, (2, 1, 1, 21), &CPU).unwrap());
        // The first sequence sees a part, the second nothing; what is unseen is NaN.
        let first = |x: &Tensor| x.narrow(0, 0, 1).unwrap();
        let expected = exact(&first(&q), &first(&k), &first(&v), &visible);
        let poison = |x: &Tensor| {
            let seen: Vec<f32> = (0..21).map(|i| f32::from(keep(i))).collect();
            let seen = Tensor::new(seen, &CPU).unwrap().reshape((1, 1, 21, 1)).unwrap();
            // 0 / 0 where it is not seen.
            x.broadcast_mul(&seen).unwrap().broadcast_div(&seen).unwrap()
        };
        let out = attention(&q, &poison(&k), &poison(&v), &mask).unwrap().unwrap();
        assert!(largest_difference(&first(&out), &expected) < 1e-5);
        let second = out.narrow(0, 1, 1).unwrap().flatten_all().unwrap();
        assert!(second.to_vec1::<f32>().unwrap().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn strides_are_read_where_they_lie_and_threads_change_nothing() {
        let tokens = randn(&[2, 70, 3, 4, 16]);
        let part = |i| tokens.narrow(2, i, 1).unwrap().squeeze(2).unwrap().transpose(1, 2).unwrap();
        let (q, k, v) = (part(0), part(1), part(2));
        let copies = [&q, &k, &v].map(|x| x.contiguous().unwrap());
        let with_threads = |threads: usize, [q, k, v]: [&Tensor; 3]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let run = || attention(q, k, v, &AttnMask::None).unwrap().unwrap();
            pool.install(run).flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let one = with_threads(1, [&q, &k, &v]);
        assert_eq!(one, with_threads(5, [&q, &k, &v]));
        assert_eq!(one, with_threads(1, copies.each_ref()));
    }

    #[test]
    fn nothing_to_compute_is_no_error() {
        for shape in [[0, 2, 3, 4], [2, 0, 3, 4], [2, 2, 0, 4], [2, 2, 3, 0]] {
            let x = Tensor::zeros(&shape, DType::F32, &CPU).unwrap();
            let out = attention(&x, &x, &x, &AttnMask::None).unwrap().unwrap();
            assert_eq!(out.dims(), shape);
        }
        let (q, none) = (randn(&[1, 1, 2, 4]), randn(&[1, 1, 0, 4]));
        let out = attention(&q, &none, &none, &AttnMask::None).unwrap().unwrap();
        assert_eq!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 8]);
    }

    #[test]
    fn what_it_does_not_do_is_left_to_others() {
        let x = randn(&[1, 2, 3, 4]);
        let none = AttnMask::None;
        let left = |q: &Tensor, k: &Tensor, mask: &AttnMask| {
            assert!(attention(q, k, k, mask).unwrap().is_none(), "{:?} {:?}", q.dims(), k.dims());
        };
        left(&x, &x, &AttnMask::causal());
        left(&x, &x, &AttnMask::Mask(randn(&[1, 1, 1, 3])));
        left(&x, &x, &AttnMask::Mask(Tensor::ones((3, 3), DType::U8, &CPU).unwrap()));
        left(&x, &randn(&[1, 1, 3, 4]), &none);
        left(&x, &randn(&[1, 2, 3, 5]), &none);
        left(&randn(&[2, 3, 4]), &x, &none);
        left(&x.to_dtype(DType::F16).unwrap(), &x, &none);
        let variable = Var::from_tensor(&x).unwrap();
        left(&variable, &x, &none);
    }
}
