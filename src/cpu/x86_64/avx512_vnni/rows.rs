//! AVX-512: symmetric codes with a scale for each row, which is what every query and key of the
//! default configuration goes through, and dot products.
//!
//! Rows are taken 16 at a time, so that what is found for each row (a maximum, a sum) is folded for
//! all of them at once, and their scales are one vector.

use super::rotate::{condition, rotate};
use crate::cpu::contracts::{BlockCodes, RowKernels, Rows};
use std::arch::x86_64::*;

const LANES: usize = 16;

pub(crate) const ROWS: RowKernels =
    RowKernels { name: super::NAME, quantize_symmetric, dots, condition, rotate };

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn quantize_symmetric(rows: Rows<'_>, magnitudes: Option<&[f32]>, out: BlockCodes<'_>) {
    let depth = rows.depth();
    let row = |row: usize| Row(rows.row(row));
    out.zeros.fill(0);
    for start in (0..rows.count()).step_by(LANES) {
        let count = LANES.min(rows.count() - start);
        let mut folded = [_mm512_setzero_ps(); LANES];
        let magnitudes = match magnitudes {
            Some(magnitudes) => _mm512_castps_si512(load(magnitudes, start, count)),
            None => {
                for (i, max) in folded[..count].iter_mut().enumerate() {
                    *max = _mm512_castsi512_ps(row(start + i).max_magnitude());
                }
                fold_max(folded)
            }
        };
        let (scales, reciprocals, finite) = scales(magnitudes);
        let (mut scale, mut reciprocal) = ([0f32; LANES], [0f32; LANES]);
        // SAFETY: 16 lanes into 16 elements.
        unsafe {
            _mm512_storeu_ps(scale.as_mut_ptr(), scales);
            _mm512_storeu_ps(reciprocal.as_mut_ptr(), reciprocals);
        }
        for i in 0..count {
            let codes = &mut out.codes[(start + i) * depth..(start + i + 1) * depth];
            let sums = row(start + i).quantize::<true>(scale[i], reciprocal[i], codes);
            folded[i] = _mm512_castsi512_ps(sums);
        }
        for i in (0..count).filter(|i| finite >> i & 1 == 0) {
            out.codes[(start + i) * depth..(start + i + 1) * depth].fill(0);
            (folded[i], scale[i]) = (_mm512_setzero_ps(), f32::NAN);
        }
        out.scales[start..start + count].copy_from_slice(&scale[..count]);
        let mut sums = [0i32; LANES];
        // SAFETY: 16 lanes into 16 elements.
        unsafe { _mm512_storeu_si512(sums.as_mut_ptr().cast(), fold_sum(folded)) };
        out.sums[start..start + count].copy_from_slice(&sums[..count]);
    }
}

/// The scale of each row, its reciprocal, and which are finite, from the bits of their largest
/// magnitudes: as `plain::rows::symmetric_scale` finds it.
#[target_feature(enable = "avx512f")]
#[inline]
fn scales(max: __m512i) -> (__m512, __m512, __mmask16) {
    let finite = _mm512_cmplt_epu32_mask(max, _mm512_set1_epi32(f32::INFINITY.to_bits() as i32));
    let zero = _mm512_testn_epi32_mask(max, max);
    let scale = _mm512_div_ps(_mm512_castsi512_ps(max), _mm512_set1_ps(127.0));
    let scale = _mm512_max_ps(scale, _mm512_set1_ps(f32::MIN_POSITIVE));
    let one = _mm512_set1_ps(1.0);
    let scale = _mm512_mask_blend_ps(zero, scale, one);
    (scale, _mm512_div_ps(one, scale), finite)
}

