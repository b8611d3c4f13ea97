//! Plain Rust, on every machine. LLVM makes vectors of it where they are part of the baseline (SSE2,
//! NEON).

use super::{Format, Job, ProductKernel};

/// Elements that are widened at a time.
const LANES: usize = 16;

pub(super) struct Portable;

// SAFETY: `product` stays within the lengths of its contract; no special instruction is used.
unsafe impl ProductKernel for Portable {
    #[cfg(test)]
    fn name(&self) -> &'static str {
        "portable"
    }

    fn is_available(&self) -> bool {
        true
    }

    unsafe fn product(&self, format: Format, job: Job) {
        // SAFETY: by contract; formats of several bytes are read as arrays of bytes.
        unsafe {
            match format {
                Format::F32 => rows(job, f32::from_ne_bytes),
                Format::F16 => rows(job, f16),
                Format::Bf16 => {
                    rows(job, |x| f32::from_bits(u32::from(u16::from_le_bytes(x)) << 16))
                }
                Format::Int8 => rows(job, |[x]: [u8; 1]| f32::from(x as i8)),
            }
        }
    }
}

/// A finite f16. The bits of exponent and mantissa moved into their places in an f32 are the number
/// times `2^-112`, and subnormal ones become normal by the multiplication.
#[inline(always)]
fn f16(stored: [u8; 2]) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(u16::from_le_bytes(stored));
    f32::from_bits((bits & 0x8000) << 16 | (bits & 0x7fff) << 13) * SCALE
}

/// # Safety
/// As for [`ProductKernel::product`]; elements have `SIZE` bytes.
#[inline(always)]
unsafe fn rows<const SIZE: usize>(job: Job, widen: impl Fn([u8; SIZE]) -> f32) {
    // SAFETY: lengths by contract.
    let (values, sums) = unsafe {
        (
            std::slice::from_raw_parts(job.values.cast::<[u8; SIZE]>(), job.keys * job.dim),
            std::slice::from_raw_parts_mut(job.sums, job.rows * job.dim),
        )
    };
    for (key, row) in values.chunks_exact(job.dim).enumerate() {
        for (start, values) in (0..).step_by(LANES).zip(row.chunks(LANES)) {
            let mut wide = [0f32; LANES];
            wide.iter_mut().zip(values).for_each(|(wide, x)| *wide = widen(*x));
            for (row, sums) in sums.chunks_exact_mut(job.dim).enumerate() {
                // SAFETY: `keys` probabilities in each of `rows` rows by contract.
                let p = unsafe { *job.probs.add(row * job.stride + key) };
                let sums = &mut sums[start..start + values.len()];
                sums.iter_mut().zip(wide).for_each(|(sum, x)| *sum += p * x);
            }
        }
    }
}
