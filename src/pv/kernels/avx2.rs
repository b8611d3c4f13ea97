//! AVX2 with FMA, f32. A panel's vectors of 16 channels are two registers each, so wide panels are
//! taken 16 channels at a time: 6 x 2 accumulators, 2 values, 1 probability, 15 of 16 registers.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ROWS, ValueFormat};
use std::arch::x86_64::*;

pub(crate) struct Avx2;

// SAFETY: `panel` stays within the lengths of its contract; the instructions are checked.
unsafe impl PvKernel for Avx2 {
    fn name(&self) -> &'static str {
        "x86_64-avx2-fma-f32"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::F32
    }

    fn group(&self) -> usize {
        1
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    unsafe fn panel(&self, panel: PvPanel) {
        for vector in 0..panel.vectors {
            for tile in panel.tiles(ROWS) {
                // SAFETY: AVX2 and FMA are there and the pointers are valid, by contract.
                unsafe { for_rows!(tile.rows, add, (tile, vector)) }
            }
        }
    }
}

/// Adds to channels `16 * vector ..` of `R` rows.
///
/// # Safety
/// As for [`PvKernel::panel`], with `R` rows and more than `vector` vectors.
#[target_feature(enable = "avx2,fma")]
unsafe fn add<const R: usize>(tile: PvPanel, vector: usize) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let values = tile.values.cast::<f32>();
    for key in 0..tile.groups {
        // SAFETY: the panel holds `groups` rows of `vectors * 16` values by contract.
        let v = unsafe {
            let v = values.add((key * tile.vectors + vector) * LANES);
            [_mm256_loadu_ps(v), _mm256_loadu_ps(v.add(8))]
        };
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` probabilities in each of `R` rows by contract.
            let p = _mm256_set1_ps(unsafe { *tile.probs_of::<f32>(row).add(key) });
            sums[0] = _mm256_fmadd_ps(p, v[0], sums[0]);
            sums[1] = _mm256_fmadd_ps(p, v[1], sums[1]);
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (half, sum) in sums.into_iter().enumerate() {
            // SAFETY: `vectors * 16` sums in each of `R` rows by contract.
            unsafe {
                let out = tile.sums_of(row, vector * LANES + 8 * half);
                _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum));
            }
        }
    }
}
