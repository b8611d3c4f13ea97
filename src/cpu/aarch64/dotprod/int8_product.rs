//! NEON with the dot product extension: `sdot` adds four i8 x i8 products to each of 4 lanes.
//!
//! Its form by element multiplies by one group of four out of a register, so that one load brings
//! the groups of four rows. 6 x 4 accumulators of 4 lanes, 4 registers of the right side, 2 of the
//! left: 30 of 32 registers. One step of the depth is 6 loads and 24 `sdot`.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};
use std::arch::aarch64::*;
use std::arch::asm;

const MR: usize = 6;
const LANES: usize = 4;
const VECTORS: usize = 4;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

pub(crate) const PRODUCT: Int8Product = Int8Product {
    name: super::NAME,
    geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Signed },
    tile,
    scores,
};

int8_tiles! {
    features: "neon,dotprod",
    integers: int32x4_t, vld1q_s32, vdupq_n_s32, vst1q_s32,
    pairs: |sum, x, y| crate::cpu::aarch64::neon::add_pairs(sum, x, y),
    convert: vcvtq_f32_s32,
    floats: vld1q_f32, vdupq_n_f32, vmulq_f32, vaddq_f32, vst1q_f32,
}

/// One row of the tile: adds to lane `i` of each sum the products of group `i` of its `b` with
/// group `INDEX` of `a`.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn add_row<const INDEX: i32>(
    sums: &mut [int32x4_t; VECTORS],
    b: &[int8x16_t; VECTORS],
    a: int8x16_t,
) {
    for v in 0..VECTORS {
        // SAFETY: the instruction is enabled above and touches registers only.
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {b:v}.16b, {a:v}.4b[{index}]",
                sum = inout(vreg) sums[v],
                b = in(vreg) b[v],
                a = in(vreg) a,
                index = const INDEX,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
    }
}

/// The sums of `ROWS` rows, 16 columns each.
///
/// # Safety
/// As for [`Int8Product::tile`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[int32x4_t; VECTORS]; ROWS] {
    // SAFETY: by contract.
    let mut sums = unsafe { start::<ROWS>(input) };
    for group in 0..input.groups {
        let mut b = [vdupq_n_s8(0); VECTORS];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: the right panel holds `groups` times 64 bytes by contract.
            *b = unsafe { vld1q_s8(input.rhs.add((group * VECTORS + v) * LANES * GROUP)) };
        }
        // SAFETY: the left panel holds `groups` times 24 bytes by contract, 16 of them for the
        // first four rows and 8 for the other two.
        let (a0, a4) = unsafe {
            let a = input.lhs.cast::<i8>().add(group * MR * GROUP);
            let last = if ROWS > 4 { vld1_s8(a.add(16)) } else { vdup_n_s8(0) };
            (vld1q_s8(a), vcombine_s8(last, vdup_n_s8(0)))
        };
        add_row::<0>(&mut sums[0], &b, a0);
        // Written out, because a loop over rows is not unrolled around inline assembly, and sums
        // that are indexed at run time live in memory.
        if ROWS > 1 {
            add_row::<1>(&mut sums[1], &b, a0);
        }
        if ROWS > 2 {
            add_row::<2>(&mut sums[2], &b, a0);
        }
        if ROWS > 3 {
            add_row::<3>(&mut sums[3], &b, a0);
        }
        if ROWS > 4 {
            add_row::<0>(&mut sums[4], &b, a4);
        }
        if ROWS > 5 {
            add_row::<1>(&mut sums[5], &b, a4);
        }
    }
    sums
}
