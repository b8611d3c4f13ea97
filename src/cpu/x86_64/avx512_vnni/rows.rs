//! AVX-512: codes with a scale for each row, which is what every query and key of the default configuration
//! goes through, and dot products.
//!
//! Rows are taken 16 at a time, so that what is found for each row (a maximum, a sum) is folded for
//! all of them at once, and their scales are one vector.

use crate::cpu::contracts::{BlockCodes, LANES, RowRanges, Rows};
use crate::cpu::plain::rows::{NEAR, ROUND};
use crate::cpu::x86_64::{copy_first, starts};
use std::arch::x86_64::*;

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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn quantize(
    affine: bool,
    rows: Rows<'_>,
    ranges: Option<&RowRanges>,
    out: BlockCodes<'_>,
) {
    match affine {
        true => quantize_rows::<true>(rows, ranges, out),
        false => quantize_rows::<false>(rows, ranges, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_rows<const AFFINE: bool>(
    rows: Rows<'_>,
    ranges: Option<&RowRanges>,
    out: BlockCodes<'_>,
) {
    let depth = rows.depth();
    let row = |row: usize| Row(rows.row(row));
    for start in (0..rows.count()).step_by(LANES) {
        let count = LANES.min(rows.count() - start);
        let (low, high) = match ranges {
            Some(RowRanges { low, high }) => (load(low, start, count), load(high, start, count)),
            None => {
                let mut ends = [Ends::none(); LANES];
                for (i, ends) in ends[..count].iter_mut().enumerate() {
                    row(start + i).for_each_chunk(|_, _, x| *ends = ends.and(x));
                }
                Ends::fold(ends)
            }
        };
        let params = Params::of::<AFFINE>(low, high);
        let (scales, zeros) = (floats(params.scales), integers(params.zeros));
        let reciprocals = floats(params.reciprocals);
        let mut folded = [_mm512_setzero_ps(); LANES];
        for i in 0..count {
            let codes = &mut out.codes[(start + i) * depth..(start + i + 1) * depth];
            let step = (scales[i], reciprocals[i], zeros[i]);
            let sums = row(start + i).quantize::<AFFINE, true>(step, codes);
            folded[i] = _mm512_castsi512_ps(sums);
        }
        for i in (0..count).filter(|i| params.finite >> i & 1 == 0) {
            out.codes[(start + i) * depth..(start + i + 1) * depth].fill(0);
            folded[i] = _mm512_setzero_ps();
        }
        let these = start..start + count;
        copy_first::<LANES, _>(&scales, &mut out.scales[these.clone()]);
        copy_first::<LANES, _>(&zeros, &mut out.zeros[these.clone()]);
        copy_first::<LANES, _>(&integers(fold_sum(folded)), &mut out.sums[these]);
    }
}

/// Scale and zero point of 16 rows, the reciprocals of the scales, and which rows are finite: as
/// `plain::rows::symmetric_scale` and `affine_params` find them, NaN and 0 for a row that is not finite.
struct Params {
    scales: __m512,
    reciprocals: __m512,
    zeros: __m512i,
    finite: __mmask16,
}

impl Params {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn of<const AFFINE: bool>(low: __m512, high: __m512) -> Self {
        let magnitude = max_bits(_mm512_abs_ps(low), _mm512_abs_ps(high));
        let infinity = _mm512_set1_epi32(f32::INFINITY.to_bits() as i32);
        let finite = _mm512_cmplt_epu32_mask(_mm512_castps_si512(magnitude), infinity);
        let (all, one) = (_mm512_set1_ps(if AFFINE { 255.0 } else { 127.0 }), _mm512_set1_ps(1.0));
        let width = if AFFINE { _mm512_sub_ps(high, low) } else { magnitude };
        let mut scales = _mm512_div_ps(width, all);
        if AFFINE {
            let apart = _mm512_sub_ps(_mm512_div_ps(high, all), _mm512_div_ps(low, all));
            let overflow = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(width, _mm512_castsi512_ps(infinity));
            scales = _mm512_mask_blend_ps(overflow, scales, apart);
        }
        scales = _mm512_max_ps(scales, _mm512_set1_ps(f32::MIN_POSITIVE));
        let nothing = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(width, _mm512_setzero_ps());
        scales = _mm512_mask_blend_ps(nothing, scales, one);
        let mut zeros = _mm512_setzero_si512();
        if AFFINE {
            let below = _mm512_cvtps_epi32(_mm512_div_ps(low, scales)); // to nearest, ties to even
            let zero = _mm512_sub_epi32(_mm512_set1_epi32(-128), below);
            zeros = _mm512_maskz_mov_epi32(finite & !nothing, zero);
        }
        let scales = _mm512_mask_blend_ps(finite, _mm512_set1_ps(f32::NAN), scales);
        Self { scales, reciprocals: _mm512_div_ps(one, scales), zeros, finite }
    }
}

/// What a row has of its range, as [`RowRanges`] finds it.
#[derive(Clone, Copy)]
pub(super) struct Ends {
    low: __m512,
    high: __m512,
}

impl Ends {
    /// Of no elements.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn none() -> Self {
        Self { low: _mm512_set1_ps(-0.0), high: _mm512_setzero_ps() }
    }

    /// With 16 elements more.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn and(self, x: __m512) -> Self {
        Self { low: max_bits(self.low, x), high: max_signed(self.high, x) }
    }

    /// The ends of 16 rows.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(super) fn fold(ends: [Ends; LANES]) -> (__m512, __m512) {
        let (mut low, mut high) = ([_mm512_setzero_ps(); LANES], [_mm512_setzero_ps(); LANES]);
        for (i, ends) in ends.into_iter().enumerate() {
            (low[i], high[i]) = (ends.low, ends.high);
        }
        (fold!(low, max_bits), fold!(high, max_signed))
    }
}

