//! Plain Rust in int8, on every machine.

use crate::pv::kernel::{LANES, PvKernel, PvPanel, ValueFormat};

const GROUP: usize = 4;

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
        GROUP
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn panel(&self, panel: PvPanel) {
        let width = panel.vectors * LANES;
        for row in 0..panel.rows {
            // SAFETY: `groups` times four probabilities and `width` sums in each row by contract.
            let (probs, sums) = unsafe {
                (
                    std::slice::from_raw_parts(panel.probs_of::<[u8; GROUP]>(row), panel.groups),
                    std::slice::from_raw_parts_mut(panel.sums_of::<i32>(row, 0), width),
                )
            };
            for (group, p) in probs.iter().enumerate() {
                // SAFETY: the panel holds `groups` times four keys of `width` values by contract.
                let values = unsafe {
                    let values = panel.values.cast::<[i8; GROUP]>().add(group * width);
                    std::slice::from_raw_parts(values, width)
                };
                for (sum, v) in sums.iter_mut().zip(values) {
                    let products = p.iter().zip(v).map(|(&p, &v)| i32::from(p) * i32::from(v));
                    *sum = sum.wrapping_add(products.sum::<i32>());
                }
            }
        }
    }
}
