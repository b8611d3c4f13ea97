//! AVX2 without saturation: both sides widened to 16 bits, `vpmaddwd` sums pairs of products.
//!
//! The better known way, `vpmaddubsw` on u8 x i8, adds two products in 16 bits and saturates
//! (255 * 127 * 2 does not fit), so it cannot be exact over the full range.

use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;

// 6 x 2 accumulators, 2 registers of the right side, 1 of the left: 15 of 16.
const MR: usize = 6;
const NR: usize = 16;
const GROUP: usize = 2;

pub(crate) struct Avx2;

// SAFETY: both functions stay within the lengths of their contract; the instructions are checked.
unsafe impl Kernel for Avx2 {
    fn name(&self) -> &'static str {
        "x86_64-avx2"
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Wide }
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx2")
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: AVX2 is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store, (input, out, stride)) }
    }

    unsafe fn score_tile(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: AVX2 is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store_scores, (input, scores)) }
    }
}

/// The sums of `ROWS` rows, 16 columns each.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m256i; 2]; ROWS] {
    // SAFETY: `init` holds 16 elements by contract.
    let init = unsafe {
        [_mm256_loadu_si256(input.init.cast()), _mm256_loadu_si256(input.init.add(8).cast())]
    };
    let mut sums = [init; ROWS];
    for group in 0..input.groups {
        // SAFETY: the right panel holds `groups` times 32 bytes, the left one `groups` times 6
        // pairs of i16, by contract.
        let (b, a) = unsafe {
            let b = input.rhs.add(group * NR * GROUP);
            let b = [
                _mm256_cvtepi8_epi16(_mm_loadu_si128(b.cast())),
                _mm256_cvtepi8_epi16(_mm_loadu_si128(b.add(16).cast())),
            ];
            (b, input.lhs.cast::<i32>().add(group * MR))
        };
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: row < MR, see above.
            let a = _mm256_set1_epi32(unsafe { a.add(row).read_unaligned() });
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(a, b[0]));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(a, b[1]));
        }
    }
    sums
}

#[target_feature(enable = "avx2")]
unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for (row, sums) in sums.into_iter().enumerate() {
        // SAFETY: row `row` of the output is valid for 16 writes by contract.
        unsafe {
            let out = out.add(row * stride);
            _mm256_storeu_si256(out.cast(), sums[0]);
            _mm256_storeu_si256(out.add(8).cast(), sums[1]);
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for (row, sums) in sums.into_iter().enumerate() {
        // SAFETY: `rows` scales and biases by contract.
        let (scale, bias) = unsafe {
            (
                _mm256_set1_ps(*scores.row_scales.add(row)),
                _mm256_set1_ps(*scores.row_biases.add(row)),
            )
        };
        for (half, sums) in sums.into_iter().enumerate() {
            // SAFETY: 16 columns in the scales, the biases and row `row` of the output.
            unsafe {
                let column_scale = _mm256_loadu_ps(scores.column_scales.add(8 * half));
                let column_bias = _mm256_loadu_ps(scores.column_biases.add(8 * half));
                let x = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums), scale), column_scale);
                let x = _mm256_add_ps(_mm256_add_ps(x, column_bias), bias);
                _mm256_storeu_ps(scores.out.add(row * scores.stride + 8 * half), x);
            }
        }
    }
}
