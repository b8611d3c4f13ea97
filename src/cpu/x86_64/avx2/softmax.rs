//! AVX2. What writes f32 and int8 is plain Rust compiled for it; in int16 there is no shift by lane, and the
//! powers of two come from a table.

use super::codes::sum_of;
use crate::cpu::contracts::softmax::{DISTANCE, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16};
use crate::cpu::contracts::{Int16Exp, LANES, RUN, Softmax};
use crate::cpu::plain::softmax::top_of_run;
use std::arch::x86_64::*;

/// Lanes of f32.
const HALF: usize = LANES / 2;

pub(crate) const SOFTMAX: Softmax = Softmax { exp_int16, ..super::SOFTMAX };

/// All tops of a run first: codes would wait for them, and what comes after those with them.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn exp_int16(job: Int16Exp<'_>) {
    let Int16Exp { scores, codes, stride, runs } = job;
    for (run, start) in (0..scores.len).step_by(RUN).enumerate() {
        let at = |row: usize| run * runs.stride + row;
        let len = RUN.min(scores.len - start);
        for row in 0..scores.rows {
            runs.tops[at(row)] = top_of(&scores.row(row)[start..][..len]);
        }
        for row in 0..scores.rows {
            let codes = &mut codes[row * stride + start..][..len];
            let scores = &scores.row(row)[start..][..len];
            runs.counts[at(row)] = exp_run(scores, runs.tops[at(row)], codes);
        }
    }
}

/// Writes the codes of a run with this top; returns their sum, or NaN.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu::x86_64) fn exp_run(scores: &[f32], top: f32, codes: &mut [i16]) -> f32 {
    let top = _mm256_set1_ps(top_of_run(top));
    let (mut counts, mut last) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    let outs = codes.as_chunks_mut::<LANES>().0.iter_mut();
    for (scores, out) in scores.as_chunks().0.iter().zip(outs) {
        let distances = distances(scores, top);
        let codes = codes_of(distances);
        counts = _mm256_add_epi32(counts, _mm256_madd_epi16(codes, _mm256_set1_epi16(1)));
        last = _mm256_max_epu16(last, distances);
        // SAFETY: 16 elements of 16 bits.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
    }
    let end = _mm256_set1_epi16((FARTHEST as i16) << FRACTION);
    let inside = _mm256_cmpeq_epi16(_mm256_max_epu16(last, end), end);
    let nan = _mm256_movemask_epi8(inside) != -1;
    if nan { f32::NAN } else { sum_of(counts) as f32 }
}

/// The largest; NaN does not count.
#[target_feature(enable = "avx2")]
#[inline]
pub(in crate::cpu::x86_64) fn top_of(scores: &[f32]) -> f32 {
    let mut tops = [_mm256_set1_ps(f32::NEG_INFINITY); 2];
    for scores in scores.as_chunks().0 {
        // Of a NaN and a number, the instruction returns its second operand.
        let halves = halves(scores);
        tops = [_mm256_max_ps(halves[0], tops[0]), _mm256_max_ps(halves[1], tops[1])];
    }
    let top = _mm256_max_ps(tops[0], tops[1]);
    let top = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps::<1>(top));
    let top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn halves(scores: &[f32; LANES]) -> [__m256; 2] {
    // SAFETY: 16 elements.
    unsafe { [_mm256_loadu_ps(scores.as_ptr()), _mm256_loadu_ps(scores.as_ptr().add(HALF))] }
}

/// Distances from the largest in 16 bits; NaN is beyond the farthest.
#[target_feature(enable = "avx2")]
#[inline]
fn distances(scores: &[f32; LANES], top: __m256) -> __m256i {
    let [a, b] = halves(scores).map(|scores| {
        let distance = _mm256_sub_ps(top, scores);
        // Of a NaN and a number, the instruction returns its second operand.
        let distance = _mm256_min_ps(_mm256_set1_ps(FARTHEST), distance);
        let bits = _mm256_castps_si256(_mm256_add_ps(distance, _mm256_set1_ps(DISTANCE)));
        _mm256_sub_epi32(bits, _mm256_set1_epi32(DISTANCE.to_bits() as i32))
    });
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b))
}

#[target_feature(enable = "avx2")]
#[inline]
fn codes_of(distances: __m256i) -> __m256i {
    let [c0, c1, c2, c3] = EXP2_INT16;
    let f = _mm256_slli_epi16::<{ (15 - FRACTION) as i32 }>(distances);
    let f = _mm256_and_si256(f, _mm256_set1_epi16(0x7fff));
    let q = _mm256_sub_epi16(_mm256_set1_epi16(c2), _mm256_mulhrs_epi16(f, _mm256_set1_epi16(c3)));
    let q = _mm256_sub_epi16(_mm256_set1_epi16(c1), _mm256_mulhrs_epi16(f, q));
    let q = _mm256_sub_epi16(_mm256_set1_epi16(c0), _mm256_mulhrs_epi16(f, q));
    _mm256_mulhrs_epi16(q, halved(_mm256_srli_epi16::<{ FRACTION as i32 }>(distances)))
}

/// [`TOP_INT16`], `2^13`, halved `n` times, for `n` up to 16. Up to 5 times only its upper byte is not 0, from 6
/// on only the lower.
#[target_feature(enable = "avx2")]
#[inline]
fn halved(n: __m256i) -> __m256i {
    const { assert!(TOP_INT16 == 1 << 13) };
    // The lower byte is found at `n - 6`, the upper at `n + 10`; an index with its highest bit set gives 0.
    let table = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 32, 16, 8, 4, 2, 1,
    ));
    let twice = _mm256_mullo_epi16(n, _mm256_set1_epi16(0x0101));
    // A carry out of the lower byte, from 6 on, leaves the upper with its highest bit set.
    let index = _mm256_add_epi16(twice, _mm256_set1_epi16(0x7afa));
    _mm256_shuffle_epi8(table, index)
}
