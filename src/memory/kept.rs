//! Memory that a thread keeps from one piece of work to the next, as long as it is not too much.

use std::cell::Cell;
use std::thread::LocalKey;

/// How much memory something holds.
pub(crate) trait Footprint {
    /// Bytes on the heap, whether they are in use or not.
    fn footprint(&self) -> usize;
}

impl<T: Copy> Footprint for Vec<T> {
    fn footprint(&self) -> usize {
        self.capacity() * size_of::<T>()
    }
}

impl<T: Footprint> Footprint for Option<T> {
    fn footprint(&self) -> usize {
        self.as_ref().map_or(0, T::footprint)
    }
}

impl<T: Footprint, const N: usize> Footprint for [T; N] {
    fn footprint(&self) -> usize {
        self.iter().map(T::footprint).sum()
    }
}

impl<A: Footprint, B: Footprint> Footprint for (A, B) {
    fn footprint(&self) -> usize {
        self.0.footprint() + self.1.footprint()
    }
}

/// `footprint!(Type: field, field, ..)`: what these of its fields hold.
macro_rules! footprint {
    ($type:ty: $first:ident $(, $field:ident)* $(,)?) => {
        impl $crate::memory::Footprint for $type {
            fn footprint(&self) -> usize {
                use $crate::memory::Footprint;
                Footprint::footprint(&self.$first) $(+ Footprint::footprint(&self.$field))*
            }
        }
    };
}
pub(crate) use footprint;

/// What a thread works in: empty at first, then what the work before has left.
///
/// It is taken out while it is in use, so that work inside of work, as rayon may bring it, begins with
/// empty memory of its own; in a box, because it may be hundreds of bytes large before it holds anything.
pub(crate) struct Kept<T>(Cell<Option<Box<T>>>);

impl<T: Default + Footprint> Kept<T> {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self(Cell::new(None))
    }

    /// Calls `f` with what this thread has kept, and keeps it again if it is at most `most` bytes.
    pub(crate) fn with<R>(
        key: &'static LocalKey<Self>,
        most: usize,
        f: impl FnOnce(&mut T) -> R,
    ) -> R {
        let mut memory: Box<T> = key.with(|kept| kept.0.take()).unwrap_or_default();
        let result = f(&mut memory);
        if memory.footprint() <= most {
            key.with(|kept| kept.0.set(Some(memory)));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        static MEMORY: Kept<(Vec<u8>, Vec<u32>)> = const { Kept::new() };
    }

    fn capacity_after(work: impl FnOnce(&mut (Vec<u8>, Vec<u32>))) -> usize {
        Kept::with(&MEMORY, 1000, work);
        Kept::with(&MEMORY, 1000, |memory| memory.footprint())
    }

    #[test]
    fn little_is_kept_and_much_is_not() {
        assert_eq!(capacity_after(|_| {}), 0);
        assert_eq!(capacity_after(|(bytes, _)| bytes.reserve_exact(600)), 600);
        assert_eq!(capacity_after(|(_, numbers)| numbers.reserve_exact(100)), 1000);
        assert_eq!(capacity_after(|(bytes, _)| bytes.reserve_exact(601)), 0);
    }

    #[test]
    fn work_inside_of_work_has_memory_of_its_own() {
        Kept::with(&MEMORY, 1000, |outer| {
            outer.0.push(1);
            Kept::with(&MEMORY, 1000, |inner| assert!(inner.0.is_empty()));
        });
    }
}
