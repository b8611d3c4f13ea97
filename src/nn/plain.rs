//! Which form of a layer computes: the fused one, or Candle's operations.

use candle_core::{DType, Tensor};

/// Whether the fused form can compute from these tensors.
pub(super) fn is_plain_f32(tensors: &[&Tensor]) -> bool {
    let plain = |x: &&Tensor| x.device().is_cpu() && x.dtype() == DType::F32;
    tensors.iter().all(plain) && !is_tracked(tensors)
}

/// Whether a gradient may be asked for.
pub(super) fn is_tracked(tensors: &[&Tensor]) -> bool {
    tensors.iter().any(|x| x.track_op())
}
