//! Plain Rust in f32, on every machine.

use super::kernel::{LANES, PvKernel, PvTile, ValueFormat};

pub(crate) struct Portable;

// SAFETY: `tile` stays within the lengths of its contract; no special instruction is used.
unsafe impl PvKernel for Portable {
    fn name(&self) -> &'static str {
        "portable-f32"
    }

    fn format(&self) -> ValueFormat {
        ValueFormat::F32
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn tile(&self, tile: PvTile) {
        let width = tile.vectors * LANES;
        for row in 0..tile.rows {
            // SAFETY: `groups` probabilities in each row and `width` sums by contract; rows are
            // whole f32 apart.
            let (probs, out) = unsafe {
                let probs = tile.probs.add(row * tile.probs_stride).cast::<f32>();
                let out = tile.out.add(row * tile.out_stride);
                (
                    std::slice::from_raw_parts(probs, tile.groups),
                    std::slice::from_raw_parts_mut(out, width),
                )
            };
            for (key, &p) in probs.iter().enumerate() {
                // SAFETY: the panel holds `groups` rows of `width` values by contract.
                let values = unsafe {
                    std::slice::from_raw_parts(tile.values.cast::<f32>().add(key * width), width)
                };
                out.iter_mut().zip(values).for_each(|(o, v)| *o += p * v);
            }
        }
    }
}
