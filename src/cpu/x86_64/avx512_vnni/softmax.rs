//! AVX-512. What writes int8, and the exponentials in f32, are plain Rust compiled for it.
//!
//! `vscalefps` and `vreduceps` would save three instructions of the exponential in f32, and fused
//! multiply-adds five; but not every level has them, and the bits are to be the same on all.

use super::rows::{floats, fold_add};
use crate::cpu::contracts::softmax::{DISTANCE, EXP2_INT16, FARTHEST, FRACTION, TOP_INT16};
use crate::cpu::contracts::{F32Exp, Int16Exp, Int16Runs, LANES, RUN, Softmax};
use crate::cpu::plain::lanes::sum_lanes;
use crate::cpu::plain::softmax::{exp_lanes, top_of_run};
use crate::cpu::x86_64::avx2::softmax::{exp_run, top_of};
use crate::cpu::x86_64::copy_first;
use std::arch::x86_64::*;

mod plain {
    plain_kernels!(super::super::NAME, "avx512f,avx512bw,avx512dq,avx512vl");
}

pub(crate) const SOFTMAX: Softmax = Softmax { max, exp_f32, exp_int16, ..plain::SOFTMAX };

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

/// The bits that distances may have, unlike NaN.
const DISTANCES: u32 = DISTANCE.to_bits() | ((1 << (FRACTION + 4)) - 1);

/// Runs that are taken at once: what a run has in common is found for all of them in a third of the instructions
/// that one after the other takes, and while one waits for a result another does not.
const TOGETHER: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn exp_int16(job: Int16Exp<'_>) {
    let Int16Exp { scores, codes, stride, mut runs } = job;
    let whole = scores.len / RUN;
    if scores.rows == 1 && whole > 0 {
        let all = Runs { scores: scores.data, codes, strides: [RUN, RUN], count: whole };
        all.exp((&mut *runs.tops, &mut *runs.counts, runs.stride));
    } else {
        for run in 0..whole {
            let at = run * RUN;
            let (scores_of, codes) = (&scores.data[at..], &mut codes[at..]);
            let strides = [scores.stride, stride];
            let all = Runs { scores: scores_of, codes, strides, count: scores.rows };
            let Int16Runs { tops, counts, .. } = runs.at(0, run);
            all.exp((tops, counts, 1));
        }
    }
    // The last run of each row, which has fewer scores.
    let (last, left) = (whole * RUN, scores.len % RUN);
    for row in 0..if left > 0 { scores.rows } else { 0 } {
        let (codes, scores) = (&mut codes[row * stride + last..][..left], &scores.row(row)[last..]);
        let top = top_of(scores);
        runs.set(row, whole, (top, exp_run(scores, top, codes)));
    }
}

/// Whole runs, `strides` elements apart, and as many places for codes.
struct Runs<'a> {
    scores: &'a [f32],
    codes: &'a mut [i16],
    strides: [usize; 2],
    count: usize,
}

