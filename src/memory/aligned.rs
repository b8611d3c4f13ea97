//! Bytes that start on a cache line.

use super::Footprint;

/// One cache line; buffers of these start on a line, so no vector load straddles two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes that start on a cache line.
#[derive(Clone)]
pub(crate) struct AlignedBytes(Vec<Line>);

impl AlignedBytes {
    /// At least `len` bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self(vec![Line([0; 64]); len.div_ceil(64)])
    }

    /// At least `len` bytes; what was there stays, what comes is zero.
    pub(crate) fn grow(&mut self, len: usize) {
        if self.0.len() < len.div_ceil(64) {
            self.0.resize(len.div_ceil(64), Line([0; 64]));
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len() * 64
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        let len = self.len();
        // SAFETY: `Line` is 64 bytes without padding, so the vector's memory is `len` valid bytes;
        // the borrow of `self` keeps it alive and unaliased.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: as in `as_mut_slice`.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len() * 64) }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }
}

impl Footprint for AlignedBytes {
    fn footprint(&self) -> usize {
        self.0.footprint()
    }
}