/// Lanes as an array.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn floats(x: __m512) -> [f32; LANES] {
    // SAFETY: of one size, and every bit pattern is a number.
    unsafe { std::mem::transmute(x) }
}

/// Likewise.
#[target_feature(enable = "avx512f")]
#[inline]
fn integers(x: __m512i) -> [i32; LANES] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(x) }
}

#[target_feature(enable = "avx512f")]
pub(super) fn dots(rows: Rows<'_>, vectors: Rows<'_>, out: &mut [f32]) {
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
    let whole = depth / LANES * LANES;
    // What is missing in the last rows and vectors repeats the last of them.
    let vectors_at = starts::<V>(vectors, vector);
    for row in (0..count).step_by(R) {
        let rows_at = starts::<R>(rows, row);
        let mut sums = [_mm512_setzero_ps(); LANES];
        for at in (0..whole).step_by(LANES) {
            // SAFETY: elements `at..at + 16` of rows of `depth` elements.
            unsafe { add_products::<R, V, true>(&mut sums, (&rows_at, &vectors_at), at, LANES) };
        }
        if whole < depth {
            let rest = depth - whole;
            // SAFETY: their last elements.
            unsafe { add_products::<R, V, false>(&mut sums, (&rows_at, &vectors_at), whole, rest) };
        }
        let lanes = floats(fold_add(sums));
        let rows = R.min(count - row);
        for v in 0..V.min(vectors.count() - vector) {
            copy_first::<R, _>(&lanes[v * R..], &mut out[(vector + v) * count + row..][..rows]);
        }
    }
}

/// Adds the products of elements `at..at + len` of `V` vectors and `R` rows, 16 of them if `WHOLE`.
///
/// # Safety
/// Rows and vectors have these elements.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn add_products<const R: usize, const V: usize, const WHOLE: bool>(
    sums: &mut [__m512; LANES],
    (rows, vectors): (&[*const f32; R], &[*const f32; V]),
    at: usize,
    len: usize,
) {
    let mut xs = [_mm512_setzero_ps(); R];
    for (x, row) in xs.iter_mut().zip(rows) {
        // SAFETY: by contract.
        *x = unsafe { load_at::<WHOLE>(row.add(at), len) };
    }
    for (v, vector) in vectors.iter().enumerate() {
        // SAFETY: by contract.
        let y = unsafe { load_at::<WHOLE>(vector.add(at), len) };
        for (r, x) in xs.into_iter().enumerate() {
            let sum = &mut sums[v * R + r];
            // Not fused, so that levels without such an instruction give the same bits.
            *sum = _mm512_add_ps(_mm512_mul_ps(x, y), *sum);
        }
    }
}