impl Runs<'_> {
    /// Tops and counts go to every `step`-th place. All tops first: codes would wait for them, and what comes after those
    /// with them.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn exp(mut self, (tops, counts, step): (&mut [f32], &mut [f32], usize)) {
        for first in (0..self.count).step_by(TOGETHER) {
            let last = (self.count - first).min(TOGETHER);
            put(array(self.tops(first)), &mut tops[first * step..], (last, step));
        }
        let mut bits = _mm512_setzero_si512();
        for first in (0..self.count).step_by(TOGETHER) {
            let mut top = [0.0; TOGETHER];
            for (i, top) in top.iter_mut().enumerate() {
                *top = top_of_run(tops[(first + i).min(self.count - 1) * step]);
            }
            let (sums, found) = self.exp_of(first, top);
            bits = _mm512_or_si512(bits, found);
            let last = (self.count - first).min(TOGETHER);
            put(array(sums), &mut counts[first * step..], (last, step));
        }
        if _mm512_test_epi32_mask(bits, _mm512_set1_epi32(!DISTANCES as i32)) != 0 {
            self.find_nan((tops, counts, step));
        }
    }

    /// A run; the last in the place of one behind it.
    #[inline(always)]
    fn scores(&self, run: usize) -> &[f32; RUN] {
        self.scores[run.min(self.count - 1) * self.strides[0]..].first_chunk().expect("a run")
    }

    /// The largest scores of the runs from `first` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn tops(&self, first: usize) -> __m128 {
        let mut tops = [_mm512_setzero_si512(); TOGETHER];
        for (i, top) in tops.iter_mut().enumerate() {
            let mut lanes = _mm512_set1_ps(f32::NEG_INFINITY);
            // Of a NaN and a number, the instruction returns its second operand.
            for vector in self.scores(first + i).as_chunks().0 {
                lanes = _mm512_max_ps(load_chunk(vector), lanes);
            }
            *top = _mm512_castps_si512(lanes);
        }
        _mm_castsi128_ps(fold(tops, |a, b| {
            _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)))
        }))
    }

    /// Writes the codes of the runs from `first` on; returns their sums, and all bits of distances.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn exp_of(&mut self, first: usize, tops: [f32; TOGETHER]) -> (__m128, __m512i) {
        let mut bits = _mm512_setzero_si512();
        let mut distances = [bits; 2 * TOGETHER];
        for (i, top) in tops.into_iter().enumerate() {
            let (scores, top) = (self.scores(first + i), _mm512_set1_ps(top));
            let [a, b, c, d] = scores.as_chunks().0 else { unreachable!("four vectors") };
            let (a, b, c, d) =
                (distance(a, top), distance(b, top), distance(c, top), distance(d, top));
            bits = _mm512_ternarylogic_epi32::<0xfe>(bits, a, b); // any of the three
            bits = _mm512_ternarylogic_epi32::<0xfe>(bits, c, d);
            distances[2 * i] = low_halves(a, b);
            distances[2 * i + 1] = low_halves(c, d);
        }
        let found = codes_of(distances);
        let mut counts = [_mm512_setzero_si512(); TOGETHER];
        for (i, count) in counts.iter_mut().enumerate() {
            let (low, high) = (found[2 * i], found[2 * i + 1]);
            // Codes are up to 4096.
            *count = _mm512_madd_epi16(_mm512_add_epi16(low, high), _mm512_set1_epi16(1));
            let run = (first + i).min(self.count - 1);
            let codes: &mut [i16; RUN] =
                self.codes[run * self.strides[1]..].first_chunk_mut().expect("a run");
            // SAFETY: 64 elements of 16 bits.
            unsafe {
                _mm512_storeu_si512(codes.as_mut_ptr().cast(), low);
                _mm512_storeu_si512(codes.as_mut_ptr().add(2 * LANES).cast(), high);
            }
        }
        (_mm_cvtepi32_ps(fold(counts, |a, b| _mm512_add_epi32(a, b))), bits)
    }

    /// NaN in the place of the sums of runs that have one.
    #[cold]
    fn find_nan(&self, (tops, counts, step): (&[f32], &mut [f32], usize)) {
        for run in 0..self.count {
            let top = top_of_run(tops[run * step]);
            if self.scores(run).iter().any(|score| (top - score).is_nan()) {
                counts[run * step] = f32::NAN;
            }
        }
    }
}

/// Writes the first numbers to every `step`-th place.
#[inline(always)]
fn put(numbers: [f32; TOGETHER], out: &mut [f32], (count, step): (usize, usize)) {
    if step == 1 {
        return copy_first::<TOGETHER, _>(&numbers, &mut out[..count]);
    }
    for (out, number) in out.iter_mut().step_by(step).zip(numbers).take(count) {
        *out = number;
    }
}

#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn array(numbers: __m128) -> [f32; TOGETHER] {
    let mut all = [0f32; TOGETHER];
    // SAFETY: 4 elements.
    unsafe { _mm_storeu_ps(all.as_mut_ptr(), numbers) };
    all
}

/// All lanes of each of four vectors, in order.
#[target_feature(enable = "avx512f,avx512vl")]
#[inline]
fn fold([a, b, c, d]: [__m512i; TOGETHER], with: impl Fn(__m512i, __m512i) -> __m512i) -> __m128i {
    let ab = with(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let cd = with(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    let quarters = with(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    let halves = with(quarters, _mm512_shuffle_i32x4::<0b01_00_11_10>(quarters, quarters));
    _mm512_castsi512_si128(with(halves, _mm512_shuffle_i32x4::<0b10_11_00_01>(halves, halves)))
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

/// Step by step for all of them: one after the other they would wait for each product.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn codes_of(distances: [__m512i; 2 * TOGETHER]) -> [__m512i; 2 * TOGETHER] {
    let [c0, c1, c2, c3] = EXP2_INT16;
    let (mut f, mut q) = (distances, [_mm512_set1_epi16(c3); 2 * TOGETHER]);
    for f in &mut f {
        *f = _mm512_slli_epi16::<{ 15 - FRACTION }>(*f);
        *f = _mm512_and_si512(*f, _mm512_set1_epi16(0x7fff));
    }
    for c in [c2, c1, c0] {
        for (q, f) in q.iter_mut().zip(f) {
            *q = _mm512_sub_epi16(_mm512_set1_epi16(c), _mm512_mulhrs_epi16(f, *q));
        }
    }
    // A table: for a shift by lane of a constant, LLVM writes four instructions.
    let halved = words(|i| TOP_INT16.checked_shr(i as u32).unwrap_or(0));
    for (q, distance) in q.iter_mut().zip(distances) {
        let halvings = _mm512_srli_epi16::<FRACTION>(distance);
        *q = _mm512_mulhrs_epi16(*q, _mm512_permutexvar_epi16(halvings, halved));
    }
    q
}
