//! AVX-512 VNNI: `vpdpbusd` adds four u8 x i8 products to each of 16 lanes, without saturation.
//!
//! 6 x 4 accumulators of 16 lanes, 4 registers of the right side, 1 broadcast of the left: 29 of
//! 32 registers. One step of the depth is 10 loads and 24 `vpdpbusd`, so multiplication, not the
//! load port, is the limit. The inner loop must hold no store: check the disassembly after a
//! change (`cargo rustc --release --lib -- --emit asm`).

use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;

const MR: usize = 6;
const LANES: usize = 16;
const VECTORS: usize = 4;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

pub(crate) struct Avx512Vnni;

// SAFETY: both functions stay within the lengths of their contract; the instructions are checked.
unsafe impl Kernel for Avx512Vnni {
    fn name(&self) -> &'static str {
        "x86_64-avx512-vnni"
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Biased }
    }

    fn is_available(&self) -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store, (input, out, stride)) }
    }

    unsafe fn score_tile(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, store_scores, (input, scores)) }
    }

    unsafe fn score_panel(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: AVX-512 VNNI is there and the pointers are valid, by contract.
        unsafe { score_panel(input, scores) }
    }
}

/// The tiles of a panel, called directly.
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn score_panel(input: TileInput, scores: ScoreTile) {
    for row in (0..input.rows).step_by(MR) {
        // SAFETY: rows that are there, by contract.
        unsafe {
            let (input, scores) = (input.rows_from(row, MR), scores.rows_from(row));
            for_rows!(input.rows, store_scores, (input, scores));
        }
    }
}

/// The sums of `ROWS` rows, 64 columns each.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m512i; VECTORS]; ROWS] {
    let mut init = [_mm512_setzero_si512(); VECTORS];
    for (v, init) in init.iter_mut().enumerate() {
        // SAFETY: `init` holds 64 elements by contract.
        *init = unsafe { _mm512_loadu_si512(input.init.add(v * LANES).cast()) };
    }
    let mut sums = [init; ROWS];
    for group in 0..input.groups {
        let mut b = [_mm512_setzero_si512(); VECTORS];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: the right panel holds `groups` times 256 bytes by contract.
            *b = unsafe {
                _mm512_loadu_si512(input.rhs.add((group * VECTORS + v) * LANES * GROUP).cast())
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: each row holds `groups` words of 4 bytes by contract.
            let a = unsafe {
                input.lhs.add(row * input.row_bytes + group * GROUP).cast::<i32>().read_unaligned()
            };
            let a = _mm512_set1_epi32(a);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
    }
    sums
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for (row, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: row `row` of the output is valid for 64 writes by contract.
            unsafe { _mm512_storeu_si512(out.add(row * stride + v * LANES).cast(), sum) };
        }
    }
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<ROWS>(input) };
    for v in 0..VECTORS {
        // SAFETY: 64 column scales and biases by contract.
        let (column_scale, column_bias) = unsafe {
            (
                _mm512_loadu_ps(scores.column_scales.add(v * LANES)),
                _mm512_loadu_ps(scores.column_biases.add(v * LANES)),
            )
        };
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: `rows` scales and biases, and 64 columns of row `row`, by contract.
            unsafe {
                let scale = _mm512_set1_ps(*scores.row_scales.add(row));
                let bias = _mm512_set1_ps(*scores.row_biases.add(row));
                let x =
                    _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), scale), column_scale);
                let x = _mm512_add_ps(_mm512_add_ps(x, column_bias), bias);
                _mm512_storeu_ps(scores.out.add(row * scores.stride + v * LANES), x);
            }
        }
    }
}
