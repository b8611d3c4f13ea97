//! AVX-512: rows times an orthonormal Hadamard matrix. A block stays in registers from its first step to its
//! last; within a register, a step is a shuffle, and an addition of lanes whose signs change. (Plain loops
//! take five times as long: what is 1, 2, 4 and 8 apart becomes gathers and scatters.)

use crate::cpu::contracts::ROTATED;
use crate::cpu::plain::rotate::{factor, rotate_rest};
use std::arch::x86_64::*;

const LANES: usize = 16;

#[target_feature(enable = "avx512f")]
pub(crate) fn rotate(depth: usize, rows: &mut [f32]) {
    for row in rows.chunks_exact_mut(depth.max(1)) {
        let (blocks, mut rest) = row.as_chunks_mut::<ROTATED>();
        for block in blocks {
            vectors::<{ ROTATED / LANES }>(block);
        }
        while rest.len() >= LANES {
            let block;
            (block, rest) = rest.split_at_mut(1 << rest.len().ilog2());
            match block.len() / LANES {
                4 => vectors::<4>(block),
                2 => vectors::<2>(block),
                _ => vectors::<1>(block),
            }
        }
        rotate_rest(rest);
    }
}

/// A block of `N` registers.
#[target_feature(enable = "avx512f")]
#[inline]
fn vectors<const N: usize>(block: &mut [f32]) {
    assert_eq!(block.len(), N * LANES);
    let factor = _mm512_set1_ps(factor(N * LANES));
    let mut v = [_mm512_setzero_ps(); N];
    for (i, v) in v.iter_mut().enumerate() {
        // SAFETY: 16 of `N` times 16 elements.
        *v = within(_mm512_mul_ps(
            unsafe { _mm512_loadu_ps(block.as_ptr().add(i * LANES)) },
            factor,
        ));
    }
    if N > 1 {
        across::<N, 1>(&mut v);
    }
    if N > 2 {
        across::<N, 2>(&mut v);
    }
    if N > 4 {
        across::<N, 4>(&mut v);
    }
    for (i, v) in v.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(block.as_mut_ptr().add(i * LANES), v) };
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
