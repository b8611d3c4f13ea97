//! Attention in one op: quantize, score, mask, softmax and multiply with the values tile by tile,
//! so that nothing as large as `M * N` ever exists.
//!
//! ```text
//! once a key head:      keys -> int8 panels        values -> panels of bf16, f32 or int8
//! for 48 queries:       quantize and pack
//!   for a tile of keys: int8 scores -> f32 (scale and log2(e) folded in)
//!                       softcap, ALiBi, mask
//!                       running softmax -> probabilities (bf16, f32 or int8)
//!                       sums += probabilities x values
//!   divide by the running sum
//! ```

mod between;
mod engine;
mod mask;
mod output;
mod softmax;

use super::config::{AttentionConfig, Backend, Int8Config};
use super::mask::broadcast_mask;
use super::scorer::check_product;
use super::view::View;
use super::visible::Visible;
use super::{AttentionCall, AttentionSpec};
use crate::reference::unfused;
use crate::{Error, Result};
pub(super) use between::Between;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Storage, Tensor, Var};
use engine::Engine;
pub(super) use mask::MaskView;
use softmax::{Probs, Running, Tile, softmax_tile};
use std::ops::Range;

/// `attention` for the int8 backend on the CPU; shapes and dtypes are checked.
pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: &AttentionCall,
    spec: &AttentionSpec,
    int8: &Int8Config,
) -> Result<Tensor> {
    let (b, h, m, d) = q.dims4()?;
    let n = k.dim(2)?;
    // Candle turns an error from inside an op into text, so what can fail is asked before.
    check_product(d, &int8.scores)?;
    int8.pv.kernel()?;
    let visible = Visible::new((b, m, n), call, spec)?;
    let mask = call.mask.as_ref();
    let mask = mask.map(|mask| broadcast_mask(&mask.detach(), &[b, h, m, n])).transpose()?;
    let call = AttentionCall { mask, ..call.clone() };
    let op = FusedAttention { call, visible, spec: spec.clone(), int8: int8.clone() };
    Ok(q.apply_op3(k, v, op)?)
}

/// The softmax of one tile on its own: replaces scores in units of log2 (row-major, rows `stride`
/// elements apart, `keys` in each) by `2^(score - max)`, what a query does not see by 0, and gives
/// the maximum and the sum of each row.
pub(super) fn softmax_alone(
    scores: &mut [f32],
    stride: usize,
    keys: usize,
    visible: &[Range<usize>],
) -> Vec<(f32, f32)> {
    let mut running = vec![Running::START; visible.len()];
    softmax_tile(Tile { scores, stride, keys, visible, probs: Probs::F32 }, &mut running);
    running.iter().map(|row| (row.max, row.sum)).collect()
}

struct FusedAttention {
    /// Its mask is broadcast to `[B, H, M, N]`.
    call: AttentionCall,
    visible: Visible,
    spec: AttentionSpec,
    int8: Int8Config,
}

impl FusedAttention {
    fn forward(&self, q: View<'_>, k: View<'_>, v: View<'_>, dtype: DType) -> Result<CpuStorage> {
        // The guard keeps the mask's storage readable while the engine runs.
        let guard = self.call.mask.as_ref().map(Tensor::storage_and_layout);
        let mask = match guard.as_ref().map(|(storage, layout)| (&**storage, layout)) {
            None => None,
            Some((Storage::Cpu(storage), layout)) => Some(MaskView::new(storage, layout)?),
            Some(_) => {
                let found = self.call.mask.as_ref().map(|mask| mask.device().location());
                return Err(Error::Mismatch(format!(
                    "mask on {found:?}, expected the CPU, like q"
                )));
            }
        };
        let engine = Engine::prepare(q, k, v, (&self.visible, mask), &self.spec, &self.int8)?;
        Ok(match dtype {
            DType::F16 => CpuStorage::F16(engine.run()),
            DType::BF16 => CpuStorage::BF16(engine.run()),
            _ => CpuStorage::F32(engine.run()),
        })
    }
}

impl CustomOp3 for FusedAttention {
    fn name(&self) -> &'static str {
        "int8-attention"
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
        let op = "attention";
        let dtype = candle_core::backend::BackendStorage::dtype(q);
        let [b, h, m, _] = View::new(op, "q", q, q_layout)?.dims();
        let (q, k) = (View::new(op, "q", q, q_layout)?, View::new(op, "k", k, k_layout)?);
        let v = View::new(op, "v", v, v_layout)?;
        let shape = Shape::from(vec![b, h, m, v.depth()]);
        Ok((self.forward(q, k, v, dtype)?, shape))
    }

    /// Straight-through: the gradient of the same attention in fp32, recomputed.
    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let var = |x: &Tensor| Var::from_tensor(&x.detach().to_dtype(DType::F32)?);
        let vars = [var(q)?, var(k)?, var(v)?];
        let config = AttentionConfig { spec: self.spec.clone(), backend: Backend::Fp32 };
        let out = unfused::attention(&vars[0], &vars[1], &vars[2], &self.call, &config)?;
        let grads = (out * grad.to_dtype(DType::F32)?)?.sum_all()?.backward()?;
        let of = |var: &Var, x: &Tensor| match grads.get(var) {
            Some(grad) => grad.to_dtype(x.dtype()),
            None => x.zeros_like(),
        };
        Ok((Some(of(&vars[0], q)?), Some(of(&vars[1], k)?), Some(of(&vars[2], v)?)))
    }
}
