//! AVX-512: 4 x 4 accumulators of 16 lanes, 4 vectors of values, 4 probabilities: 24 of 32
//! registers. A row of values of 64 channels is 4 loads that widen, and 4 multiply-adds a row of
//! probabilities.

use super::{Format, Job, ProductKernel};
use std::arch::x86_64::*;

const LANES: usize = 16;
const VECTORS: usize = 4;

pub(super) struct Avx512;

// SAFETY: `product` stays within the lengths of its contract; the instructions are checked.
unsafe impl ProductKernel for Avx512 {
    #[cfg(test)]
    fn name(&self) -> &'static str {
        "x86_64-avx512"
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
    }

    unsafe fn product(&self, format: Format, job: Job) {
        // SAFETY: the instructions are there and the pointers are valid, by contract.
        unsafe {
            match format {
                Format::F32 => f32(job),
                Format::F16 => f16(job),
                Format::Bf16 => bf16(job),
                Format::Int8 => int8(job),
            }
        }
    }
}

/// A function for one format: a target feature is an attribute of a function, and what it enables
/// must be inlined into it.
macro_rules! for_format {
    ($name:ident, $size:literal, $load:expr) => {
        /// # Safety
        /// AVX-512 with BW and VL is there; the rest is that of [`ProductKernel::product`].
        #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
        unsafe fn $name(job: Job) {
            let load = $load;
            // SAFETY: by contract; `load` reads the elements of its mask, `$size` bytes each.
            unsafe {
                match job.rows {
                    1 => all_channels::<1, $size>(job, load),
                    2 => all_channels::<2, $size>(job, load),
                    3 => all_channels::<3, $size>(job, load),
                    _ => all_channels::<4, $size>(job, load),
                }
            }
        }
    };
}

for_format!(f32, 4, |from: *const u8, mask| {
    // SAFETY: the elements of the mask are valid by contract.
    unsafe { _mm512_maskz_loadu_ps(mask, from.cast()) }
});
for_format!(f16, 2, |from: *const u8, mask| {
    // SAFETY: as above.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) })
});
for_format!(bf16, 2, |from: *const u8, mask| {
    // SAFETY: as above.
    let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) });
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
});
for_format!(int8, 1, |from: *const u8, mask| {
    // SAFETY: as above.
    let codes = unsafe { _mm_maskz_loadu_epi8(mask, from.cast()) };
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))
});

/// # Safety
/// As for [`ProductKernel::product`]; `load(p, mask)` reads the elements of `mask` from `p` on, of
/// `SIZE` bytes each. Must be inlined into a function that enables the instructions.
#[inline(always)]
unsafe fn all_channels<const R: usize, const SIZE: usize>(
    job: Job,
    load: impl Fn(*const u8, __mmask16) -> __m512,
) {
    let mut start = 0;
    // SAFETY: `start` and the channels after it are inside every row; the last mask ends with them.
    unsafe {
        while start + VECTORS * LANES <= job.dim {
            channels::<R, VECTORS, SIZE>(job, start, !0, &load);
            start += VECTORS * LANES;
        }
        while start < job.dim {
            let mask = !0 >> LANES.saturating_sub(job.dim - start);
            channels::<R, 1, SIZE>(job, start, mask, &load);
            start += LANES;
        }
    }
}

/// Adds to the channels of `mask` in each of `V` vectors from `start` on.
///
/// # Safety
/// As for [`all_channels`]; the channels are inside the rows.
#[inline(always)]
unsafe fn channels<const R: usize, const V: usize, const SIZE: usize>(
    job: Job,
    start: usize,
    mask: __mmask16,
    load: &impl Fn(*const u8, __mmask16) -> __m512,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); V]; R];
        for key in 0..job.keys {
            let row = job.values.add((key * job.dim + start) * SIZE);
            let mut values = [_mm512_setzero_ps(); V];
            for (v, values) in values.iter_mut().enumerate() {
                *values = load(row.add(v * LANES * SIZE), mask);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let p = _mm512_set1_ps(*job.probs.add(r * job.stride + key));
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(p, values, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = job.sums.add(r * job.dim + start + v * LANES);
                let before = _mm512_maskz_loadu_ps(mask, out);
                _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(before, sum));
            }
        }
    }
}
