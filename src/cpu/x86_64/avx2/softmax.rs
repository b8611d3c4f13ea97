//! AVX2. What writes f32 and int8 is plain Rust compiled for it; in int16 there is no shift by lane, and the
//! powers of two come from a table.

use crate::cpu::contracts::softmax::{DISTANCE, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16};
use crate::cpu::contracts::{Int16Exp, LANES, RUN, Softmax};
use crate::cpu::plain::lanes::sum_lanes;
use crate::cpu::plain::softmax::top_of_run;
use std::arch::x86_64::*;

/// Lanes of f32.
const HALF: usize = LANES / 2;

pub(crate) const SOFTMAX: Softmax = Softmax { exp_int16, ..super::SOFTMAX };

#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
fn exp_int16(job: Int16Exp<'_>) {
    let Int16Exp { scores, codes, tops, scales, sums } = job;
    let runs = tops.chunks_exact(scores.runs()).zip(scales.chunks_exact(scores.runs()));
    for (row, (sum, runs)) in sums.iter_mut().zip(runs).enumerate() {
        let codes = &mut codes[row * scores.stride..][..scores.len];
        *sum = exp_row(scores.row(row), codes, runs);
    }
}

/// Writes the codes of a row, returns the sum of what they stand for.
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
#[inline]
fn exp_row(scores: &[f32], codes: &mut [i16], (tops, scales): (&[f32], &[f32])) -> f32 {
    let (mut sums, mut last) = ([_mm256_setzero_ps(); 2], _mm256_setzero_si256());
    let of_runs = scores.chunks(RUN).zip(codes.chunks_mut(RUN));
    for ((top, scale), (scores, codes)) in tops.iter().zip(scales).zip(of_runs) {
        let top = _mm256_set1_ps(top_of_run(*top));
        let mut counts = [_mm256_setzero_si256(); 2];
        let outs = codes.as_chunks_mut::<LANES>().0.iter_mut();
        for (i, (chunk, out)) in scores.as_chunks().0.iter().zip(outs).enumerate() {
            let distances = distances(chunk, top);
            let codes = codes_of(distances);
            // Of every 32 codes the first half belongs to the lower lanes.
            let of_pairs = _mm256_madd_epi16(codes, _mm256_set1_epi16(1));
            counts[i % 2] = _mm256_add_epi32(counts[i % 2], of_pairs);
            last = _mm256_max_epu16(last, distances);
            // SAFETY: 16 elements of 16 bits.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
        }
        for (sum, count) in sums.iter_mut().zip(counts) {
            let count = _mm256_mul_ps(_mm256_cvtepi32_ps(count), _mm256_set1_ps(*scale));
            *sum = _mm256_add_ps(*sum, count);
        }
    }
    let end = _mm256_set1_epi16((FARTHEST as i16) << FRACTION);
    let inside = _mm256_cmpeq_epi16(_mm256_max_epu16(last, end), end);
    if _mm256_movemask_epi8(inside) != -1 {
        return f32::NAN;
    }
    let mut lanes = [0f32; LANES];
    let (low, high) = lanes.split_at_mut(HALF);
    // SAFETY: 8 elements in each half.
    unsafe {
        _mm256_storeu_ps(low.as_mut_ptr(), sums[0]);
        _mm256_storeu_ps(high.as_mut_ptr(), sums[1]);
    }
    sum_lanes(lanes)
}

/// Distances from the largest in 16 bits; NaN is beyond the farthest.
#[target_feature(enable = "avx2")]
#[inline]
fn distances(scores: &[f32; LANES], top: __m256) -> __m256i {
    // SAFETY: 16 elements.
    let scores =
        unsafe { [_mm256_loadu_ps(scores.as_ptr()), _mm256_loadu_ps(scores.as_ptr().add(HALF))] };
    let [a, b] = scores.map(|scores| {
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
