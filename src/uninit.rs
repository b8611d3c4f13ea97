//! Results that are written once, without being zeroed first: for a large result, zeroing takes as
//! long as computing.

use std::mem::MaybeUninit;

/// A vector of `len` elements that `fill` has written.
///
/// # Safety
/// `fill` writes every element of its slice.
pub(crate) unsafe fn written<T>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    fill(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and `fill` wrote all elements by contract.
    unsafe { out.set_len(len) };
    out
}

/// Memory that holds numbers already, for functions that only write numbers.
pub(crate) fn overwrite(numbers: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the same layout; the functions this is passed to (`gemm::score_tiles`) write
    // initialized numbers or nothing, so `numbers` stays initialized.
    unsafe { &mut *(std::ptr::from_mut(numbers) as *mut [MaybeUninit<f32>]) }
}
