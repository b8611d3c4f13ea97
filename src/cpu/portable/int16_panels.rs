//! Plain Rust in int16, on every machine. One element of the depth a group: 64-bit Arm has an instruction
//! that multiplies and adds eight of them, which the compiler finds.

use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::ops::Range;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int16,
    group: 1,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

unsafe fn multiply(panel: Panel) {
    for (run, depth) in panel.runs(1) {
        for part in panel.parts(1, Format::Int16.size()) {
            for row in 0..part.rows {
                // SAFETY: every run and its scales, `groups` elements of each row and vectors of the
                // matrix, and a vector of sums, by contract.
                unsafe { add(&part, row, run, depth.clone()) };
            }
        }
    }
}

/// Adds one run to 16 columns of one row.
///
/// # Safety
/// `part` is valid as the contract says, of one vector, and holds the row, the run and its depth.
#[inline]
unsafe fn add(part: &Panel, row: usize, run: usize, depth: Range<usize>) {
    let mut sums = [0i32; LANES];
    for k in depth {
        // SAFETY: by contract.
        let (x, matrix) = unsafe {
            (*part.lhs_of::<i16>(row).add(k), part.group(k, 0).cast::<[i16; LANES]>().read())
        };
        for (sum, element) in sums.iter_mut().zip(matrix) {
            *sum += i32::from(x) * i32::from(element);
        }
    }
    // SAFETY: by contract.
    let (row_scale, column_scales, out) = unsafe {
        (
            *part.row_scale(row, run),
            &*part.column_scale(0, run).cast::<[f32; LANES]>(),
            &mut *part.sums_of(row, 0).cast::<[f32; LANES]>(),
        )
    };
    for ((out, sum), column_scale) in out.iter_mut().zip(sums).zip(column_scales) {
        *out += sum as f32 * row_scale * column_scale;
    }
}
