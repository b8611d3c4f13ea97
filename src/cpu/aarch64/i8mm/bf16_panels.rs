//! NEON with the bf16 extension: `bfmmla` multiplies two rows of four bf16 by two columns of four
//! and adds the 2 x 2 products to f32 lanes, twice the work of `bfdot`. See `matrix` for the
//! tile.
//!
//! The instruction rounds each addition to odd, not to nearest, so its sums may differ from those
//! of other kernels by up to a unit in the last place an addition. It takes denormal operands for
//! 0 and flushes denormal sums to 0, whatever the control register says.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use super::matrix::{COLUMN_PAIRS, columns, row_pairs, rows, rows_of};
use crate::cpu::contracts::panel_product::ROWS;
use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::arch::aarch64::*;
use std::arch::asm;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::BF16,
    format: Format::Bf16,
    group: 4,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

#[target_feature(enable = "neon,bf16")]
unsafe fn multiply(panel: Panel) {
    for vector in 0..panel.vectors {
        for tile in panel.tiles(ROWS) {
            // SAFETY: the bf16 extension is there and the pointers are valid, by contract.
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
#[target_feature(enable = "neon,bf16")]
#[inline]
fn bfmmla(mut sum: float32x4_t, p: uint8x16_t, v: uint8x16_t) -> float32x4_t {
    // SAFETY: the instruction is enabled above and touches registers only.
    unsafe {
        asm!(
            "bfmmla {sum:v}.4s, {p:v}.8h, {v:v}.8h",
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
#[target_feature(enable = "neon,bf16")]
unsafe fn add<const PAIRS: usize>(tile: Panel, vector: usize) {
    let mut sums = [[vdupq_n_f32(0.0); COLUMN_PAIRS]; PAIRS];
    let starts = row_pairs::<PAIRS>(&tile);
    for group in 0..tile.groups {
        let mut p = [vdupq_n_u8(0); PAIRS];
        for (p, start) in p.iter_mut().zip(starts) {
            // SAFETY: `groups` times four probabilities in each row by contract.
            *p = unsafe { rows(start, group) };
        }
        for column in 0..COLUMN_PAIRS {
            // SAFETY: the panel holds `groups` times four keys of `vectors * 16` channels by
            // contract.
            let v = unsafe { columns(&tile, group, vector, column) };
            for (sums, p) in sums.iter_mut().zip(p) {
                sums[column] = bfmmla(sums[column], p, v);
            }
        }
    }
    for (pair, sums) in sums.iter().enumerate() {
        for (quad, sums) in sums.as_chunks::<2>().0.iter().enumerate() {
            let [left, right] = sums.map(|sum| vreinterpretq_u64_f32(sum));
            for (sum, row) in rows_of(left, right).into_iter().zip(2 * pair..tile.rows) {
                // SAFETY: `vectors * 16` sums in each row by contract.
                unsafe {
                    let out = tile.sums_of(row, vector * LANES + 4 * quad);
                    vst1q_f32(out, vaddq_f32(vld1q_f32(out), vreinterpretq_f32_u64(sum)));
                }
            }
        }
    }
}
