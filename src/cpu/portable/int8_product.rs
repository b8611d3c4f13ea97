//! Plain Rust, on every machine.

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};

const MR: usize = 4;
const NR: usize = 8;
const GROUP: usize = 2;

pub(crate) const PRODUCT: Int8Product = Int8Product {
    name: super::NAME,
    geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Wide },
    tile,
    scores,
};

unsafe fn tile(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums(input) };
    for (row, sums) in sums.iter().take(input.rows).enumerate() {
        // SAFETY: row `row` of the output is valid for NR writes by contract.
        unsafe { out.add(row * stride).cast::<[i32; NR]>().write_unaligned(*sums) };
    }
}

unsafe fn scores(input: TileInput, scores: ScoreTile) {
    for row in (0..input.rows).step_by(MR) {
        // SAFETY: rows that are there, by contract.
        unsafe {
            let input = input.rows_from(row, MR);
            scores.rows_from(row).write(sums(input).as_flattened(), input.rows, NR);
        }
    }
}

/// All rows of a tile.
///
/// # Safety
/// As for [`Int8Product::tile`].
unsafe fn sums(input: TileInput) -> [[i32; NR]; MR] {
    let groups = input.groups;
    // SAFETY: lengths by contract.
    let (rhs, init) = unsafe {
        (
            std::slice::from_raw_parts(input.rhs.cast::<[[i8; GROUP]; NR]>(), groups),
            &*input.init.cast::<[i32; NR]>(),
        )
    };
    // What is missing in the last rows repeats the last of them.
    let mut lhs = [&[][..]; MR];
    for (row, lhs) in lhs.iter_mut().enumerate() {
        // SAFETY: lengths and alignment by contract (packed buffers start on cache lines, and a row is a
        // whole number of i16).
        *lhs = unsafe {
            let row = input.lhs.add(row.min(input.rows - 1) * input.row_bytes);
            std::slice::from_raw_parts(row.cast::<[i16; GROUP]>(), groups)
        };
    }
    let mut sums = [*init; MR];
    for (row, sums) in sums.iter_mut().enumerate().take(input.rows) {
        // SAFETY: pairs of rows that are there, and of whole panels of columns, by contract.
        let (row, columns) = unsafe {
            let row = input.row_zeros.add(row * input.zero_groups);
            (
                std::slice::from_raw_parts(row, input.zero_groups),
                std::slice::from_raw_parts(input.column_zeros.cast(), input.zero_groups),
            )
        };
        row.iter().zip(columns).for_each(|(x, y): (_, &[_; NR])| add_pairs(sums, *x, y));
    }
    for (group, b) in rhs.iter().enumerate() {
        // Pairs of 16-bit products are what SSE2's pmaddwd and its kin sum in one step.
        let b = b.map(|pair| pair.map(i16::from));
        for (sums, a) in sums.iter_mut().zip(&lhs) {
            add_pairs(sums, a[group], &b);
        }
    }
    sums
}

#[inline(always)]
fn add_pairs(sums: &mut [i32; NR], a: [i16; 2], b: &[[i16; 2]; NR]) {
    for (sum, b) in sums.iter_mut().zip(b) {
        // One product of the smallest i16 with itself fits, two of them do not.
        let product = i32::from(a[0]) * i32::from(b[0]);
        let product = product.wrapping_add(i32::from(a[1]) * i32::from(b[1]));
        *sum = sum.wrapping_add(product);
    }
}
