//! AVX-512.
//!
//! `2^x = 2^f * 2^floor(x)` takes two instructions beside the polynomial: `vreduceps` gives `f` in
//! `[0, 1]`, and `vscalefps` multiplies by the power, with minus infinity, underflow and NaN as
//! they should be. Rounding by adding `1.5 * 2^23` and adding to the exponent as an integer takes
//! cheaper instructions, but more of them, and was a fifth slower on Zen 4. The polynomials are
//! minimax in relative error over `[0, 1]`.
//!
//! Only what writes bf16 needs the instructions of AVX512-BF16.

use crate::cpu::contracts::{CODES, Softmax};
use std::arch::x86_64::*;

const LANES: usize = 16;

pub(crate) const SOFTMAX: Softmax = Softmax { name: super::NAME, max, exp_f32, exp_int8 };

/// Degree 5, error 1.5e-7 when evaluated in f32.
const EXP2_F32: [f32; 6] =
    [0.999_999_94, 0.693_153_1, 0.240_153_61, 0.055_826_318, 0.008_989_34, 0.001_877_576_7];

/// Degree 3, error 7.5e-5: bf16 rounds by up to 3.9e-3, int8 by more.
const EXP2_SHORT: [f32; 4] = [0.999_925_2, 0.695_833_56, 0.226_067_16, 0.078_024_52];

#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn exp2<const N: usize>(coefficients: &[f32; N], x: __m512) -> __m512 {
    // Immediate: no fraction bits are kept (so the rest is the fraction), round down, no exceptions.
    let f = _mm512_reduce_ps::<0b0000_1001>(x);
    let mut p = _mm512_set1_ps(coefficients[N - 1]);
    for &c in coefficients[..N - 1].iter().rev() {
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, x)
}

/// The first `len` of 16 lanes.
fn first(len: usize) -> __mmask16 {
    ((1u32 << len) - 1) as __mmask16
}

/// Up to 16 scores; minus infinity, whose probability is 0, in the place of what is missing.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(scores: &[f32]) -> __m512 {
    let none = _mm512_set1_ps(f32::NEG_INFINITY);
    // SAFETY: lanes beyond the slice are masked out, and are not read.
    unsafe { _mm512_mask_loadu_ps(none, first(scores.len().min(LANES)), scores.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_chunk(scores: &[f32; LANES]) -> __m512 {
    // SAFETY: 16 elements.
    unsafe { _mm512_loadu_ps(scores.as_ptr()) }
}

#[target_feature(enable = "avx512f")]
fn max(scores: &[f32]) -> f32 {
    let (pairs, tail) = scores.as_chunks::<{ 2 * LANES }>();
    let mut low = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut high = low;
    // Of a NaN and a number, the instruction returns its second operand.
    for pair in pairs {
        let (a, b) = (pair.first_chunk().expect("32"), pair.last_chunk().expect("32"));
        low = _mm512_max_ps(load_chunk(a), low);
        high = _mm512_max_ps(load_chunk(b), high);
    }
    for chunk in tail.chunks(LANES) {
        low = _mm512_max_ps(load(chunk), low);
    }
    _mm512_reduce_max_ps(_mm512_max_ps(low, high))
}

#[target_feature(enable = "avx512f,avx512dq")]
fn exp_f32(scores: &mut [f32], max: f32) -> f32 {
    let max = _mm512_set1_ps(max);
    let mut sums = _mm512_setzero_ps();
    for chunk in scores.chunks_mut(LANES) {
        let p = exp2(&EXP2_F32, _mm512_sub_ps(load(chunk), max));
        sums = _mm512_add_ps(sums, p);
        // SAFETY: lanes beyond the chunk are masked out.
        unsafe { _mm512_mask_storeu_ps(chunk.as_mut_ptr(), first(chunk.len()), p) };
    }
    _mm512_reduce_add_ps(sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
pub(crate) fn exp_bf16(scores: &[f32], max: f32, probs: &mut [u16]) -> f32 {
    assert_eq!(scores.len(), probs.len());
    let (max, ones) = (_mm512_set1_ps(max), _mm512_set1_ps(1.0));
    let ones = _mm512_cvtne2ps_pbh(ones, ones);
    let mut sums = _mm512_setzero_ps();
    let ((pairs, tail), (outs, out_tail)) =
        (scores.as_chunks::<{ 2 * LANES }>(), probs.as_chunks_mut::<{ 2 * LANES }>());
    let exp = |x: __m512| exp2(&EXP2_SHORT, _mm512_sub_ps(x, max));
    for (pair, out) in pairs.iter().zip(outs) {
        let (a, b) = (pair.first_chunk().expect("32"), pair.last_chunk().expect("32"));
        let p = _mm512_cvtne2ps_pbh(exp(load_chunk(b)), exp(load_chunk(a)));
        // The sum of the rounded ones in one instruction: times 1.
        sums = _mm512_dpbf16_ps(sums, p, ones);
        // SAFETY: 32 elements of 16 bits, and a vector of bf16 is 512 bits.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bits(p)) };
    }
    if !tail.is_empty() {
        let (a, b) = tail.split_at(tail.len().min(LANES));
        let p = _mm512_cvtne2ps_pbh(exp(load(b)), exp(load(a)));
        sums = _mm512_dpbf16_ps(sums, p, ones);
        let mask = (1 << tail.len()) - 1;
        // SAFETY: lanes beyond the slice are masked out.
        unsafe { _mm512_mask_storeu_epi16(out_tail.as_mut_ptr().cast(), mask, bits(p)) };
    }
    _mm512_reduce_add_ps(sums)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp_int8(scores: &[f32], max: f32, codes: &mut [u8]) -> f32 {
    assert_eq!(scores.len(), codes.len());
    let (max, factor) = (_mm512_set1_ps(max), _mm512_set1_ps(CODES));
    let mut sums = _mm512_setzero_ps();
    for (chunk, out) in scores.chunks(LANES).zip(codes.chunks_mut(LANES)) {
        let p = exp2(&EXP2_SHORT, _mm512_sub_ps(load(chunk), max));
        // Rounded as floats, because the sum has to keep a NaN.
        let code = _mm512_roundscale_ps::<0b0000_1000>(_mm512_mul_ps(p, factor));
        sums = _mm512_add_ps(sums, code);
        let code = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(code));
        // SAFETY: lanes beyond the chunk are masked out.
        unsafe { _mm_mask_storeu_epi8(out.as_mut_ptr().cast(), first(chunk.len()), code) };
    }
    _mm512_reduce_add_ps(sums)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn bits(x: __m512bh) -> __m512i {
    // SAFETY: the same size, and every bit pattern is an integer vector.
    unsafe { std::mem::transmute(x) }
}
