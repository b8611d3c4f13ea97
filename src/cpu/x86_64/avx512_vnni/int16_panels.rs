//! AVX-512 VNNI, int16: `vpdpwssd` adds two products to each of 16 lanes. The tile is that of the f32
//! kernel, with two elements of the depth in the place of one. (Four groups in a step of the loop are 8 % slower:
//! LLVM then loads them all at once, into more registers than there are.)

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::x86_64::*;
use std::ops::Range;

const GROUP: usize = 2;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int16,
    group: GROUP,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply(panel: Panel) {
    // All rows with one run of the matrix, which stays in L1, before the next.
    for (run, groups) in panel.runs(GROUP) {
        for tile in panel.tiles(ROWS) {
            // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
            unsafe { for_tile!(tile, add, run, groups.clone()) }
        }
    }
}

/// Adds one run to `16 * V` columns of `R` rows.
///
/// # Safety
/// That of the contract, with `R` rows and `V` vectors, and the run is there with its groups.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add<const R: usize, const V: usize>(tile: Panel, run: usize, groups: Range<usize>) {
    let mut sums = [[_mm512_setzero_si512(); V]; R];
    for group in groups {
        let mut matrix = [_mm512_setzero_si512(); V];
        for (v, matrix) in matrix.iter_mut().enumerate() {
            // SAFETY: the panel holds `groups` pairs of rows of `V` vectors by contract.
            *matrix = unsafe { _mm512_loadu_si512(tile.group(group, 4 * v * LANES).cast()) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` pairs of elements in each of `R` rows by contract.
            let x = unsafe { tile.lhs_of::<i32>(row).add(group).read_unaligned() };
            let x = _mm512_set1_epi32(x);
            for (sum, matrix) in sums.iter_mut().zip(matrix) {
                *sum = _mm512_dpwssd_epi32(*sum, x, matrix);
            }
        }
    }
    for (row, sums) in sums.into_iter().enumerate() {
        // SAFETY: a scale for every run of each of `R` rows by contract.
        let row_scale = _mm512_set1_ps(unsafe { *tile.row_scale(row, run) });
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: `V` vectors of scales for every run, and of sums in each of `R` rows, by contract.
            unsafe {
                let column_scales = _mm512_loadu_ps(tile.column_scale(v * LANES, run));
                let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale);
                let sum = _mm512_mul_ps(sum, column_scales);
                let out = tile.sums_of(row, v * LANES);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
            }
        }
    }
}
