//! AVX-VNNI: `vpdpbusd` on 256 bits, for processors that have it without AVX-512 (Intel's since
//! Alder Lake, AMD's Zen 5 has both).
//!
//! 6 x 2 accumulators of 8 lanes, 2 registers of the right side, 1 broadcast of the left: 15 of 16
//! registers. One step of the depth is 8 loads and 12 `vpdpbusd`.
//!
//! The instruction exists in two encodings: VEX (AVX-VNNI) and EVEX (AVX-512 VNNI with VL), whose
//! machines do not contain each other. The tile is written once over [`Encoding`]; tests stamp it
//! with EVEX too, so that its arithmetic is checked on machines that have only that one.

use crate::gemm::kernel::{Geometry, Kernel, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;
use std::marker::PhantomData;

const MR: usize = 6;
const LANES: usize = 8;
const VECTORS: usize = 2;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

pub(crate) type AvxVnni = Vnni256<Vex>;

/// The tile over one encoding.
pub(crate) struct Vnni256<E>(PhantomData<E>);

impl<E> Vnni256<E> {
    pub(crate) const NEW: Self = Self(PhantomData);
}

/// One encoding of `vpdpbusd`. A target feature is an attribute of a function and cannot depend on
/// a type parameter, so each encoding brings the functions that enable it; what they do is in
/// [`store`] and [`store_scores`], inlined into them.
///
/// # Safety
/// Implementors promise that `is_available` is true only where their instructions exist.
pub(crate) unsafe trait Encoding: Send + Sync + Sized + 'static {
    const NAME: &'static str;

    fn is_available() -> bool;

    /// Adds four products of u8 `a` and i8 `b` to each lane.
    ///
    /// # Safety
    /// The encoding is available.
    unsafe fn dpbusd(sum: __m256i, a: __m256i, b: __m256i) -> __m256i;

    /// [`store`] with the instructions enabled.
    ///
    /// # Safety
    /// As for [`Kernel::tile`].
    unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize);

    /// [`store_scores`] with the instructions enabled.
    ///
    /// # Safety
    /// As for [`Kernel::score_tile`].
    unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile);
}

/// AVX-VNNI.
pub(crate) struct Vex;

// SAFETY: what the functions enable is what is detected.
unsafe impl Encoding for Vex {
    const NAME: &'static str = "x86_64-avx-vnni";

    fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni")
    }

    #[inline(always)]
    unsafe fn dpbusd(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: AVX-VNNI is there by contract.
        unsafe { _mm256_dpbusd_avx_epi32(sum, a, b) }
    }

    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: by contract.
        unsafe { store::<Self, ROWS>(input, out, stride) }
    }

    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
        // SAFETY: by contract.
        unsafe { store_scores::<Self, ROWS>(input, scores) }
    }
}

/// AVX-512 VNNI with VL: only a stand-in for [`Vex`] under test, where it is slower than the
/// 512-bit kernel.
#[cfg(test)]
pub(crate) struct Evex;

// SAFETY: what the functions enable is what is detected.
#[cfg(test)]
unsafe impl Encoding for Evex {
    const NAME: &'static str = "x86_64-avx-vnni under test in EVEX encoding";

    fn is_available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512vl")
    }

    #[inline(always)]
    unsafe fn dpbusd(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: AVX-512 VNNI and VL are there by contract.
        unsafe { _mm256_dpbusd_epi32(sum, a, b) }
    }

    #[target_feature(enable = "avx2,avx512vnni,avx512vl")]
    unsafe fn store<const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: by contract.
        unsafe { store::<Self, ROWS>(input, out, stride) }
    }

    #[target_feature(enable = "avx2,avx512vnni,avx512vl")]
    unsafe fn store_scores<const ROWS: usize>(input: TileInput, scores: ScoreTile) {
        // SAFETY: by contract.
        unsafe { store_scores::<Self, ROWS>(input, scores) }
    }
}

// SAFETY: both functions stay within the lengths of their contract; the instructions are checked.
unsafe impl<E: Encoding> Kernel for Vnni256<E> {
    fn name(&self) -> &'static str {
        E::NAME
    }

    fn geometry(&self) -> Geometry {
        Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Biased }
    }

    fn is_available(&self) -> bool {
        E::is_available()
    }

    unsafe fn tile(&self, input: TileInput, out: *mut i32, stride: usize) {
        // SAFETY: the encoding is available and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, E::store, (input, out, stride)) }
    }

    unsafe fn score_tile(&self, input: TileInput, scores: ScoreTile) {
        // SAFETY: the encoding is available and the pointers are valid, by contract.
        unsafe { for_rows!(input.rows, E::store_scores, (input, scores)) }
    }
}

/// The sums of `ROWS` rows, 16 columns each.
///
/// # Safety
/// As for [`Kernel::tile`]. This and the two functions below must be inlined into a function that
/// enables the instructions, or each of them becomes a call.
#[inline(always)]
unsafe fn sums<E: Encoding, const ROWS: usize>(input: TileInput) -> [[__m256i; VECTORS]; ROWS] {
    // SAFETY: the instructions are there. `init` holds 16 elements, the right panel `groups`
    // times 64 bytes and each row of the left side `groups` words of 4 bytes, by contract.
    unsafe {
        let load = |from: *const i8| _mm256_loadu_si256(from.cast());
        let init = input.init.cast::<i8>();
        let mut sums = [[load(init), load(init.add(4 * LANES))]; ROWS];
        for group in 0..input.groups {
            let b = input.rhs.add(group * NR * GROUP);
            let b = [load(b), load(b.add(LANES * GROUP))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = input.lhs.add(row * input.row_bytes + group * GROUP);
                let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = E::dpbusd(*sum, a, b);
                }
            }
        }
        sums
    }
}

/// [`Kernel::tile`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn store<E: Encoding, const ROWS: usize>(input: TileInput, out: *mut i32, stride: usize) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<E, ROWS>(input) };
    for (row, sums) in sums.into_iter().enumerate() {
        for (v, sum) in sums.into_iter().enumerate() {
            // SAFETY: row `row` of the output is valid for 16 writes by contract.
            unsafe { _mm256_storeu_si256(out.add(row * stride + v * LANES).cast(), sum) };
        }
    }
}

/// [`Kernel::score_tile`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn store_scores<E: Encoding, const ROWS: usize>(input: TileInput, scores: ScoreTile) {
    // SAFETY: by contract.
    let sums = unsafe { sums::<E, ROWS>(input) };
    for v in 0..VECTORS {
        // SAFETY: the instructions are there; 16 column scales and biases by contract.
        let (column_scale, column_bias) = unsafe {
            (
                _mm256_loadu_ps(scores.column_scales.add(v * LANES)),
                _mm256_loadu_ps(scores.column_biases.add(v * LANES)),
            )
        };
        for (row, sums) in sums.iter().enumerate() {
            // SAFETY: `rows` scales and biases, and 16 columns of row `row`, by contract.
            unsafe {
                let scale = _mm256_set1_ps(*scores.row_scales.add(row));
                let bias = _mm256_set1_ps(*scores.row_biases.add(row));
                let x = _mm256_cvtepi32_ps(sums[v]);
                let x = _mm256_mul_ps(_mm256_mul_ps(x, scale), column_scale);
                let x = _mm256_add_ps(_mm256_add_ps(x, column_bias), bias);
                _mm256_storeu_ps(scores.out.add(row * scores.stride + v * LANES), x);
            }
        }
    }
}
