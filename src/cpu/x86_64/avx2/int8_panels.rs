//! AVX2, int8, exact. `vpmaddubsw` would multiply u8 by i8, but saturates its 16-bit sums of two;
//! so both sides are widened to 16 bits, even and odd keys of a group of four apart, and
//! `vpmaddwd` adds pairs of products in 32 bits.
//!
//! A panel is taken 16 channels at a time: 4 x 2 accumulators of 8 lanes, 4 registers of widened
//! values, 2 of widened probabilities, a mask and a product: 16 of 16 registers.

use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::x86_64::*;

const ROWS: usize = 4;
const GROUP: usize = 4;
/// Bytes of a register: 8 channels of one group.
const REGISTER: usize = 32;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int8,
    group: GROUP,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "avx2")]
unsafe fn multiply(panel: Panel) {
    for vector in 0..panel.vectors {
        for tile in panel.tiles(ROWS) {
            // SAFETY: AVX2 is there and the pointers are valid, by contract.
            unsafe {
                match tile.rows {
                    1 => add::<1>(tile, vector),
                    2 => add::<2>(tile, vector),
                    3 => add::<3>(tile, vector),
                    _ => add::<ROWS>(tile, vector),
                }
            }
        }
    }
}

/// Adds to channels `16 * vector ..` of `R` rows.
///
/// # Safety
/// That of the contract, with `R` rows and more than `vector` vectors.
#[target_feature(enable = "avx2")]
unsafe fn add<const R: usize>(tile: Panel, vector: usize) {
    let low_bytes = _mm256_set1_epi16(0xff);
    for (run, groups) in tile.runs(GROUP) {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        for group in groups {
            // SAFETY: the panel holds `groups` times four keys of `vectors * 16` channels by
            // contract.
            let v = unsafe {
                let v = tile.group(group, vector * LANES * GROUP);
                [_mm256_loadu_si256(v.cast()), _mm256_loadu_si256(v.add(REGISTER).cast())]
            };
            let even = v.map(|v| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)));
            let odd = v.map(|v| _mm256_srai_epi16::<8>(v));
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `groups` times four probabilities in each of `R` rows by contract.
                let p = unsafe { tile.lhs_of::<i32>(row).add(group).read_unaligned() };
                let p = _mm256_set1_epi32(p);
                let (p_even, p_odd) = (_mm256_and_si256(p, low_bytes), _mm256_srli_epi16::<8>(p));
                for (half, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(p_even, even[half]));
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(p_odd, odd[half]));
                }
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            // SAFETY: every run of each of `R` rows by contract.
            let scale = _mm256_set1_ps(unsafe { (*tile.run_of(row, run)).scale });
            for (half, sum) in sums.into_iter().enumerate() {
                let sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
                // SAFETY: scales of `vectors * 16` columns, and as many sums in each of `R` rows, by
                // contract.
                unsafe {
                    let column = tile.column_scale(vector * LANES + 8 * half, run);
                    let sum = _mm256_mul_ps(sum, _mm256_loadu_ps(column));
                    let out = tile.sums_of(row, vector * LANES + 8 * half);
                    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum));
                }
            }
        }
    }
}
