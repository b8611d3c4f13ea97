//! AVX512-BF16: `vdpbf16ps` adds two bf16 products to each of 16 f32 lanes. The tile is that of
//! the f32 kernel, with pairs of keys in the place of keys.

use super::kernel::{LANES, PvKernel, PvTile, ValueFormat, for_tile_size};
use std::arch::x86_64::*;

pub(crate) struct Avx512Bf16;

// SAFETY: `tile` stays within the lengths of its contract; the instructions are checked.
unsafe impl PvKernel for Avx512Bf16 {
    fn name(&self) -> &'static str {
        "x86_64-avx512-bf16"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::Bf16
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
    }

    unsafe fn tile(&self, tile: PvTile) {
        // SAFETY: AVX512-BF16 is there and the pointers are valid, by contract.
        unsafe { for_tile_size!(tile, add) }
    }
}

/// Adds to `16 * V` channels of `R` rows.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add<const R: usize, const V: usize>(tile: PvTile) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for pair in 0..tile.groups {
        let mut values = [_mm512_setzero_si512(); V];
        for (v, values) in values.iter_mut().enumerate() {
            // SAFETY: the panel holds `groups` pairs of rows of `V` vectors by contract.
            *values = unsafe {
                _mm512_loadu_si512(tile.values.cast::<u32>().add((pair * V + v) * LANES).cast())
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` pairs of probabilities in each of `rows` rows by contract.
            let p = unsafe {
                tile.probs.add(row * tile.probs_stride).cast::<i32>().add(pair).read_unaligned()
            };
            let p = _mm512_set1_epi32(p);
            for (sum, values) in sums.iter_mut().zip(values) {
                // SAFETY: same size, and every bit pattern is a vector of bf16.
                let (p, values) = unsafe {
                    (
                        std::mem::transmute::<__m512i, __m512bh>(p),
                        std::mem::transmute::<__m512i, __m512bh>(values),
                    )
                };
                *sum = _mm512_dpbf16_ps(*sum, p, values);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: `V` vectors of sums in each of `rows` rows by contract.
            unsafe {
                let out = tile.out.add(row * tile.out_stride + v * LANES);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
            }
        }
    }
}
