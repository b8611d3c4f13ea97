//! What the kernels over Arm's matrix instructions share. Such an instruction multiplies two rows
//! of 8 bytes by two columns of 8 bytes and adds the 2 x 2 products to a register:
//!
//! ```text
//! rows r, r + 1 x columns c, c + 1:  [rc, r(c+1), (r+1)c, (r+1)(c+1)]
//! ```
//!
//! A panel is taken 16 channels at a time: 3 pairs of rows x 8 pairs of columns are 24
//! accumulators, 3 registers hold probabilities, and values go through the rest. One group of keys
//! is 14 loads and 24 instructions.

use crate::cpu::contracts::{LANES, Panel};
use std::arch::aarch64::*;

/// Bytes of a group of keys: one row, or one column.
pub(super) const GROUP_BYTES: usize = 8;
/// Pairs of columns in a vector of 16 channels.
pub(super) const COLUMN_PAIRS: usize = LANES / 2;

/// The values of one group of keys for a pair of columns.
///
/// # Safety
/// NEON is there, and `tile` holds the group, the vector, and the pair in it.
#[target_feature(enable = "neon")]
#[inline]
pub(super) unsafe fn columns(tile: &Panel, group: usize, vector: usize, pair: usize) -> uint8x16_t {
    let channel = vector * LANES + 2 * pair;
    // SAFETY: by contract.
    unsafe { vld1q_u8(tile.group(group, channel * GROUP_BYTES)) }
}

/// Where the probabilities of `PAIRS` pairs of rows start. The last pair of an odd number of rows
/// is the last row twice.
#[inline(always)]
pub(super) fn row_pairs<const PAIRS: usize>(tile: &Panel) -> [[*const u8; 2]; PAIRS] {
    let mut pairs = [[std::ptr::null(); 2]; PAIRS];
    for (i, pair) in pairs.iter_mut().enumerate() {
        *pair = [tile.lhs_of(2 * i), tile.lhs_of((2 * i + 1).min(tile.rows - 1))];
    }
    pairs
}

/// The probabilities of one group of keys for a pair of rows.
///
/// # Safety
/// NEON is there, and both rows hold the group.
#[target_feature(enable = "neon")]
#[inline]
pub(super) unsafe fn rows(pair: [*const u8; 2], group: usize) -> uint8x16_t {
    // SAFETY: by contract.
    unsafe {
        let [first, second] = pair.map(|row| row.add(group * GROUP_BYTES));
        vcombine_u8(vld1_u8(first), vld1_u8(second))
    }
}

/// Four columns of both rows of a pair, from the sums of two neighbouring pairs of columns.
#[target_feature(enable = "neon")]
#[inline]
pub(super) fn rows_of(left: uint64x2_t, right: uint64x2_t) -> [uint64x2_t; 2] {
    [vzip1q_u64(left, right), vzip2q_u64(left, right)]
}
