//! Plain Rust, on every machine.

use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, TileInput};

const MR: usize = 4;
const NR: usize = 8;
const GROUP: usize = 2;

pub(crate) struct Portable;

// SAFETY: `tile` stays within the lengths of its contract; no special instruction is used.
unsafe impl Kernel for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Wide }
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        let groups = input.groups;
        // SAFETY: lengths and alignment by contract (packed buffers start on cache lines, and a
        // left panel is a whole number of i16).
        let (lhs, rhs, init) = unsafe {
            (
                std::slice::from_raw_parts(input.lhs.cast::<[[i16; GROUP]; MR]>(), groups),
                std::slice::from_raw_parts(input.rhs.cast::<[[i8; GROUP]; NR]>(), groups),
                &*input.init.cast::<[i32; NR]>(),
            )
        };
        let mut sums = [*init; MR];
        for (a, b) in lhs.iter().zip(rhs) {
            // Pairs of 16-bit products are what SSE2's pmaddwd and its kin sum in one step.
            let b = b.map(|pair| pair.map(i16::from));
            for (sums, a) in sums.iter_mut().zip(a) {
                for (sum, b) in sums.iter_mut().zip(&b) {
                    let product =
                        i32::from(a[0]) * i32::from(b[0]) + i32::from(a[1]) * i32::from(b[1]);
                    *sum = sum.wrapping_add(product);
                }
            }
        }
        for (row, sums) in sums.iter().take(input.rows).enumerate() {
            // SAFETY: row `row` of the output is valid for NR writes by contract.
            unsafe { out.add(row * stride).cast::<[i32; NR]>().write_unaligned(*sums) };
        }
    }
}
