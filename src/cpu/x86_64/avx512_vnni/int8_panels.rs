//! AVX-512 VNNI, int8: `vpdpbusd` adds four u8 x i8 products to each of 16 lanes, without
//! saturation. The tile is that of the f32 kernel, with four keys in the place of one.

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::x86_64::*;

const GROUP: usize = 4;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int8,
    group: GROUP,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply(panel: Panel) {
    for tile in panel.tiles(ROWS) {
        // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
        unsafe { for_tile!(tile, add) }
    }
}

/// Adds to `16 * V` channels of `R` rows.
///
/// # Safety
/// That of the contract, with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add<const R: usize, const V: usize>(tile: Panel) {
    for (run, groups) in tile.runs(GROUP) {
        let mut sums = [[_mm512_setzero_si512(); V]; R];
        for group in groups {
            let mut values = [_mm512_setzero_si512(); V];
            for (v, values) in values.iter_mut().enumerate() {
                // SAFETY: the panel holds `groups` times four keys of `V` vectors by contract.
                *values =
                    unsafe { _mm512_loadu_si512(tile.group(group, v * LANES * GROUP).cast()) };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `groups` times four probabilities in each of `R` rows by contract.
                let p = unsafe { tile.lhs_of::<i32>(row).add(group).read_unaligned() };
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
                // SAFETY: `V` vectors of scales for every run, and of sums in each of `R` rows, by contract.
                unsafe {
                    let column = tile.column_scale(v * LANES, run);
                    let sum = _mm512_mul_ps(sum, _mm512_loadu_ps(column));
                    let out = tile.sums_of(row, v * LANES);
                    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
                }
            }
        }
    }
}
