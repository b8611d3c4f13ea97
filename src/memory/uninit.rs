//! Results that are written once, without being zeroed first: for a large result, zeroing takes as
//! long as computing.

use std::mem::MaybeUninit;

/// A vector of `len` elements that `fill` has written.
///
/// # Safety
/// `fill` writes every element of its slice.
pub(crate) unsafe fn written<T>(len: usize, fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    ask_for_huge_pages(&mut out);
    fill(&mut out.spare_capacity_mut()[..len]);
    // SAFETY: the capacity is at least `len`, and `fill` wrote all elements by contract.
    unsafe { out.set_len(len) };
    out
}

/// From this size on, allocators take fresh memory from the system and give it back afterwards.
#[cfg(target_os = "linux")]
const FRESH_FROM: usize = 32 << 20;

/// Asks for 2 MiB pages where that helps: the first touch of fresh memory in pages of 4 KiB takes
/// several times as long as writing it, and most of the time of a large result.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(out: &mut Vec<T>) {
    const PAGE: usize = 4096;
    let (start, bytes) = (out.as_mut_ptr() as usize, out.capacity() * size_of::<T>());
    if bytes < FRESH_FROM {
        return;
    }
    let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
    // SAFETY: whole pages inside this vector's own allocation. The advice changes how they are
    // backed, not what they hold; where it is refused, nothing has changed.
    unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_: &mut Vec<T>) {}

/// Memory that holds numbers already, for functions that only write numbers.
///
/// # Safety
/// Nothing but initialized numbers is written.
pub(crate) unsafe fn overwrite(numbers: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the same layout, and `numbers` stays initialized by contract.
    unsafe { &mut *(std::ptr::from_mut(numbers) as *mut [MaybeUninit<f32>]) }
}
