//! Plain Rust in f32, on every machine.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ValueFormat};

pub(crate) struct Portable;

// SAFETY: `panel` stays within the lengths of its contract; no special instruction is used.
unsafe impl PvKernel for Portable {
    fn name(&self) -> &'static str {
        "portable-f32"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::F32
    }

    fn group(&self) -> usize {
        1
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn panel(&self, panel: PvPanel) {
        let width = panel.vectors * LANES;
        for row in 0..panel.rows {
            // SAFETY: `groups` probabilities and `width` sums in each row by contract.
            let (probs, sums) = unsafe {
                (
                    std::slice::from_raw_parts(panel.probs_of::<f32>(row), panel.groups),
                    std::slice::from_raw_parts_mut(panel.sums_of(row, 0), width),
                )
            };
            for (key, &p) in probs.iter().enumerate() {
                // SAFETY: the panel holds `groups` rows of `width` values by contract.
                let values = unsafe {
                    std::slice::from_raw_parts(panel.values.cast::<f32>().add(key * width), width)
                };
                sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += p * v);
            }
        }
    }
}
