//! NEON, f32, which every 64-bit Arm processor has. A panel is taken 16 channels at a time: 6 x 4
//! accumulators of 4 lanes, 4 registers of values, the rest for probabilities. One key is 10 loads
//! and 24 multiplications by element.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ROWS, ValueFormat};
use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

/// Registers of 4 lanes in a vector of 16.
const QUADS: usize = LANES / 4;

pub(crate) struct Neon;

// SAFETY: `panel` stays within the lengths of its contract; the instructions are checked.
unsafe impl PvKernel for Neon {
    fn name(&self) -> &'static str {
        "aarch64-neon-f32"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::F32
    }

    fn group(&self) -> usize {
        1
    }

    fn is_available(&self) -> bool {
        is_aarch64_feature_detected!("neon")
    }

    unsafe fn panel(&self, panel: PvPanel) {
        for vector in 0..panel.vectors {
            for tile in panel.tiles(ROWS) {
                // SAFETY: NEON is there and the pointers are valid, by contract.
                unsafe { for_rows!(tile.rows, add, (tile, vector)) }
            }
        }
    }
}

/// Adds to channels `16 * vector ..` of `R` rows.
///
/// # Safety
/// As for [`PvKernel::panel`], with `R` rows and more than `vector` vectors.
#[target_feature(enable = "neon")]
unsafe fn add<const R: usize>(tile: PvPanel, vector: usize) {
    let mut sums = [[vdupq_n_f32(0.0); QUADS]; R];
    let values = tile.values.cast::<f32>();
    for key in 0..tile.groups {
        let mut v = [vdupq_n_f32(0.0); QUADS];
        for (quad, v) in v.iter_mut().enumerate() {
            // SAFETY: the panel holds `groups` rows of `vectors * 16` values by contract.
            *v = unsafe { vld1q_f32(values.add((key * tile.vectors + vector) * LANES + 4 * quad)) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` probabilities in each of `R` rows by contract.
            let p = unsafe { *tile.probs_of::<f32>(row).add(key) };
            for (sum, v) in sums.iter_mut().zip(v) {
                *sum = vfmaq_n_f32(*sum, v, p);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (quad, sum) in sums.into_iter().enumerate() {
            // SAFETY: `vectors * 16` sums in each of `R` rows by contract.
            unsafe {
                let out = tile.sums_of(row, vector * LANES + 4 * quad);
                vst1q_f32(out, vaddq_f32(vld1q_f32(out), sum));
            }
        }
    }
}
