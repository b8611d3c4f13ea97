//! AVX-512. What writes int8, and the exponentials in f32, are plain Rust compiled for it.
//!
//! `vscalefps` and `vreduceps` would save three instructions of the exponential in f32, and fused
//! multiply-adds five; but not every level has them, and the bits are to be the same on all.

use super::rows::{floats, fold_add};
use crate::cpu::contracts::softmax::{
    DISTANCE, DISTANCE_END, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16,
};
use crate::cpu::contracts::{F32Exp, Int16Exp, LANES, RUN, Scores, Softmax};
use crate::cpu::plain::lanes::sum_lanes;
use crate::cpu::plain::softmax::{exp_lanes, top_of_run};
use crate::cpu::x86_64::copy_first;
use std::arch::x86_64::*;

mod plain {
    plain_kernels!(super::super::NAME, "avx512f,avx512bw,avx512dq,avx512vl");
}

pub(crate) const SOFTMAX: Softmax =
    Softmax { max, max_of_runs, exp_f32, exp_int16, ..plain::SOFTMAX };

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

#[target_feature(enable = "avx512f,avx512vl")]
fn max_of_runs(scores: Scores<'_>, runs: &mut [f32]) {
    let (mut row, mut run) = (0, 0);
    for runs in runs.chunks_mut(4) {
        let mut tops = [_mm512_set1_ps(f32::NEG_INFINITY); 4];
        for top in &mut tops[..runs.len()] {
            let scores_of = scores.row(row);
            *top = match scores_of[run * RUN..].first_chunk::<RUN>() {
                Some(scores) => top_lanes(scores),
                None => top_lanes(&scores_of[run * RUN..]),
            };
            run += 1;
            if run == scores.runs() {
                (row, run) = (row + 1, 0);
            }
        }
        let tops = _mm512_castps512_ps128(max_of_lanes(tops));
        let first = ((1u32 << runs.len()) - 1) as __mmask8;
        // SAFETY: lanes beyond the slice are masked out.
        unsafe { _mm_mask_storeu_ps(runs.as_mut_ptr(), first, tops) };
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn top_lanes(scores: &[f32]) -> __m512 {
    let mut top = _mm512_set1_ps(f32::NEG_INFINITY);
    for chunk in scores.as_chunks().0 {
        top = _mm512_max_ps(load_chunk(chunk), top);
    }
    top
}

/// The largest of all lanes of four vectors in every four lanes: in a third of the instructions that one
/// after the other takes.
#[target_feature(enable = "avx512f")]
#[inline]
fn max_of_lanes([a, b, c, d]: [__m512; 4]) -> __m512 {
    let ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
    let quarters = _mm512_max_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    let swapped = _mm512_shuffle_f32x4::<0b01_00_11_10>(quarters, quarters);
    let halves = _mm512_max_ps(quarters, swapped);
    _mm512_max_ps(halves, _mm512_shuffle_f32x4::<0b10_11_00_01>(halves, halves))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp_f32(job: F32Exp<'_>) {
    let F32Exp { scores, len, stride, maxes, sums: out } = job;
    if let ([max], [sum]) = (maxes, &mut *out) {
        *sum = sum_lanes(exp_lanes(&mut scores[..len], *max));
        return;
    }
    let mut sums = [_mm512_setzero_ps(); LANES];
    for ((row, max), sum) in scores.chunks_mut(stride).zip(maxes).zip(&mut sums) {
        *sum = load_chunk(&exp_lanes(&mut row[..len], *max));
    }
    copy_first::<LANES, _>(&floats(fold_add(sums)), out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn exp_int16(job: Int16Exp<'_>) {
    let Int16Exp { scores, codes, tops, scales, sums: out } = job;
    let runs = tops.chunks_exact(scores.runs()).zip(scales.chunks_exact(scores.runs()));
    let mut sums = [_mm512_setzero_ps(); LANES];
    for (row, (sum, runs)) in sums.iter_mut().zip(runs).enumerate() {
        let codes = &mut codes[row * scores.stride..][..scores.len];
        *sum = exp_row(scores.row(row), codes, runs);
    }
    match out {
        [sum] => *sum = sum_lanes(floats(sums[0])),
        all => copy_first::<LANES, _>(&floats(fold_add(sums)), all),
    }
}

/// The bits that distances may have, unlike NaN.
const DISTANCES: u32 = DISTANCE.to_bits() | ((1 << (FRACTION + 4)) - 1);

/// Writes the codes of a row, returns the sum of what they stand for in parts.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn exp_row(scores: &[f32], codes: &mut [i16], (tops, scales): (&[f32], &[f32])) -> __m512 {
    let (mut sums, mut bits) = (_mm512_setzero_ps(), _mm512_setzero_si512());
    let (scores, scores_left) = scores.as_chunks::<RUN>();
    let (codes, codes_left) = codes.as_chunks_mut::<RUN>();
    let runs = tops.iter().zip(scales);
    for ((top, scale), (scores, codes)) in runs.zip(scores.iter().zip(codes)) {
        sums = add_scaled(sums, exp_run(scores, top_of_run(*top), codes, &mut bits), *scale);
    }
    if let ([top], [scale]) = (&tops[scores.len()..], &scales[scores.len()..]) {
        let counts = exp_run(scores_left, top_of_run(*top), codes_left, &mut bits);
        sums = add_scaled(sums, counts, *scale);
    }
    match _mm512_test_epi32_mask(bits, _mm512_set1_epi32(!DISTANCES as i32)) {
        0 => sums,
        _ => _mm512_set1_ps(f32::NAN),
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn add_scaled(sums: __m512, counts: __m512i, scale: f32) -> __m512 {
    _mm512_add_ps(sums, _mm512_mul_ps(_mm512_cvtepi32_ps(counts), _mm512_set1_ps(scale)))
}

/// Writes the codes of a run, takes in the bits of its distances, returns the sums of the codes in pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn exp_run(scores: &[f32], top: f32, codes: &mut [i16], bits: &mut __m512i) -> __m512i {
    let (top, ones) = (_mm512_set1_ps(top), _mm512_set1_epi16(1));
    let mut counts = _mm512_setzero_si512();
    let (pairs, half) = scores.as_chunks::<{ 2 * LANES }>();
    let (outs, half_out) = codes.as_chunks_mut::<{ 2 * LANES }>();
    for (pair, out) in pairs.iter().zip(outs) {
        let (a, b) = (pair.first_chunk().expect("32"), pair.last_chunk().expect("32"));
        let (a, b) = (distance(a, top), distance(b, top));
        let codes = codes_of(low_halves(a, b));
        counts = _mm512_dpwssd_epi32(counts, codes, ones);
        *bits = _mm512_ternarylogic_epi32::<0xfe>(*bits, a, b); // any of the three
        // SAFETY: 32 elements of 16 bits.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), codes) };
    }
    if let (Some(half), Some(out)) = (half.first_chunk(), half_out.first_chunk_mut()) {
        let half = distance(half, top);
        let codes = codes_of(low_halves(half, _mm512_set1_epi32(DISTANCE_END as i32)));
        counts = _mm512_dpwssd_epi32(counts, codes, ones);
        *bits = _mm512_or_si512(*bits, half);
        let out: &mut [i16; LANES] = out;
        // SAFETY: 16 elements of 16 bits.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_castsi512_si256(codes)) };
    }
    counts
}

/// The bits of distances, whose lower halves are what counts; NaN has others than [`DISTANCES`].
#[target_feature(enable = "avx512f")]
#[inline]
fn distance(scores: &[f32; LANES], top: __m512) -> __m512i {
    let distance = _mm512_sub_ps(top, load_chunk(scores));
    // Of a NaN and a number, the instruction returns its second operand.
    let distance = _mm512_min_ps(_mm512_set1_ps(FARTHEST), distance);
    _mm512_castps_si512(_mm512_add_ps(distance, _mm512_set1_ps(DISTANCE)))
}

/// The lower 16 bits of all, in order.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn low_halves(a: __m512i, b: __m512i) -> __m512i {
    let even = words(|i| 2 * i as i16);
    _mm512_permutex2var_epi16(a, even, b)
}

/// A vector that the compiler knows.
#[target_feature(enable = "avx512f")]
#[inline]
fn words(word: impl Fn(usize) -> i16) -> __m512i {
    let mut words = [0i16; 2 * LANES];
    for (i, to) in words.iter_mut().enumerate() {
        *to = word(i);
    }
    // SAFETY: 32 elements of 16 bits.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
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
    // A table: for a shift by lane of a constant, LLVM writes four instructions.
    let halved = words(|i| TOP_INT16.checked_shr(i as u32).unwrap_or(0));
    let halvings = _mm512_srli_epi16::<FRACTION>(distances);
    _mm512_mulhrs_epi16(q, _mm512_permutexvar_epi16(halvings, halved))
}
