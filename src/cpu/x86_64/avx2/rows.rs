//! AVX2: dot products, rows less a mean, rotated.
//!
//! The loops of plain Rust take four times as long: what is 1, 2 and 4 elements apart becomes gathers, and 16
//! sums of lanes are added up one by one.

use super::codes::quantize;
use crate::cpu::contracts::{Condition, LANES, ROTATED, RowKernels, Rows};
use crate::cpu::plain::lanes::lanes;
use crate::cpu::plain::rotate::{factor, rotate_rest};
use crate::cpu::x86_64::{copy_first, starts};
use std::arch::x86_64::*;

/// Lanes of a register.
const HALF: usize = LANES / 2;

pub(crate) const ROWS: RowKernels =
    RowKernels { name: super::NAME, quantize, condition, dots, rotate, ..super::ROWS };

#[target_feature(enable = "avx2")]
fn dots(rows: Rows<'_>, vectors: Rows<'_>, out: &mut [f32]) {
    // Four sums at a time, of one vector or of two: each row and each vector is loaded for all of them.
    for vector in (0..vectors.count()).step_by(2) {
        match vectors.count() - vector {
            1 => dots_of::<4, 1>(rows, vectors, vector, out),
            _ => dots_of::<2, 2>(rows, vectors, vector, out),
        }
    }
}

/// Those of `V` vectors from one on, `R` rows at a time; `R * V` is 4.
#[target_feature(enable = "avx2")]
fn dots_of<const R: usize, const V: usize>(
    rows: Rows<'_>,
    vectors: Rows<'_>,
    vector: usize,
    out: &mut [f32],
) {
    let (count, depth) = (rows.count(), rows.depth());
    let whole = depth / LANES * LANES;
    let vectors_at = starts::<V>(vectors, vector);
    for row in (0..count).step_by(R) {
        // What is missing in the last rows repeats the last of them.
        let rows_at = starts::<R>(rows, row);
        let mut sums = [[_mm256_setzero_ps(); 2]; 4];
        for at in (0..whole).step_by(LANES) {
            // SAFETY: elements `at..at + 16` of rows of `depth` elements.
            unsafe { add_products(&mut sums, &rows_at, &vectors_at, at) };
        }
        if whole < depth {
            let xs: [_; R] = ends(rows, row, whole);
            let ys: [_; V] = ends(vectors, vector, whole);
            let at = (xs.each_ref().map(|x| x.as_ptr()), ys.each_ref().map(|y| y.as_ptr()));
            // SAFETY: 16 elements each.
            unsafe { add_products(&mut sums, &at.0, &at.1, 0) };
        }
        let mut four = [0f32; 4];
        // SAFETY: 4 elements.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums_of_lanes(sums)) };
        let rows = R.min(count - row);
        for v in 0..V {
            copy_first::<R, _>(&four[v * R..], &mut out[(vector + v) * count + row..][..rows]);
        }
    }
}

/// The last elements of `N` rows from `first` on, from `whole` on, with zeros behind them; those of the last of all
/// rows in the place of what is not there.
fn ends<const N: usize>(rows: Rows<'_>, first: usize, whole: usize) -> [[f32; LANES]; N] {
    let mut ends = [[0.0; LANES]; N];
    for (i, end) in ends.iter_mut().enumerate() {
        *end = lanes(rows.row((first + i).min(rows.count() - 1)), whole);
    }
    ends
}

/// Adds the products of 16 elements, from `at` on, of `V` vectors and `R` rows.
///
/// # Safety
/// Rows and vectors have these elements.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn add_products<const R: usize, const V: usize>(
    sums: &mut [[__m256; 2]; 4],
    rows: &[*const f32; R],
    vectors: &[*const f32; V],
    at: usize,
) {
    for (half, at) in [at, at + HALF].into_iter().enumerate() {
        let mut xs = [_mm256_setzero_ps(); R];
        for (x, row) in xs.iter_mut().zip(rows) {
            // SAFETY: 8 elements by contract.
            *x = unsafe { _mm256_loadu_ps(row.add(at)) };
        }
        for (v, vector) in vectors.iter().enumerate() {
            // SAFETY: as above.
            let y = unsafe { _mm256_loadu_ps(vector.add(at)) };
            for (r, x) in xs.into_iter().enumerate() {
                let sum = &mut sums[v * R + r][half];
                // Not fused, so that levels without such an instruction give the same bits.
                *sum = _mm256_add_ps(_mm256_mul_ps(x, y), *sum);
            }
        }
    }
}

