//! What the Arm kernels share: the f32 epilogue of four columns.

use crate::gemm::kernel::ScoreTile;
use std::arch::aarch64::*;

/// Columns of one register.
pub(super) const LANES: usize = 4;

/// Scales and biases of four columns.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    scale: float32x4_t,
    bias: float32x4_t,
}

impl Columns {
    /// Those from `column` on.
    ///
    /// # Safety
    /// `scores` holds scales and biases of `column + 4` columns.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn load(scores: &ScoreTile, column: usize) -> Self {
        // SAFETY: by contract.
        unsafe {
            Self {
                scale: vld1q_f32(scores.column_scales.add(column)),
                bias: vld1q_f32(scores.column_biases.add(column)),
            }
        }
    }

    /// Writes the scores of `sums` to `row`, from `column` on.
    ///
    /// # Safety
    /// `scores` holds a scale and a bias for `row`, and its output room for these four columns.
    #[inline]
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn write(
        self,
        scores: &ScoreTile,
        (row, column): (usize, usize),
        sums: int32x4_t,
    ) {
        // SAFETY: by contract.
        let (scale, bias) = unsafe { (*scores.row_scales.add(row), *scores.row_biases.add(row)) };
        // Separate multiplications and additions: see `ScoreTile` on why none may be fused.
        let x = vmulq_f32(vmulq_f32(vcvtq_f32_s32(sums), vdupq_n_f32(scale)), self.scale);
        let x = vaddq_f32(vaddq_f32(x, self.bias), vdupq_n_f32(bias));
        // SAFETY: by contract.
        unsafe { vst1q_f32(scores.out.add(row * scores.stride + column), x) };
    }
}
