//! AVX-512 VNNI, int8: `vpdpbusd` adds four u8 x i8 products to each of 16 lanes, without
//! saturation. The tile is that of the f32 kernel, with four keys in the place of one.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ROWS, ValueFormat};
use std::arch::x86_64::*;

const GROUP: usize = 4;

pub(crate) struct Avx512Vnni;

// SAFETY: `panel` stays within the lengths of its contract; the instructions are checked.
unsafe impl PvKernel for Avx512Vnni {
    fn name(&self) -> &'static str {
        "x86_64-avx512-vnni-int8"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::Int8
    }

    fn group(&self) -> usize {
        GROUP
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
    }

    unsafe fn panel(&self, panel: PvPanel) {
        for tile in panel.tiles(ROWS) {
            // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
            unsafe { for_tile!(tile, add) }
        }
    }
}

/// Adds to `16 * V` channels of `R` rows.
///
/// # Safety
/// As for [`PvKernel::panel`], with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add<const R: usize, const V: usize>(tile: PvPanel) {
    for (run, groups) in tile.runs(GROUP) {
        let mut sums = [[_mm512_setzero_si512(); V]; R];
        for group in groups {
            let mut values = [_mm512_setzero_si512(); V];
            for (v, values) in values.iter_mut().enumerate() {
                // SAFETY: the panel holds `groups` times four keys of `V` vectors by contract.
                *values = unsafe {
                    let at = (group * V + v) * LANES;
                    _mm512_loadu_si512(tile.values.cast::<i32>().add(at).cast())
                };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `groups` times four probabilities in each of `R` rows by contract.
                let p = unsafe { tile.probs_of::<i32>(row).add(group).read_unaligned() };
                let p = _mm512_set1_epi32(p);
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = _mm512_dpbusd_epi32(*sum, p, values);
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            // SAFETY: every run of each of `R` rows by contract.
            let scale = _mm512_set1_ps(unsafe { (*tile.run_of(row, run)).scale });
            for (v, sum) in sums.into_iter().enumerate() {
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
                // SAFETY: `V` vectors of sums in each of `R` rows by contract.
                unsafe {
                    let out = tile.sums_of(row, v * LANES);
                    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
                }
            }
        }
    }
}