/// The sum of the 16 lanes of each of four, as `plain::sum_lanes` adds them up.
#[target_feature(enable = "avx2")]
#[inline]
fn sums_of_lanes(sums: [[__m256; 2]; 4]) -> __m128 {
    let mut halves = [_mm_setzero_ps(); 2];
    for (i, half) in halves.iter_mut().enumerate() {
        let [a, b, c, d] = [sums[0][i], sums[1][i], sums[2][i], sums[3][i]];
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        let all = _mm256_add_ps(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
        *half = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
    }
    _mm_add_ps(halves[0], halves[1])
}

#[target_feature(enable = "avx2,fma")]
fn rotate(depth: usize, rows: &mut [f32]) {
    let depth = depth.max(1);
    for row in rows.chunks_exact_mut(depth) {
        let at = row.as_mut_ptr();
        // SAFETY: one whole row.
        unsafe { blocks::<true>((at, None, at), depth) };
        rotate_rest(&mut row[depth / LANES * LANES..]);
    }
}

#[target_feature(enable = "avx2,fma")]
fn condition(job: Condition<'_>) {
    let depth = job.rows.depth();
    assert!(job.mean.is_none_or(|mean| mean.len() == depth));
    let whole = depth / LANES * LANES;
    let ranges = job.ranges.low.iter_mut().zip(&mut job.ranges.high);
    let out = job.values.chunks_exact_mut(depth).zip(ranges);
    for (row, (to, (low, high))) in job.rows.iter().zip(out) {
        let from = (row.as_ptr(), job.mean.map(<[f32]>::as_ptr), to.as_mut_ptr());
        // SAFETY: the row, the mean and the values have this length.
        let ends = unsafe {
            match job.rotate {
                true => blocks::<true>(from, depth),
                false => blocks::<false>(from, depth),
            }
        };
        let rest = &mut to[whole..];
        for (i, to) in rest.iter_mut().enumerate() {
            *to = row[whole + i] - job.mean.map_or(0.0, |mean| mean[whole + i]);
        }
        if job.rotate {
            rotate_rest(rest);
        }
        (*low, *high) = ends.with(rest);
    }
}

/// What a row has of its range, as [`RowRanges`](crate::cpu::contracts::RowRanges) finds it.
#[derive(Clone, Copy)]
struct Ends {
    low: __m256i,
    high: __m256i,
}

impl Ends {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn none() -> Self {
        Self { low: _mm256_set1_epi32(i32::MIN), high: _mm256_setzero_si256() }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn and(self, x: __m256) -> Self {
        let x = _mm256_castps_si256(x);
        Self { low: _mm256_max_epu32(self.low, x), high: _mm256_max_epi32(self.high, x) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn union(self, other: Self) -> Self {
        let low = _mm256_max_epu32(self.low, other.low);
        Self { low, high: _mm256_max_epi32(self.high, other.high) }
    }

    /// Both ends, with what is left of the row.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn with(self, rest: &[f32]) -> (f32, f32) {
        let both = |x: __m256i| (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let ((a, b), (c, d)) = (both(self.low), both(self.high));
        let (low, high) = (_mm_max_epu32(a, b), _mm_max_epi32(c, d));
        let low = _mm_max_epu32(low, _mm_shuffle_epi32::<0x4e>(low));
        let high = _mm_max_epi32(high, _mm_shuffle_epi32::<0x4e>(high));
        let low = _mm_max_epu32(low, _mm_shuffle_epi32::<0xb1>(low));
        let high = _mm_max_epi32(high, _mm_shuffle_epi32::<0xb1>(high));
        let (low, high) = (_mm_cvtsi128_si32(low) as u32, _mm_cvtsi128_si32(high));
        let low = rest.iter().fold(low, |low, x| low.max(x.to_bits()));
        let high = rest.iter().fold(high, |high, x| high.max(x.to_bits() as i32));
        (f32::from_bits(low), f32::from_bits(high as u32))
    }
}

/// From where, less what, to where.
type Job = (*const f32, Option<*const f32>, *mut f32);

/// All whole 16 elements of a row, less a mean, and rotated if `ROTATE`, block by block; returns their ends.
///
/// # Safety
/// There are `depth` elements at all, of which the first and the last may be the same.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn blocks<const ROTATE: bool>((from, mean, to): Job, depth: usize) -> Ends {
    let mut ends = Ends::none();
    let mut at = 0;
    while depth - at >= LANES {
        let block = if ROTATE { (1 << (depth - at).ilog2()).min(ROTATED) } else { LANES };
        // SAFETY: by contract.
        let of_block = unsafe {
            let job = (from.add(at), mean.map(|mean| mean.add(at)), to.add(at));
            let factor = _mm256_set1_ps(factor(block));
            match block / HALF {
                16 => both_halves(job, factor),
                8 => vectors::<8, ROTATE>(job, factor),
                4 => vectors::<4, ROTATE>(job, factor),
                _ => vectors::<2, ROTATE>(job, factor),
            }
        };
        ends = ends.union(of_block);
        at += block;
    }
    ends
}

/// A block of 16 registers, more than there are: its halves, then the last step.
///
/// # Safety
/// There are as many elements at all.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn both_halves((from, mean, to): Job, factor: __m256) -> Ends {
    const HALF_BLOCK: usize = ROTATED / 2;
    let mut ends = Ends::none();
    // SAFETY: by contract.
    unsafe {
        for at in [0, HALF_BLOCK] {
            let job = (from.add(at), mean.map(|mean| mean.add(at)), to.add(at));
            vectors::<8, true>(job, factor);
        }
        for at in (0..HALF_BLOCK).step_by(HALF) {
            let (a, b) = (_mm256_loadu_ps(to.add(at)), _mm256_loadu_ps(to.add(HALF_BLOCK + at)));
            for (to, x) in
                [(to.add(at), _mm256_add_ps(a, b)), (to.add(HALF_BLOCK + at), _mm256_sub_ps(a, b))]
            {
                _mm256_storeu_ps(to, x);
                ends = ends.and(x);
            }
        }
    }
    ends
}

/// `N` registers.
///
/// # Safety
/// There are as many elements at all.
#[target_feature(enable = "avx2,fma")]
#[inline]
unsafe fn vectors<const N: usize, const ROTATE: bool>(
    (from, mean, to): Job,
    factor: __m256,
) -> Ends {
    let mut v = [_mm256_setzero_ps(); N];
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: 8 of `N` times 8 elements.
        *v = unsafe {
            let x = _mm256_loadu_ps(from.add(i * HALF));
            match mean {
                Some(mean) => _mm256_sub_ps(x, _mm256_loadu_ps(mean.add(i * HALF))),
                None => x,
            }
        };
        if ROTATE {
            *v = within(_mm256_mul_ps(*v, factor));
        }
    }
    if ROTATE {
        across::<N, 1>(&mut v);
    }
    if ROTATE && N > 2 {
        across::<N, 2>(&mut v);
    }
    if ROTATE && N > 4 {
        across::<N, 4>(&mut v);
    }
    let mut ends = Ends::none();
    for (i, v) in v.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(to.add(i * HALF), v) };
        ends = ends.and(v);
    }
    ends
}

/// The steps of elements that are 1, 2 and 4 apart. A product with 1 or -1 is exact, so the fused addition
/// rounds as that of the other levels does.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn within(x: __m256) -> __m256 {
    let ones = _mm256_setr_ps(1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0);
    let twos = _mm256_setr_ps(1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0);
    let fours = _mm256_setr_ps(1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0);
    let x = _mm256_fmadd_ps(x, ones, _mm256_permute_ps::<0xb1>(x));
    let x = _mm256_fmadd_ps(x, twos, _mm256_permute_ps::<0x4e>(x));
    _mm256_fmadd_ps(x, fours, _mm256_permute2f128_ps::<0x01>(x, x))
}

/// The step of registers that are `APART` from each other.
#[target_feature(enable = "avx2")]
#[inline]
fn across<const N: usize, const APART: usize>(v: &mut [__m256; N]) {
    let mut i = 0;
    while i < N {
        if i & APART == 0 {
            let (a, b) = (v[i], v[i + APART]);
            v[i] = _mm256_add_ps(a, b);
            v[i + APART] = _mm256_sub_ps(a, b);
        }
        i += 1;
    }
}
