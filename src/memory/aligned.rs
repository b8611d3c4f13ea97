//! Numbers that start on a cache line.

use super::{Footprint, LINE};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// What fills cache lines.
///
/// # Safety
/// Any bits are a valid value, and a line is a whole number of values.
pub(crate) unsafe trait Number: Copy + Default {}

macro_rules! numbers {
    ($($number:ty),*) => { $(
        // SAFETY: a plain number, whose size is a power of two.
        unsafe impl Number for $number {}
    )* };
}
numbers!(u8, i8, u16, i16, f32);

/// Numbers that start on a cache line, so that no load or store of a vector straddles two; large memory from an
/// allocator starts 16 bytes behind one. It grows like a `Vec`.
#[derive(Clone)]
pub(crate) struct Aligned<T> {
    lines: Vec<Line>,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, numbers: PhantomData }
    }
}

impl<T: Number> Aligned<T> {
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut numbers = Self::default();
        numbers.resize(len);
        numbers
    }

    /// To exactly `len`: what was there stays, what comes is zero.
    pub(crate) fn resize(&mut self, len: usize) {
        let old = self.len;
        self.make_room(len);
        if old < len {
            self[old..].fill(T::default());
        }
    }

    /// To exactly `len`: what comes is anything.
    fn make_room(&mut self, len: usize) {
        let lines = len.div_ceil(LINE / size_of::<T>());
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; LINE]));
        }
        self.len = len;
    }

    /// To at least `len`.
    pub(crate) fn grow(&mut self, len: usize) {
        self.resize(len.max(self.len));
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn extend_from_slice(&mut self, numbers: &[T]) {
        let len = self.len;
        self.make_room(len + numbers.len());
        self[len..].copy_from_slice(numbers);
    }
}

impl<T: Number> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the lines hold at least `len` numbers, whatever their bytes are.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Number> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T> Footprint for Aligned<T> {
    fn footprint(&self) -> usize {
        self.lines.footprint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_starts_on_a_line_and_keeps_what_is_there() {
        let mut numbers = Aligned::<f32>::default();
        assert!(numbers.is_empty());
        for len in [1, 15, 16, 17, 1000] {
            let old = numbers.len();
            numbers.resize(len);
            assert_eq!((numbers.len(), numbers.as_ptr() as usize % LINE), (len, 0));
            assert!(numbers[old..].iter().all(|x| *x == 0.0));
            numbers.fill(len as f32);
        }
        numbers.resize(3);
        numbers.resize(7);
        assert_eq!(numbers[..], [1000.0, 1000.0, 1000.0, 0.0, 0.0, 0.0, 0.0]);
        numbers.resize(3);
        numbers.extend_from_slice(&[1.0, 2.0]);
        assert_eq!(numbers[..], [1000.0, 1000.0, 1000.0, 1.0, 2.0]);
        numbers.grow(2);
        assert_eq!(numbers.len(), 5);
        numbers.clear();
        assert!(numbers.is_empty() && numbers.footprint() >= 4000);
    }
}