#[derive(Clone, Copy)]
struct Row<'a>(&'a [f32]);

/// Of two numbers, the magnitude that is larger.
const LARGER_MAGNITUDE: i32 = 0b10_11;

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
        LANES => unsafe { load_at::<true>(from, len) },
        // SAFETY: `len` elements.
        _ => unsafe { load_at::<false>(from, len) },
    }
}

/// `len` elements and zeros behind them; 16 if `WHOLE`.
///
/// # Safety
/// They are there.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_at<const WHOLE: bool>(from: *const f32, len: usize) -> __m512 {
    match WHOLE {
        // SAFETY: by contract.
        true => unsafe { _mm512_loadu_ps(from) },
        // SAFETY: lanes beyond `len` are masked out, and are not read.
        false => unsafe { _mm512_maskz_loadu_ps(first(len), from) },
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

    /// Writes codes, returns partial sums of them. No element is beyond the range, so only the largest may be
    /// one step too far, where its end and the zero point are both rounded up. With `FAST`, starts again if a
    /// tie may be near.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    fn quantize<const AFFINE: bool, const FAST: bool>(
        self,
        (scale, reciprocal, zero): (f32, f32, i32),
        codes: &mut [i8],
    ) -> __m512i {
        let (by, round) = (_mm512_set1_ps(reciprocal), _mm512_set1_ps(ROUND));
        let offset = _mm512_set1_epi32(zero - ROUND.to_bits() as i32);
        let mut sums = _mm512_setzero_si512();
        let mut rests = _mm512_setzero_ps();
        self.for_each_chunk(|at, len, x| {
            // To nearest, ties to even.
            let steps = match FAST {
                true => _mm512_fmadd_ps(x, by, round),
                false => _mm512_add_ps(_mm512_div_ps(x, _mm512_set1_ps(scale)), round),
            };
            if FAST {
                let rest = _mm512_fmsub_ps(x, by, _mm512_sub_ps(steps, round));
                rests = _mm512_range_ps::<LARGER_MAGNITUDE>(rests, rest);
            }
            let mut q = _mm512_add_epi32(_mm512_castps_si512(steps), offset);
            if AFFINE {
                q = _mm512_min_epi32(q, _mm512_set1_epi32(127));
                // What is missing in the last vector is not part of the sum.
                q = _mm512_maskz_mov_epi32(first(len), q);
            }
            sums = _mm512_add_epi32(sums, q);
            store(_mm512_cvtepi32_epi8(q), &mut codes[at..at + len]);
        });
        match _mm512_cmp_ps_mask::<_CMP_GT_OQ>(rests, _mm512_set1_ps(0.5 - NEAR)) {
            0 => sums,
            _ => self.quantize_by_division::<AFFINE>((scale, reciprocal, zero), codes),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[cold]
    fn quantize_by_division<const AFFINE: bool>(
        self,
        step: (f32, f32, i32),
        codes: &mut [i8],
    ) -> __m512i {
        self.quantize::<AFFINE, false>(step, codes)
    }
}

/// The first codes, as many as there are places.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline]
fn store(codes: __m128i, to: &mut [i8]) {
    match to.len() {
        // SAFETY: 16 places.
        LANES => unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), codes) },
        // SAFETY: lanes beyond the slice are masked out.
        len => unsafe { _mm_mask_storeu_epi8(to.as_mut_ptr(), first(len), codes) },
    }
}

/// The larger of the bits of two numbers, as signed integers.
#[target_feature(enable = "avx512f")]
#[inline]
fn max_signed(a: __m512, b: __m512) -> __m512 {
    _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)))
}

/// The same, as unsigned ones.
#[target_feature(enable = "avx512f")]
#[inline]
fn max_bits(a: __m512, b: __m512) -> __m512 {
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
fn fold_sum(v: [__m512; LANES]) -> __m512i {
    _mm512_castps_si512(fold!(v, add_integers))
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn fold_add(v: [__m512; LANES]) -> __m512 {
    fold!(v, _mm512_add_ps)
}
