//! NEON with the matrix extension: `smmla` multiplies two rows of eight i8 by two columns of eight
//! and adds the 2 x 2 products to a register, twice the work of `sdot`.
//!
//! 4 x 4 accumulators of 2 x 2 lanes, 4 registers of each side: 24 of 32 registers, and the square
//! tile has the fewest loads for its size: 8 for 16 `smmla`. The accumulator of rows `r`, `r + 1`
//! and columns `c`, `c + 1` holds `[rc, r(c+1), (r+1)c, (r+1)(c+1)]`; two neighbours are
//! interleaved into rows of four columns when they are stored.
//!
//! Rust's intrinsic is not stable yet, hence the inline assembly for the one instruction.

use crate::cpu::aarch64::neon::add_pairs;
use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};
use std::arch::aarch64::*;
use std::arch::asm;

const MR: usize = 8;
const LANES: usize = 4;
const NR: usize = 8;
const GROUP: usize = 8;

/// Pairs of columns in a tile.
const PAIRS: usize = NR / 2;

/// Bytes of one register: two rows of one group.
const PAIR_BYTES: usize = 2 * GROUP;

pub(crate) const PRODUCT: Int8Product = Int8Product {
    name: super::NAME,
    geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Signed },
    tile,
    scores,
};

#[target_feature(enable = "neon,i8mm")]
unsafe fn tile(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    unsafe { for_row_pairs!(input.rows, store, (input, out, stride)) }
}

#[target_feature(enable = "neon,i8mm")]
unsafe fn scores(input: TileInput, scores: ScoreTile) {
    for row in (0..input.rows).step_by(MR) {
        // SAFETY: rows that are there, by contract.
        unsafe {
            let (input, scores) = (input.rows_from(row, MR), scores.rows_from(row));
            for_row_pairs!(input.rows, store_scores, (input, scores));
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
/// As for [`Int8Product::tile`], and `ROW_PAIRS` is at most 4.
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
    for group in 0..input.zero_groups {
        for (pair, sums) in sums.iter_mut().enumerate() {
            // SAFETY: a pair of i16 of each group for every row and for 8 columns, by contract. The last
            // row of an odd number is taken twice, and what comes of it the second time is dropped.
            unsafe {
                let row = |row: usize| {
                    let row = (2 * pair + row).min(input.rows - 1);
                    let at = input.row_zeros.add(row * input.zero_groups + group);
                    vdup_n_s32(at.cast::<i32>().read_unaligned())
                };
                let rows = vcombine_s32(row(0), row(1));
                for (columns, sum) in sums.iter_mut().enumerate() {
                    let columns = input.column_zeros.add(group * NR + 2 * columns);
                    let columns = vld1_s32(columns.cast());
                    *sum = add_pairs(*sum, rows, vcombine_s32(columns, columns));
                }
            }
        }
    }
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

/// Scales and biases of four columns.
#[derive(Clone, Copy)]
struct Columns {
    scale: float32x4_t,
    bias: float32x4_t,
}

impl Columns {
    /// Those from `column` on.
    ///
    /// # Safety
    /// `scores` holds scales and biases of `column + 4` columns.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(scores: &ScoreTile, column: usize) -> Self {
        // SAFETY: by contract.
        unsafe {
            Self {
                scale: vld1q_f32(scores.column_scales.add(column)),
                bias: vld1q_f32(scores.column_biases.add(column)),
            }
        }
    }

    /// Writes the scores of `sums` to `row`, from `column` on.
    ///
    /// # Safety
    /// `scores` holds a scale and a bias for `row`, and its output room for these four columns.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn write(self, scores: &ScoreTile, (row, column): (usize, usize), sums: int32x4_t) {
        // SAFETY: by contract.
        let (scale, bias) = unsafe { (*scores.row_scales.add(row), *scores.row_biases.add(row)) };
        // Separate multiplications and additions: see `ScoreTile` on why none may be fused.
        let x = vmulq_f32(vmulq_f32(vcvtq_f32_s32(sums), vdupq_n_f32(scale)), self.scale);
        let x = vaddq_f32(vaddq_f32(x, self.bias), vdupq_n_f32(bias));
        // SAFETY: by contract.
        unsafe { vst1q_f32(scores.out.add(row * scores.stride + column), x) };
    }
}
