//! NEON with the dot product extension, int8: `udot` adds four u8 x u8 products to each of 4
//! lanes. Values are stored as `v + 128` for it ([`PanelProduct::bias`]), because its signed form would
//! take the eighth bit from the probabilities and the mixed one needs another extension.
//!
//! A panel is taken 16 channels at a time: 6 x 4 accumulators, 4 registers of values, the rest for
//! probabilities. One group of four keys is 10 loads and 24 `udot` by element.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, Int8Run, LANES, Panel, PanelProduct, VECTORS};
use std::arch::aarch64::*;
use std::arch::asm;

const GROUP: usize = 4;
const BIAS: u8 = 128;
/// Registers of 4 lanes in a vector of 16.
const QUADS: usize = LANES / 4;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int8,
    group: GROUP,
    vectors: VECTORS,
    bias: BIAS,
    multiply,
};

#[target_feature(enable = "neon,dotprod")]
unsafe fn multiply(panel: Panel) {
    for vector in 0..panel.vectors {
        for tile in panel.tiles(ROWS) {
            // SAFETY: the dot product is there and the pointers are valid, by contract.
            unsafe { for_rows!(tile.rows, add, (tile, vector)) }
        }
    }
}

/// Adds to lane `i` of each sum the products of group `i` of its `v` with the group in `p`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_row(sums: &mut [uint32x4_t; QUADS], v: &[uint8x16_t; QUADS], p: uint32x2_t) {
    for (sum, v) in sums.iter_mut().zip(v) {
        // SAFETY: the instruction is enabled above and touches registers only.
        unsafe {
            asm!(
                "udot {sum:v}.4s, {v:v}.16b, {p:v}.4b[0]",
                sum = inout(vreg) *sum,
                v = in(vreg) *v,
                p = in(vreg) p,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    }
}

/// Adds to channels `16 * vector ..` of `R` rows.
///
/// # Safety
/// That of the contract, with `R` rows and more than `vector` vectors.
#[target_feature(enable = "neon,dotprod")]
unsafe fn add<const R: usize>(tile: Panel, vector: usize) {
    for (run, groups) in tile.runs(GROUP) {
        let mut sums = [[vdupq_n_u32(0); QUADS]; R];
        for group in groups {
            let mut v = [vdupq_n_u8(0); QUADS];
            for (quad, v) in v.iter_mut().enumerate() {
                let channel = vector * LANES + 4 * quad;
                // SAFETY: the panel holds `groups` times four keys of `vectors * 16` channels by
                // contract.
                *v = unsafe { vld1q_u8(tile.group(group, channel * GROUP)) };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `groups` times four probabilities in each of `R` rows by contract.
                let p = unsafe { tile.lhs_of::<u32>(row).add(group).read_unaligned() };
                add_row(sums, &v, vdup_n_u32(p));
            }
        }
        for (row, sums) in sums.into_iter().enumerate() {
            // SAFETY: every run of each of `R` rows by contract.
            let Int8Run { scale, codes } = unsafe { *tile.run_of(row, run) };
            let biased = vdupq_n_u32(codes * u32::from(BIAS));
            for (quad, sum) in sums.into_iter().enumerate() {
                let sum = vreinterpretq_s32_u32(vsubq_u32(sum, biased));
                let sum = vmulq_n_f32(vcvtq_f32_s32(sum), scale);
                let column = vector * LANES + 4 * quad;
                // SAFETY: scales of `vectors * 16` columns, and as many sums in each of `R` rows, by
                // contract.
                unsafe {
                    let sum = vmulq_f32(sum, vld1q_f32(tile.column_scale(column, run)));
                    let out = tile.sums_of(row, column);
                    vst1q_f32(out, vaddq_f32(vld1q_f32(out), sum));
                }
            }
        }
    }
}
