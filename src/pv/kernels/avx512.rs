//! AVX-512, f32: 6 x 4 accumulators of 16 lanes, 4 values, 1 probability, 29 of 32 registers.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ROWS, ValueFormat};
use std::arch::x86_64::*;

pub(crate) struct Avx512;

// SAFETY: `panel` stays within the lengths of its contract; the instructions are checked.
unsafe impl PvKernel for Avx512 {
    fn name(&self) -> &'static str {
        "x86_64-avx512-f32"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::F32
    }

    fn group(&self) -> usize {
        1
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx512f")
    }

    unsafe fn panel(&self, panel: PvPanel) {
        for tile in panel.tiles(ROWS) {
            // SAFETY: AVX-512 is there and the pointers are valid, by contract.
            unsafe { for_tile!(tile, add) }
        }
    }
}

/// Adds to `16 * V` channels of `R` rows.
///
/// # Safety
/// As for [`PvKernel::panel`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f")]
unsafe fn add<const R: usize, const V: usize>(tile: PvPanel) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for key in 0..tile.groups {
        let mut values = [_mm512_setzero_ps(); V];
        for (v, values) in values.iter_mut().enumerate() {
            // SAFETY: the panel holds `groups` rows of `V` vectors by contract.
            *values =
                unsafe { _mm512_loadu_ps(tile.values.cast::<f32>().add((key * V + v) * LANES)) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` probabilities in each of `R` rows by contract.
            let p = _mm512_set1_ps(unsafe { *tile.probs_of::<f32>(row).add(key) });
            for (sum, values) in sums.iter_mut().zip(values) {
                *sum = _mm512_fmadd_ps(p, values, *sum);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: `V` vectors of sums in each of `R` rows by contract.
            unsafe {
                let out = tile.sums_of(row, v * LANES);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
            }
        }
    }
}
