//! NEON with the matrix extension, int8: `usmmla` multiplies two rows of eight u8 by two columns of
//! eight i8 and adds the 2 x 2 products to i32 lanes, twice the work of `udot`. See `matrix` for
//! the tile.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use super::matrix::{COLUMN_PAIRS, columns, row_pairs, rows, rows_of};
use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::aarch64::*;
use std::arch::asm;

const GROUP: usize = 8;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int8,
    group: GROUP,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "neon,i8mm")]
unsafe fn multiply(panel: Panel) {
    for vector in 0..panel.vectors {
        for tile in panel.tiles(ROWS) {
            // SAFETY: the matrix extension is there and the pointers are valid, by contract.
            unsafe {
                match tile.rows.div_ceil(2) {
                    1 => add::<1>(tile, vector),
                    2 => add::<2>(tile, vector),
                    _ => add::<3>(tile, vector),
                }
            }
        }
    }
}

/// Adds to `sum` the 2 x 2 products of the rows `p` with the columns `v`.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn usmmla(mut sum: int32x4_t, p: uint8x16_t, v: uint8x16_t) -> int32x4_t {
    // SAFETY: the instruction is enabled above and touches registers only.
    unsafe {
        asm!(
            "usmmla {sum:v}.4s, {p:v}.16b, {v:v}.16b",
            sum = inout(vreg) sum,
            p = in(vreg) p,
            v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds to channels `16 * vector ..` of up to `2 * PAIRS` rows.
///
/// # Safety
/// That of the contract, with `2 * PAIRS` rows or one less, and more than `vector` vectors.
#[target_feature(enable = "neon,i8mm")]
unsafe fn add<const PAIRS: usize>(tile: Panel, vector: usize) {
    let starts = row_pairs::<PAIRS>(&tile);
    for (run, groups) in tile.runs(GROUP) {
        let mut sums = [[vdupq_n_s32(0); COLUMN_PAIRS]; PAIRS];
        for group in groups {
            let mut p = [vdupq_n_u8(0); PAIRS];
            for (p, start) in p.iter_mut().zip(starts) {
                // SAFETY: `groups` times eight probabilities in each row by contract.
                *p = unsafe { rows(start, group) };
            }
            for column in 0..COLUMN_PAIRS {
                // SAFETY: the panel holds `groups` times eight keys of `vectors * 16` channels by
                // contract.
                let v = unsafe { columns(&tile, group, vector, column) };
                for (sums, p) in sums.iter_mut().zip(p) {
                    sums[column] = usmmla(sums[column], p, v);
                }
            }
        }
        for (pair, sums) in sums.iter().enumerate() {
            for (quad, sums) in sums.as_chunks::<2>().0.iter().enumerate() {
                let [left, right] = sums.map(|sum| vreinterpretq_u64_s32(sum));
                for (sum, row) in rows_of(left, right).into_iter().zip(2 * pair..tile.rows) {
                    let sum = vcvtq_f32_s32(vreinterpretq_s32_u64(sum));
                    let column = vector * LANES + 4 * quad;
                    // SAFETY: every run of each row, and `vectors * 16` scales and sums, by contract.
                    unsafe {
                        let sum = vmulq_n_f32(sum, (*tile.run_of(row, run)).scale);
                        let sum = vmulq_f32(sum, vld1q_f32(tile.column_scale(column, run)));
                        let out = tile.sums_of(row, column);
                        vst1q_f32(out, vaddq_f32(vld1q_f32(out), sum));
                    }
                }
            }
        }
    }
}
