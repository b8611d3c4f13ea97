//! Rows times an orthonormal Hadamard matrix, block by block.

use crate::cpu::contracts::ROTATED;

/// [`RowKernels::rotate`](crate::cpu::contracts::RowKernels::rotate).
#[inline(always)]
pub(crate) fn rotate(depth: usize, rows: &mut [f32]) {
    for row in rows.chunks_exact_mut(depth.max(1)) {
        let (blocks, rest) = row.as_chunks_mut::<ROTATED>();
        for block in blocks {
            rotate_vectors(block);
        }
        rotate_rest(rest);
    }
}

/// Less than a whole block: powers of two, largest first.
#[inline(always)]
pub(crate) fn rotate_rest(mut rest: &mut [f32]) {
    while !rest.is_empty() {
        let block;
        (block, rest) = rest.split_at_mut(1 << rest.len().ilog2());
        match block.len() {
            16.. => rotate_vectors(block),
            _ => rotate_few(block),
        }
    }
}

/// The factor that makes the matrix of a block orthonormal. It comes first, so that sums of large numbers
/// stay finite.
#[inline(always)]
pub(crate) fn factor(block: usize) -> f32 {
    1.0 / (block as f32).sqrt()
}

/// A block of 16 elements or more.
#[inline(always)]
fn rotate_vectors(block: &mut [f32]) {
    let factor = factor(block.len());
    block.iter_mut().for_each(|x| *x *= factor);
    // Distances that the compiler knows become shuffles of whole vectors.
    step::<1, 2>(block);
    step::<2, 4>(block);
    step::<4, 8>(block);
    step::<8, 16>(block);
    steps(block, 16);
}

/// Every step from a distance on: `(a, b)` to `(a + b, a - b)`.
#[inline(always)]
fn steps(block: &mut [f32], mut apart: usize) {
    while apart < block.len() {
        for pair in block.chunks_exact_mut(2 * apart) {
            let (a, b) = pair.split_at_mut(apart);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        apart *= 2;
    }
}

/// `(a, b)` to `(a + b, a - b)` for elements that are `APART` from each other; `SPAN` is twice that.
#[inline(always)]
fn step<const APART: usize, const SPAN: usize>(block: &mut [f32]) {
    for x in block.as_chunks_mut::<SPAN>().0 {
        for i in 0..APART {
            (x[i], x[i + APART]) = (x[i] + x[i + APART], x[i] - x[i + APART]);
        }
    }
}

/// A block of fewer than 16.
#[inline(always)]
fn rotate_few(block: &mut [f32]) {
    let factor = factor(block.len());
    block.iter_mut().for_each(|x| *x *= factor);
    steps(block, 1);
}
