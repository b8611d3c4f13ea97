//! AVX-512: rows less a mean, times an orthonormal Hadamard matrix. A block stays in registers from its first step to its
//! last; within a register, a step is a shuffle, and an addition of lanes whose signs change. (Plain loops
//! take five times as long: what is 1, 2, 4 and 8 apart becomes gathers and scatters.)

use super::rows::{Ends, first, load};
use crate::cpu::contracts::{Condition, LANES, ROTATED, Rows};
use crate::cpu::plain::rotate::{factor, rotate_rest};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f")]
pub(super) fn rotate(depth: usize, rows: &mut [f32]) {
    let depth = depth.max(1);
    for rows in rows.chunks_mut(LANES * depth) {
        let (count, at) = (rows.len() / depth, rows.as_mut_ptr());
        let from = Strided { at, stride: depth };
        // SAFETY: as many whole rows are there.
        unsafe { blocks::<true>((from, None, at), (count, depth), &mut [Ends::none(); LANES]) };
        rows.chunks_exact_mut(depth).for_each(|row| rotate_rest(&mut row[depth / LANES * LANES..]));
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn condition(job: Condition<'_>) {
    let depth = job.rows.depth();
    let values = job.values.chunks_mut(LANES * depth);
    let ranges = job.ranges.low.chunks_mut(LANES).zip(job.ranges.high.chunks_mut(LANES));
    for (index, (values, (low, high))) in values.zip(ranges).enumerate() {
        let (start, count) = (index * LANES, low.len());
        let rows = job.rows.part(start..start + count);
        let ends = condition_rows(rows, job.mean, job.rotate, values);
        assert_eq!(high.len(), count);
        // SAFETY: lanes beyond the slices are masked out.
        unsafe {
            _mm512_mask_storeu_ps(low.as_mut_ptr(), first(count), ends.0);
            _mm512_mask_storeu_ps(high.as_mut_ptr(), first(count), ends.1);
        }
    }
}

/// Up to 16 rows; returns both ends of the range of each.
#[target_feature(enable = "avx512f")]
fn condition_rows(
    rows: Rows<'_>,
    mean: Option<&[f32]>,
    rotated: bool,
    values: &mut [f32],
) -> (__m512, __m512) {
    let (count, depth) = (rows.count(), rows.depth());
    assert!(count <= LANES && values.len() == count * depth);
    assert!(mean.is_none_or(|mean| mean.len() == depth));
    let from = Strided { at: rows.data().as_ptr(), stride: rows.stride() };
    let job = (from, mean.map(<[f32]>::as_ptr), values.as_mut_ptr());
    let mut ends = [Ends::none(); LANES];
    // SAFETY: the rows, the mean and the values have these lengths.
    unsafe {
        match rotated {
            true => blocks::<true>(job, (count, depth), &mut ends),
            false => blocks::<false>(job, (count, depth), &mut ends),
        }
    }
    let whole = depth / LANES * LANES;
    if whole < depth {
        let mean = mean.map(|mean| &mean[whole..]);
        for (i, to) in values.chunks_exact_mut(depth).enumerate() {
            let (row, to) = (&rows.row(i)[whole..], &mut to[whole..]);
            for (at, to) in to.iter_mut().enumerate() {
                *to = row[at] - mean.map_or(0.0, |mean| mean[at]);
            }
            if rotated {
                rotate_rest(to);
            }
            ends[i] = ends[i].and(load(to, 0, to.len()));
        }
    }
    Ends::fold(ends)
}

/// Rows somewhere.
#[derive(Clone, Copy)]
struct Strided {
    at: *const f32,
    stride: usize,
}

/// From where, less what, to where: rows that follow each other.
type Job = (Strided, Option<*const f32>, *mut f32);

/// All whole vectors of up to 16 rows, less a mean, and rotated if `ROTATE`, block by block; takes in the
/// elements of each row.
///
/// # Safety
/// There are `count` rows of `depth` elements at both, which may be the same, and `depth` of the mean.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn blocks<const ROTATE: bool>(
    (from, mean, to): Job,
    (count, depth): (usize, usize),
    ends: &mut [Ends; LANES],
) {
    let mut at = 0;
    while depth - at >= LANES {
        let block = if ROTATE { (1 << (depth - at).ilog2()).min(ROTATED) } else { LANES };
        // SAFETY: by contract.
        unsafe {
            let from = Strided { at: from.at.add(at), ..from };
            let job = (from, mean.map(|mean| mean.add(at)), to.add(at));
            match block / LANES {
                8 => vectors::<8, ROTATE>(job, depth, &mut ends[..count]),
                4 => vectors::<4, ROTATE>(job, depth, &mut ends[..count]),
                2 => vectors::<2, ROTATE>(job, depth, &mut ends[..count]),
                _ => vectors::<1, ROTATE>(job, depth, &mut ends[..count]),
            }
        }
        at += block;
    }
}

/// A block of `N` registers of each row. A function of its own, so that what all rows need stays in
/// registers.
///
/// # Safety
/// There are `N` times 16 elements of as many rows as have ends, `depth` elements from one to the next
/// where they go to, and of the mean.
#[target_feature(enable = "avx512f")]
#[inline(never)]
unsafe fn vectors<const N: usize, const ROTATE: bool>(
    (from, mean, to): Job,
    depth: usize,
    ends: &mut [Ends],
) {
    let factor = _mm512_set1_ps(factor(N * LANES));
    // Less nothing is less 0.
    let mut less = [_mm512_setzero_ps(); N];
    if let Some(mean) = mean {
        for (i, less) in less.iter_mut().enumerate() {
            // SAFETY: 16 of `N` times 16 elements.
            *less = unsafe { _mm512_loadu_ps(mean.add(i * LANES)) };
        }
    }
    for (row, ends) in ends.iter_mut().enumerate() {
        let mut v = [_mm512_setzero_ps(); N];
        for (i, v) in v.iter_mut().enumerate() {
            // SAFETY: as above.
            let x = unsafe { _mm512_loadu_ps(from.at.add(row * from.stride + i * LANES)) };
            *v = _mm512_sub_ps(x, less[i]);
            if ROTATE {
                *v = within(_mm512_mul_ps(*v, factor));
            }
        }
        if ROTATE && N > 1 {
            across::<N, 1>(&mut v);
        }
        if ROTATE && N > 2 {
            across::<N, 2>(&mut v);
        }
        if ROTATE && N > 4 {
            across::<N, 4>(&mut v);
        }
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to.add(row * depth + i * LANES), v) };
            *ends = ends.and(v);
        }
    }
}