#[target_feature(enable = "avx512f")]
fn dots(rows: Rows<'_>, vectors: Rows<'_>, out: &mut [f32]) {
    // 16 sums at a time, of as many vectors as there are: each row and each vector is loaded for all of them.
    for vector in (0..vectors.count()).step_by(4) {
        match vectors.count() - vector {
            1 => dots_of::<16, 1>(rows, vectors, vector, out),
            2 => dots_of::<8, 2>(rows, vectors, vector, out),
            _ => dots_of::<4, 4>(rows, vectors, vector, out),
        }
    }
}

/// Those of `V` vectors from one on, or as many as there are, `R` rows at a time; `R * V` is 16.
#[target_feature(enable = "avx512f")]
fn dots_of<const R: usize, const V: usize>(
    rows: Rows<'_>,
    vectors: Rows<'_>,
    vector: usize,
    out: &mut [f32],
) {
    let (count, depth) = (rows.count(), rows.depth());
    // What is missing in the last rows and vectors repeats the last of them.
    let vectors_at: [&[f32]; V] = array(|v| vectors.row((vector + v).min(vectors.count() - 1)));
    for row in (0..count).step_by(R) {
        let rows_at: [&[f32]; R] = array(|r| rows.row((row + r).min(count - 1)));
        let mut sums = [_mm512_setzero_ps(); LANES];
        for at in (0..depth).step_by(LANES) {
            let len = LANES.min(depth - at);
            for (v, y) in vectors_at.iter().enumerate() {
                let y = load(y, at, len);
                for (r, x) in rows_at.iter().enumerate() {
                    // Not fused, so that levels without such an instruction give the same bits.
                    let product = _mm512_mul_ps(load(x, at, len), y);
                    sums[v * R + r] = _mm512_add_ps(product, sums[v * R + r]);
                }
            }
        }
        let mut lanes = [0f32; LANES];
        // SAFETY: 16 lanes into 16 elements.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), fold_add(sums)) };
        let rows = R.min(count - row);
        for v in 0..V.min(vectors.count() - vector) {
            let out = &mut out[(vector + v) * count + row..][..rows];
            out.copy_from_slice(&lanes[v * R..][..rows]);
        }
    }
}

/// `[f(0), f(1), ..]`: the standard library's way is not inlined for certain.
#[inline(always)]
fn array<'a, const N: usize>(f: impl Fn(usize) -> &'a [f32]) -> [&'a [f32]; N] {
    let mut all: [&[f32]; N] = [&[]; N];
    for (i, slice) in all.iter_mut().enumerate() {
        *slice = f(i);
    }
    all
}

#[derive(Clone, Copy)]
struct Row<'a>(&'a [f32]);

/// Multiplying by a reciprocal is 4 times as fast as dividing. Its two roundings of a number up to
/// 127 are off by at most `127 * 2^-23 = 1.5e-5`, which only near a tie can give another code.
const NEAR: f32 = 1e-4;

/// The first `len` of 16 lanes.
#[inline(always)]
pub(super) fn first(len: usize) -> __mmask16 {
    ((1u32 << len) - 1) as __mmask16
}

/// Elements `at..at + len`, at most 16, and zeros behind them. Whole vectors are not masked, which
/// is faster.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(from: &[f32], at: usize, len: usize) -> __m512 {
    let from = from[at..at + len].as_ptr();
    match len {
        // SAFETY: 16 elements.
        LANES => unsafe { _mm512_loadu_ps(from) },
        // SAFETY: lanes beyond `len` are masked out, and are not read.
        _ => unsafe { _mm512_maskz_loadu_ps(first(len), from) },
    }
}

