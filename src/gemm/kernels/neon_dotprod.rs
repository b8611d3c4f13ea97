//! NEON with the dot product extension: `sdot` adds four i8 x i8 products to each of 4 lanes.
//!
//! Its form by element multiplies by one group of four out of a register, so that one load brings
//! the groups of four rows. 6 x 4 accumulators of 4 lanes, 4 registers of the right side, 2 of the
//! left: 30 of 32 registers. One step of the depth is 6 loads and 24 `sdot`.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use super::neon::{Columns, LANES};
use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, ScoreTile, TileInput};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

const MR: usize = 6;
const VECTORS: usize = 4;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

pub(crate) struct NeonDotprod;

// SAFETY: both functions stay within the lengths of their contract; the instructions are checked.
unsafe impl Kernel for NeonDotprod {
    fn name(&self) -> &'static str {
        "aarch64-neon-dotprod"
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Signed }
    }

    fn is_available(&self) -> bool {
        is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod")
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: the dot product is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store, (input, out, stride)) }
    }

    unsafe fn score_tile(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: the dot product is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store_scores, (input, scores)) }
    }
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
/// As for [`Kernel::tile`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[int32x4_t; VECTORS]; ROWS] {
    let mut init = [vdupq_n_s32(0); VECTORS];
    for (v, init) in init.iter_mut().enumerate() {
        // SAFETY: `init` holds 16 elements by contract.
        *init = unsafe { vld1q_s32(input.init.add(v * LANES)) };
    }
    let mut sums = [init; ROWS];
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

#[target_feature(enable = "neon,dotprod")]
unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for (row, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: row `row` of the output is valid for 16 writes by contract.
            unsafe { vst1q_s32(out.add(row * stride + v * LANES), sum) };
        }
    }
}

#[target_feature(enable = "neon,dotprod")]
unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for v in 0..VECTORS {
        // SAFETY: 16 columns and `rows` rows by contract.
        unsafe {
            let columns = Columns::load(&scores, v * LANES);
            for (row, sums) in sums.iter().enumerate() {
                columns.write(&scores, (row, v * LANES), sums[v]);
            }
        }
    }
}
