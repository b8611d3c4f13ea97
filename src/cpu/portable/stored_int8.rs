//! Plain Rust, int8 as it is stored, int16 on the left.

use crate::cpu::contracts::{LANES, Panel};
use std::ops::Range;

/// # Safety
/// That of the contract.
pub(crate) unsafe fn multiply(panel: Panel) {
    for part in panel.parts(1, 1) {
        for (run, keys) in part.runs(1) {
            for row in 0..part.rows {
                // SAFETY: every run and its scales, its elements of each row and vectors of the matrix, and a
                // vector of sums, by contract.
                unsafe { add(&part, row, run, keys.clone()) };
            }
        }
    }
}

/// Adds one run to 16 columns of one row.
///
/// # Safety
/// `part` is valid as the contract says, of one vector, and holds the row, the run and its keys.
#[inline]
unsafe fn add(part: &Panel, row: usize, run: usize, keys: Range<usize>) {
    let mut sums = [0i32; LANES];
    for key in keys {
        // SAFETY: by contract.
        let (x, matrix) = unsafe {
            (*part.lhs_of::<i16>(row).add(key), part.group(key, 0).cast::<[i8; LANES]>().read())
        };
        for (sum, element) in sums.iter_mut().zip(matrix) {
            *sum += i32::from(x) * i32::from(element);
        }
    }
    // SAFETY: by contract.
    let (scale, out) =
        unsafe { (*part.row_scale(row, run), &mut *part.sums_of(row, 0).cast::<[f32; LANES]>()) };
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum as f32 * scale);
}
