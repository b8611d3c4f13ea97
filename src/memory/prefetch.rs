//! Lines of the cache that are asked for before they are needed, where a processor does not foresee it: short
//! pieces, each far from the one before, and rows that are read once.

/// Bytes of a line.
pub(crate) const LINE: usize = 64;

/// Asks for the line of an address, which may be outside of anything: the program sees nothing of it. Does
/// nothing where Rust has no such instruction.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: reads nothing, and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the lines of a slice.
#[inline(always)]
pub(crate) fn prefetch_slice<T>(soon: &[T]) {
    for line in (0..size_of_val(soon)).step_by(LINE) {
        prefetch(soon.as_ptr().cast::<u8>().wrapping_add(line));
    }
}
