//! AVX-512. What writes f32 and int8 is plain Rust compiled for it.
//!
//! `vscalefps` and `vreduceps` would save three instructions of the exponential in f32, and fused
//! multiply-adds five; but not every level has them, and the bits are to be the same on all.

use crate::cpu::contracts::softmax::{DISTANCE, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16};
use crate::cpu::contracts::{Int16Exp, RUN, Softmax};
use crate::cpu::plain::softmax::{scales_of_runs, top_of_run};
use crate::cpu::plain::sum_lanes;
use std::arch::x86_64::*;

const LANES: usize = 16;

mod plain {
    plain_kernels!(super::super::NAME, "avx512f,avx512bw,avx512dq,avx512vl");
}

pub(crate) const SOFTMAX: Softmax = Softmax { max, max_of_runs, exp_int16, ..plain::SOFTMAX };

/// Up to 16 scores; minus infinity, whose probability is 0, in the place of what is missing.
#[target_feature(enable = "avx512f")]
#[inline]
fn load(scores: &[f32]) -> __m512 {
    let first = ((1u32 << scores.len().min(LANES)) - 1) as __mmask16;
    let none = _mm512_set1_ps(f32::NEG_INFINITY);
    // SAFETY: lanes beyond the slice are masked out, and are not read.
    unsafe { _mm512_mask_loadu_ps(none, first, scores.as_ptr()) }
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

#[target_feature(enable = "avx512f")]
fn max_of_runs(scores: &[f32], runs: &mut [f32]) -> f32 {
    let mut all = _mm512_set1_ps(f32::NEG_INFINITY);
    for (run, scores) in runs.iter_mut().zip(scores.chunks(RUN)) {
        let mut top = _mm512_set1_ps(f32::NEG_INFINITY);
        for chunk in scores.as_chunks().0 {
            top = _mm512_max_ps(load_chunk(chunk), top);
        }
        *run = _mm512_reduce_max_ps(top);
        all = _mm512_max_ps(top, all);
    }
    _mm512_reduce_max_ps(all)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn exp_int16(job: Int16Exp<'_>) -> f32 {
    let (mut sums, mut last) = (_mm512_setzero_ps(), _mm512_setzero_si512());
    let scores = job.scores.chunks(LANES * RUN).zip(job.codes.chunks_mut(LANES * RUN));
    for (runs, (scores, codes)) in job.runs.chunks_mut(LANES).zip(scores) {
        let scales = scales_of_runs(runs, job.max);
        let of_runs = scores.chunks(RUN).zip(codes.chunks_mut(RUN));
        for ((run, scale), (scores, codes)) in runs.iter_mut().zip(scales).zip(of_runs) {
            let top = _mm512_set1_ps(top_of_run(*run));
            let mut counts = _mm512_setzero_si512();
            let (pairs, half) = scores.as_chunks::<{ 2 * LANES }>();
            let (outs, half_out) = codes.as_chunks_mut::<{ 2 * LANES }>();
            for (pair, out) in pairs.iter().zip(outs) {
                let (a, b) = (pair.first_chunk().expect("32"), pair.last_chunk().expect("32"));
                let distances = pack(distance(a, top), distance(b, top));
                let codes = codes_of(distances);
                counts = _mm512_dpwssd_epi32(counts, codes, _mm512_set1_epi16(1));
                last = _mm512_max_epu16(last, distances);
                // SAFETY: 32 elements of 16 bits.
                unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), codes) };
            }
            if let (Some(half), Some(out)) = (half.first_chunk(), half_out.first_chunk_mut()) {
                let none = _mm512_set1_epi32((FARTHEST as i32) << FRACTION);
                let distances = pack(distance(half, top), none);
                let codes = codes_of(distances);
                counts = _mm512_dpwssd_epi32(counts, codes, _mm512_set1_epi16(1));
                last = _mm512_max_epu16(last, distances);
                let out: &mut [i16; LANES] = out;
                // SAFETY: 16 elements of 16 bits.
                unsafe {
                    _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_castsi512_si256(codes));
                }
            }
            let counts = _mm512_cvtepi32_ps(counts);
            sums = _mm512_add_ps(sums, _mm512_mul_ps(counts, _mm512_set1_ps(scale)));
            *run = scale;
        }
    }
    let end = _mm512_set1_epi16((FARTHEST as i16) << FRACTION);
    if _mm512_cmpgt_epu16_mask(last, end) != 0 {
        return f32::NAN;
    }
    let mut lanes = [0f32; LANES];
    // SAFETY: 16 elements.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
    sum_lanes(lanes)
}

/// Distances in 32 bits; NaN is far outside of 16.
#[target_feature(enable = "avx512f")]
#[inline]
fn distance(scores: &[f32; LANES], top: __m512) -> __m512i {
    let distance = _mm512_sub_ps(top, load_chunk(scores));
    // Of a NaN and a number, the instruction returns its second operand.
    let distance = _mm512_min_ps(_mm512_set1_ps(FARTHEST), distance);
    let bits = _mm512_castps_si512(_mm512_add_ps(distance, _mm512_set1_ps(DISTANCE)));
    _mm512_sub_epi32(bits, _mm512_set1_epi32(DISTANCE.to_bits() as i32))
}

/// Both in 16 bits, in order; what is outside saturates.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn pack(a: __m512i, b: __m512i) -> __m512i {
    let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b))
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn codes_of(distances: __m512i) -> __m512i {
    let [c0, c1, c2, c3] = EXP2_INT16;
    let f = _mm512_slli_epi16::<{ 15 - FRACTION }>(distances);
    let f = _mm512_and_si512(f, _mm512_set1_epi16(0x7fff));
    let q = _mm512_sub_epi16(_mm512_set1_epi16(c2), _mm512_mulhrs_epi16(f, _mm512_set1_epi16(c3)));
    let q = _mm512_sub_epi16(_mm512_set1_epi16(c1), _mm512_mulhrs_epi16(f, q));
    let q = _mm512_sub_epi16(_mm512_set1_epi16(c0), _mm512_mulhrs_epi16(f, q));
    let halvings = _mm512_srli_epi16::<FRACTION>(distances);
    _mm512_mulhrs_epi16(q, _mm512_srlv_epi16(_mm512_set1_epi16(TOP_INT16), halvings))
}
