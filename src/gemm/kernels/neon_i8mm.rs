//! NEON with the matrix extension: `smmla` multiplies two rows of eight i8 by two columns of eight
//! and adds the 2 x 2 products to a register, twice the work of `sdot`.
//!
//! 4 x 4 accumulators of 2 x 2 lanes, 4 registers of each side: 24 of 32 registers, and the square
//! tile has the fewest loads for its size: 8 for 16 `smmla`. The accumulator of rows `r`, `r + 1`
//! and columns `c`, `c + 1` holds `[rc, r(c+1), (r+1)c, (r+1)(c+1)]`; two neighbours are
//! interleaved into rows of four columns when they are stored.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use super::neon::{Columns, LANES};
use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, ScoreTile, TileInput};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};

const MR: usize = 8;
const NR: usize = 8;
const GROUP: usize = 8;

/// Pairs of columns in a tile.
const PAIRS: usize = NR / 2;

/// Bytes of one register: two rows of one group.
const PAIR_BYTES: usize = 2 * GROUP;

pub(crate) struct NeonI8mm;

// SAFETY: both functions stay within the lengths of their contract; the instructions are checked.
unsafe impl Kernel for NeonI8mm {
    fn name(&self) -> &'static str {
        "aarch64-neon-i8mm"
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Signed }
    }

    fn is_available(&self) -> bool {
        is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("i8mm")
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: the matrix extension is there and the pointers are valid, by contract.
        unsafe {
            match input.rows.div_ceil(2) {
                1 => store::<1>(input, out, stride),
                2 => store::<2>(input, out, stride),
                3 => store::<3>(input, out, stride),
                _ => store::<4>(input, out, stride),
            }
        }
    }

    unsafe fn score_tile(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: the matrix extension is there and the pointers are valid, by contract.
        unsafe {
            match input.rows.div_ceil(2) {
                1 => store_scores::<1>(input, scores),
                2 => store_scores::<2>(input, scores),
                3 => store_scores::<3>(input, scores),
                _ => store_scores::<4>(input, scores),
            }
        }
    }
}

/// Adds to `sum` the 2 x 2 products of the rows of `a` with those of `b`.
#[target_feature(enable = "neon,i8mm")]
#[inline]
fn smmla(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction is enabled above and touches registers only.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The sums of `ROW_PAIRS` pairs of rows and 4 pairs of columns.
///
/// # Safety
/// As for [`Kernel::tile`], and `ROW_PAIRS` is at most 4.
#[target_feature(enable = "neon,i8mm")]
#[inline]
unsafe fn sums<const ROW_PAIRS: usize>(input: TileInput) -> [[int32x4_t; PAIRS]; ROW_PAIRS] {
    let mut init = [vdupq_n_s32(0); PAIRS];
    for (pair, init) in init.iter_mut().enumerate() {
        // SAFETY: `init` holds 8 elements by contract. Both rows start from the same two.
        let columns = unsafe { vld1_s32(input.init.add(2 * pair)) };
        *init = vcombine_s32(columns, columns);
    }
    let mut sums = [init; ROW_PAIRS];
    for group in 0..input.groups {
        let mut b = [vdupq_n_s8(0); PAIRS];
        for (pair, b) in b.iter_mut().enumerate() {
            // SAFETY: the right panel holds `groups` times 64 bytes by contract.
            *b = unsafe { vld1q_s8(input.rhs.add(group * NR * GROUP + pair * PAIR_BYTES)) };
        }
        for (pair, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the left panel holds `groups` times 64 bytes by contract.
            let a = unsafe {
                vld1q_s8(input.lhs.cast::<i8>().add(group * MR * GROUP + pair * PAIR_BYTES))
            };
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = smmla(*sum, a, b);
            }
        }
    }
    sums
}

/// Rows of four columns from the sums of two neighbouring pairs of columns.
#[target_feature(enable = "neon")]
#[inline]
fn rows_of(left: int32x4_t, right: int32x4_t) -> [int32x4_t; 2] {
    let (left, right) = (vreinterpretq_s64_s32(left), vreinterpretq_s64_s32(right));
    [vreinterpretq_s32_s64(vzip1q_s64(left, right)), vreinterpretq_s32_s64(vzip2q_s64(left, right))]
}

#[target_feature(enable = "neon,i8mm")]
unsafe fn store<const ROW_PAIRS: usize>(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROW_PAIRS>(input) };
    for (pair, sums) in sums.into_iter().enumerate() {
        for (half, quad) in sums.as_chunks::<2>().0.iter().enumerate() {
            let rows = rows_of(quad[0], quad[1]).into_iter().zip(2 * pair..input.rows);
            for (sum, row) in rows {
                // SAFETY: `row` < `rows`, and its output is valid for 8 writes by contract.
                unsafe { vst1q_s32(out.add(row * stride + half * LANES), sum) };
            }
        }
    }
}

#[target_feature(enable = "neon,i8mm")]
unsafe fn store_scores<const ROW_PAIRS: usize>(input: TileInput, scores: ScoreTile) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROW_PAIRS>(input) };
    for half in 0..NR / LANES {
        let column = half * LANES;
        // SAFETY: 8 columns by contract.
        let columns = unsafe { Columns::load(&scores, column) };
        for (pair, sums) in sums.iter().enumerate() {
            let rows = rows_of(sums[2 * half], sums[2 * half + 1]);
            for (sum, row) in rows.into_iter().zip(2 * pair..input.rows) {
                // SAFETY: `row` < `rows`, by contract.
                unsafe { columns.write(&scores, (row, column), sum) };
            }
        }
    }
}