/// The steps of elements that are 1, 2, 4 and 8 apart. A product with 1 or -1 is exact, so the fused
/// addition rounds as that of the other levels does.
#[target_feature(enable = "avx512f")]
#[inline]
fn within(x: __m512) -> __m512 {
    let x = _mm512_fmadd_ps(x, signs(1), _mm512_permute_ps::<0xb1>(x));
    let x = _mm512_fmadd_ps(x, signs(2), _mm512_permute_ps::<0x4e>(x));
    let x = _mm512_fmadd_ps(x, signs(4), _mm512_shuffle_f32x4::<0xb1>(x, x));
    _mm512_fmadd_ps(x, signs(8), _mm512_shuffle_f32x4::<0x4e>(x, x))
}

/// 1 in lanes that are the first of a pair `apart`, -1 in those that are the second.
#[target_feature(enable = "avx512f")]
#[inline]
fn signs(apart: usize) -> __m512 {
    let mut signs = [1f32; LANES];
    for (lane, sign) in signs.iter_mut().enumerate() {
        if lane & apart != 0 {
            *sign = -1.0;
        }
    }
    // SAFETY: 16 elements.
    unsafe { _mm512_loadu_ps(signs.as_ptr()) }
}

/// The step of registers that are `APART` from each other.
#[target_feature(enable = "avx512f")]
#[inline]
fn across<const N: usize, const APART: usize>(v: &mut [__m512; N]) {
    let mut i = 0;
    while i < N {
        if i & APART == 0 {
            let (a, b) = (v[i], v[i + APART]);
            v[i] = _mm512_add_ps(a, b);
            v[i + APART] = _mm512_sub_ps(a, b);
        }
        i += 1;
    }
}