impl Row<'_> {
    /// Calls `f(at, len, elements)` for every 16 elements, and for the rest.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn for_each_chunk(self, mut f: impl FnMut(usize, usize, __m512)) {
        let whole = self.0.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            f(at, LANES, load(self.0, at, LANES));
        }
        if whole < self.0.len() {
            let rest = self.0.len() - whole;
            f(whole, rest, load(self.0, whole, rest));
        }
    }

    /// The bits of the largest magnitude among elements `16 * i + lane`. As integers, magnitudes
    /// have the same order, with infinity and NaN above all numbers.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn max_magnitude(self) -> __m512i {
        let magnitude = _mm512_set1_epi32(0x7fff_ffff);
        let mut max = _mm512_setzero_si512();
        self.for_each_chunk(|_, _, x| {
            let bits = _mm512_and_si512(_mm512_castps_si512(x), magnitude);
            max = _mm512_max_epu32(max, bits);
        });
        max
    }

    /// Writes codes, returns partial sums of them. The magnitude of an element is at most 127
    /// scales, so nothing has to be clamped. With `FAST`, starts again if a tie may be near.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    fn quantize<const FAST: bool>(self, scale: f32, reciprocal: f32, codes: &mut [i8]) -> __m512i {
        let (by, limit) = (_mm512_set1_ps(reciprocal), _mm512_set1_ps(0.5 - NEAR));
        let mut sums = _mm512_setzero_si512();
        let mut near_tie = 0;
        self.for_each_chunk(|at, len, x| {
            let steps = match FAST {
                true => _mm512_mul_ps(x, by),
                false => _mm512_div_ps(x, _mm512_set1_ps(scale)),
            };
            let q = _mm512_cvtps_epi32(steps); // to nearest, ties to even
            if FAST {
                let rest = _mm512_abs_ps(_mm512_sub_ps(steps, _mm512_cvtepi32_ps(q)));
                near_tie |= _mm512_cmp_ps_mask::<_CMP_GT_OQ>(rest, limit);
            }
            sums = _mm512_add_epi32(sums, q);
            store(_mm512_cvtepi32_epi8(q), &mut codes[at..at + len]);
        });
        match near_tie {
            0 => sums,
            _ => self.quantize_by_division(scale, codes),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[cold]
    fn quantize_by_division(self, scale: f32, codes: &mut [i8]) -> __m512i {
        self.quantize::<false>(scale, 0.0, codes)
    }
}

/// The first codes, as many as there are places.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
fn store(codes: __m128i, to: &mut [i8]) {
    match to.len() {
        // SAFETY: 16 places.
        LANES => unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), codes) },
        // SAFETY: lanes beyond the slice are masked out.
        len => unsafe { _mm_mask_storeu_epi8(to.as_mut_ptr(), first(len), codes) },
    }
}

/// `fold!(vectors, op)`: lane `i` of the result is `op` over all lanes of vector `i`. Each level
/// halves the vectors: first within 128 bits, then across them. A macro over plain loops, because a
/// closure (that of `map` too) is not inlined for certain, and then is compiled without AVX-512.
macro_rules! fold {
    ($vectors:expr, $op:ident) => {{
        let v: [__m512; LANES] = $vectors;
        let mut pairs = [_mm512_setzero_ps(); 8];
        for (i, pair) in pairs.iter_mut().enumerate() {
            let (a, b) = (v[2 * i], v[2 * i + 1]);
            *pair = $op(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        let mut quads = [_mm512_setzero_ps(); 4];
        for (i, quad) in quads.iter_mut().enumerate() {
            let (a, b) = (_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]));
            let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
            *quad = $op(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
        }
        let mut halves = [_mm512_setzero_ps(); 2];
        for (i, half) in halves.iter_mut().enumerate() {
            let (a, b) = (quads[2 * i], quads[2 * i + 1]);
            *half = $op(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
        }
        let [a, b] = halves;
        $op(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
    }};
}

/// The larger of two magnitudes' bits.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn max_bits(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

/// Sums of integers.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_integers(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn fold_max(v: [__m512; LANES]) -> __m512i {
    _mm512_castps_si512(fold!(v, max_bits))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn fold_sum(v: [__m512; LANES]) -> __m512i {
    _mm512_castps_si512(fold!(v, add_integers))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn fold_add(v: [__m512; LANES]) -> __m512 {
    fold!(v, _mm512_add_ps)
}
