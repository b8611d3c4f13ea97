//! Plain Rust in int8, on every machine.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ValueFormat};
use std::ops::Range;

pub(crate) struct PortableInt8;

// SAFETY: `panel` stays within the lengths of its contract; no special instruction is used.
unsafe impl PvKernel for PortableInt8 {
    fn name(&self) -> &'static str {
        "portable-int8"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::Int8
    }

    fn group(&self) -> usize {
        1
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn panel(&self, panel: PvPanel) {
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
}

/// Adds one run to 16 channels of one row.
///
/// # Safety
/// `panel` is valid as for [`PvKernel::panel`], and holds the row, the vector, the run and its keys.
unsafe fn add(panel: &PvPanel, row: usize, vector: usize, run: usize, keys: Range<usize>) {
    let mut sums = [0i32; LANES];
    for key in keys {
        let at = (key * panel.vectors + vector) * LANES;
        // SAFETY: by contract.
        let (p, values) = unsafe {
            (*panel.probs_of::<u8>(row).add(key), &*panel.values.add(at).cast::<[i8; LANES]>())
        };
        for (sum, &value) in sums.iter_mut().zip(values) {
            *sum += i32::from(p) * i32::from(value);
        }
    }
    // SAFETY: by contract.
    let (scale, out) = unsafe {
        let out = panel.sums_of(row, vector * LANES).cast::<[f32; LANES]>();
        ((*panel.run_of(row, run)).scale, &mut *out)
    };
    for (out, sum) in out.iter_mut().zip(sums) {
        *out += sum as f32 * scale;
    }
}
