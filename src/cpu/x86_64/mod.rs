//! x86 with 64 bits: one folder a level, and what the level `portable` has there.

pub(crate) mod avx2;
pub(crate) mod avx512_vnni;
pub(crate) mod avx_vnni;
pub(crate) mod sse2;

use crate::cpu::contracts::Rows;

/// Copies as many elements as there are places, mostly `N`: a copy of a length that is known takes one
/// instruction, and any other a call.
#[inline(always)]
pub(crate) fn copy_first<const N: usize, T: Copy>(from: &[T], to: &mut [T]) {
    match (from.first_chunk::<N>(), <&mut [T; N]>::try_from(&mut *to)) {
        (Some(from), Ok(to)) => *to = *from,
        _ => to.copy_from_slice(&from[..to.len()]),
    }
}

/// Where `N` rows from `first` on start; the last of all in the place of those that are not there.
#[inline(always)]
pub(crate) fn starts<const N: usize>(rows: Rows<'_>, first: usize) -> [*const f32; N] {
    let mut starts = [std::ptr::null(); N];
    for (i, start) in starts.iter_mut().enumerate() {
        *start = rows.row((first + i).min(rows.count() - 1)).as_ptr();
    }
    starts
}
