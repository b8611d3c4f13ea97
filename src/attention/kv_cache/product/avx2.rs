//! AVX2 with FMA and F16C: 4 x 2 accumulators of 8 lanes, 2 vectors of values, 1 probability: 11 of
//! 16 registers. What is left of a row after whole vectors is done one channel at a time.

use super::{Format, Job, ProductKernel};
use std::arch::x86_64::*;

const LANES: usize = 8;
const VECTORS: usize = 2;

pub(super) struct Avx2;

// SAFETY: `product` stays within the lengths of its contract; the instructions are checked.
unsafe impl ProductKernel for Avx2 {
    #[cfg(test)]
    fn name(&self) -> &'static str {
        "x86_64-avx2-fma-f16c"
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
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
    ($name:ident, $size:literal, $load:expr, $one:expr) => {
        /// # Safety
        /// AVX2, FMA and F16C are there; the rest is that of [`ProductKernel::product`].
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name(job: Job) {
            let (load, one) = ($load, $one);
            // SAFETY: by contract; `load` reads eight elements of `$size` bytes, `one` reads one.
            unsafe {
                match job.rows {
                    1 => all_channels::<1, $size>(job, load, one),
                    2 => all_channels::<2, $size>(job, load, one),
                    3 => all_channels::<3, $size>(job, load, one),
                    _ => all_channels::<4, $size>(job, load, one),
                }
            }
        }
    };
}

for_format!(
    f32,
    4,
    // SAFETY: eight elements are valid by contract; below too.
    |from: *const u8| unsafe { _mm256_loadu_ps(from.cast()) },
    // SAFETY: one element is valid by contract; below too.
    |from: *const u8| unsafe { from.cast::<f32>().read_unaligned() }
);
for_format!(
    f16,
    2,
    // SAFETY: as above.
    |from: *const u8| _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) }),
    |from: *const u8| {
        // SAFETY: as above.
        let bits = unsafe { from.cast::<i16>().read_unaligned() };
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }
);
for_format!(
    bf16,
    2,
    |from: *const u8| {
        // SAFETY: as above.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(from.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    },
    |from: *const u8| {
        // SAFETY: as above.
        f32::from_bits(u32::from(unsafe { from.cast::<u16>().read_unaligned() }) << 16)
    }
);
for_format!(
    int8,
    1,
    |from: *const u8| {
        // SAFETY: as above.
        let codes = unsafe { _mm_loadl_epi64(from.cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))
    },
    // SAFETY: as above.
    |from: *const u8| f32::from(unsafe { from.cast::<i8>().read() })
);

/// # Safety
/// As for [`ProductKernel::product`]; `load` reads eight elements of `SIZE` bytes, `one` reads one.
/// Must be inlined into a function that enables the instructions.
#[inline(always)]
unsafe fn all_channels<const R: usize, const SIZE: usize>(
    job: Job,
    load: impl Fn(*const u8) -> __m256,
    one: impl Fn(*const u8) -> f32,
) {
    let mut start = 0;
    // SAFETY: `start` and the channels after it are inside every row.
    unsafe {
        while start + VECTORS * LANES <= job.dim {
            channels::<R, VECTORS, SIZE>(job, start, &load);
            start += VECTORS * LANES;
        }
        if start + LANES <= job.dim {
            channels::<R, 1, SIZE>(job, start, &load);
            start += LANES;
        }
        for channel in start..job.dim {
            for row in 0..R {
                let mut sum = 0.0;
                for key in 0..job.keys {
                    let x = one(job.values.add((key * job.dim + channel) * SIZE));
                    sum += *job.probs.add(row * job.stride + key) * x;
                }
                *job.sums.add(row * job.dim + channel) += sum;
            }
        }
    }
}

/// Adds to `V` vectors of channels from `start` on.
///
/// # Safety
/// As for [`all_channels`]; the channels are inside the rows.
#[inline(always)]
unsafe fn channels<const R: usize, const V: usize, const SIZE: usize>(
    job: Job,
    start: usize,
    load: &impl Fn(*const u8) -> __m256,
) {
    // SAFETY: by contract.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); V]; R];
        for key in 0..job.keys {
            let row = job.values.add((key * job.dim + start) * SIZE);
            let mut values = [_mm256_setzero_ps(); V];
            for (v, values) in values.iter_mut().enumerate() {
                *values = load(row.add(v * LANES * SIZE));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let p = _mm256_set1_ps(*job.probs.add(r * job.stride + key));
                for (sum, values) in sums.iter_mut().zip(values) {
                    *sum = _mm256_fmadd_ps(p, values, *sum);
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                let out = job.sums.add(r * job.dim + start + v * LANES);
                _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sum));
            }
        }
    }
}
