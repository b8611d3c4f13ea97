//! Plain Rust, f32 on the left, on every machine. Products and sums are rounded apart: without an
//! instruction, a fused multiply-add is a call.

use crate::cpu::contracts::{Format, LANES, Panel, PanelProduct, StoredProduct};

pub(crate) const PANELS: PanelProduct = PanelProduct {
    name: super::NAME,
    format: Format::F32,
    group: 1,
    vectors: 1,
    bias: 0,
    multiply: f32,
};

pub(crate) const STORED: StoredProduct =
    StoredProduct { name: super::NAME, f32, f16, bf16, int8: super::stored_int8::multiply };

unsafe fn f32(panel: Panel) {
    // SAFETY: by contract.
    unsafe { multiply(panel, f32::from_ne_bytes) }
}

unsafe fn f16(panel: Panel) {
    // SAFETY: by contract.
    unsafe { multiply(panel, widen_f16) }
}

unsafe fn bf16(panel: Panel) {
    // SAFETY: by contract.
    unsafe { multiply(panel, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16)) }
}

/// A finite f16. The bits of exponent and mantissa moved into their places in an f32 are the number
/// times `2^-112`, and subnormal ones become normal by the multiplication.
#[inline(always)]
fn widen_f16(stored: [u8; 2]) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(u16::from_le_bytes(stored));
    f32::from_bits((bits & 0x8000) << 16 | (bits & 0x7fff) << 13) * SCALE
}

/// # Safety
/// That of the contract; elements of the matrix have `SIZE` bytes.
#[inline(always)]
unsafe fn multiply<const SIZE: usize>(panel: Panel, widen: impl Fn([u8; SIZE]) -> f32) {
    for part in panel.parts(1, SIZE) {
        for row in 0..part.rows {
            let mut sums = [0f32; LANES];
            for k in 0..part.groups {
                // SAFETY: `groups` elements in each row, and as many vectors of the matrix, by
                // contract.
                let (x, matrix) = unsafe {
                    let matrix = part.group(k, 0).cast::<[[u8; SIZE]; LANES]>();
                    (*part.lhs_of::<f32>(row).add(k), matrix.read())
                };
                for (sum, element) in sums.iter_mut().zip(matrix) {
                    *sum += x * widen(element);
                }
            }
            let start = part.start_of(row, 0).cast::<[f32; LANES]>();
            if !start.is_null() {
                // SAFETY: a vector of starts in each row by contract.
                let start = unsafe { start.read() };
                sums.iter_mut().zip(start).for_each(|(sum, start)| *sum += start);
            }
            // SAFETY: a vector of sums in each row by contract.
            unsafe { part.sums_of(row, 0).cast::<[f32; LANES]>().write(sums) };
        }
    }
}
