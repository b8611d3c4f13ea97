//! AVX512-BF16: `vdpbf16ps` adds two bf16 products to each of 16 f32 lanes. The tile is that of
//! the f32 kernel, with pairs of keys in the place of keys.
//!
//! The instruction takes denormal operands for 0 and flushes denormal sums to 0, whatever the
//! control register says: what is lost is below 2^-126 a product.

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::x86_64::*;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::BF16,
    format: Format::Bf16,
    group: 2,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn multiply(panel: Panel) {
    for tile in panel.tiles(ROWS) {
        // SAFETY: AVX512-BF16 is there and the pointers are valid, by contract.
        unsafe { for_tile!(tile, add) }
    }
}

/// Adds to `16 * V` channels of `R` rows.
///
/// # Safety
/// That of the contract, with `R` rows and `V` vectors.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add<const R: usize, const V: usize>(tile: Panel) {
    let mut sums = [[_mm512_setzero_ps(); V]; R];
    for pair in 0..tile.groups {
        let mut values = [_mm512_setzero_si512(); V];
        for (v, values) in values.iter_mut().enumerate() {
            // SAFETY: the panel holds `groups` pairs of rows of `V` vectors by contract.
            *values = unsafe { _mm512_loadu_si512(tile.group(pair, 4 * v * LANES).cast()) };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `groups` pairs of probabilities in each of `R` rows by contract.
            let p = unsafe { tile.lhs_of::<i32>(row).add(pair).read_unaligned() };
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
            // SAFETY: `V` vectors of sums in each of `R` rows by contract.
            unsafe {
                let out = tile.sums_of(row, v * LANES);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sum));
            }
        }
    }
}
