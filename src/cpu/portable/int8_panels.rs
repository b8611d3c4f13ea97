//! Plain Rust in int8, on every machine.

use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, VECTORS};
use std::ops::Range;

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::Int8,
    group: 1,
    vectors: VECTORS,
    bias: 0,
    multiply,
};

unsafe fn multiply(panel: Panel) {
    for row in 0..panel.rows {
        for (run, keys) in panel.runs(1) {
            for vector in 0..panel.vectors {
                // SAFETY: every run of each row, `groups` probabilities and `vectors * LANES`
                // sums in it, and `groups` rows of `vectors * LANES` values, by contract.
                unsafe { add(&panel, row, vector, run, keys.clone()) };
            }
        }
    }
}

/// Adds one run to 16 channels of one row.
///
/// # Safety
/// `panel` is valid as the contract says, and holds the row, the vector, the run and its keys.
unsafe fn add(panel: &Panel, row: usize, vector: usize, run: usize, keys: Range<usize>) {
    let mut sums = [0i32; LANES];
    for key in keys {
        // SAFETY: by contract.
        let (p, values) = unsafe {
            (
                *panel.lhs_of::<u8>(row).add(key),
                &*panel.group(key, vector * LANES).cast::<[i8; LANES]>(),
            )
        };
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += i32::from(p) * i32::from(value);
        }
    }
    // SAFETY: by contract, which has scales of 16 columns for every run.
    let (scale, columns, out) = unsafe {
        let out = panel.sums_of(row, vector * LANES).cast::<[f32; LANES]>();
        let columns = panel.column_scale(vector * LANES, run).cast::<[f32; LANES]>();
        ((*panel.run_of(row, run)).scale, &*columns, &mut *out)
    };
    for ((out, sum), column) in out.iter_mut().zip(sums).zip(columns) {
        *out += sum as f32 * scale * column;
    }
}
