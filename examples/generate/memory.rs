//! A bound on the memory of what a file makes this program do: a chat template, which is a program itself, can
//! double a text with every step, and no count of its steps bounds that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread may still ask for, where there is a bound.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The system's allocator. It ends the program where a bound is passed: who asks for memory cannot be told
/// that there is no more of it.
struct Bounded;

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

impl Bounded {
    /// Takes `more` bytes, after `less` were given back, from what is left.
    fn take(more: usize, less: usize) {
        let Some(left) = LEFT.get() else { return };
        match left.saturating_add(less).checked_sub(more) {
            Some(left) => LEFT.set(Some(left)),
            None => {
                LEFT.set(None);
                eprintln!(
                    "error: the model's chat template cannot be used: it takes too much memory"
                );
                std::process::exit(1);
            }
        }
    }
}

// SAFETY: everything is passed on to the system's allocator; `take` does not unwind.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size(), 0);
        // SAFETY: by contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::take(layout.size(), 0);
        // SAFETY: by contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::take(size, layout.size());
        // SAFETY: by contract.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::take(0, layout.size());
        // SAFETY: by contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What `f` returns, which this thread computes in at most `bytes` of memory at a time.
pub fn within<T>(bytes: usize, f: impl FnOnce() -> T) -> T {
    LEFT.set(Some(bytes));
    let result = f();
    LEFT.set(None);
    result
}
