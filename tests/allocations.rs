//! What a call allocates: views are read where they lie, not copied. One test, because the count is
//! that of the whole process.

mod common;

use candle_core::{Device, Result, Tensor};
use candle_int8_attention::{AttnMask, flash_attn, flash_attn_varlen_cpu};
use common::randn;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

const B: usize = 2;
const S: usize = 400;
const H: usize = 8;
const D: usize = 64;
/// Bytes of a tensor.
const WHOLE: usize = B * S * H * D * size_of::<f32>();

/// The system's allocator, with a count of the pieces that could hold a whole tensor.
struct Counting;

static LARGE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= WHOLE {
            LARGE.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: by contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many pieces as large as a tensor `f` asks for.
fn large_pieces(f: impl Fn() -> Result<Tensor>) -> Result<usize> {
    let before = LARGE.load(Ordering::Relaxed);
    f()?;
    Ok(LARGE.load(Ordering::Relaxed) - before)
}

#[test]
fn transposed_views_are_not_copied() -> Result<()> {
    let heads_first = randn((B, H, S, D));
    let view = heads_first.transpose(1, 2)?;
    let contiguous = view.contiguous()?;
    assert_eq!(large_pieces(|| view.contiguous())?, 1, "a copy is counted");
    for q in [&view, &contiguous] {
        let call = || flash_attn::<f32>(q, q, q, 0.1, AttnMask::causal(), None, None);
        assert_eq!(large_pieces(call)?, 1, "the result, and nothing else");
    }
    // The same packed, and its heads in another order in memory.
    let packed = contiguous.reshape((B * S, H, D))?;
    let strided = packed.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
    let lens = Tensor::new(&[S as u32 - 7, S as u32 + 7], &Device::Cpu)?;
    for q in [&packed, &strided] {
        let call =
            || flash_attn_varlen_cpu(q, q, q, None, &lens, &lens, S, S, 0.1, true, None, None);
        // The outputs of both sequences are smaller; they are joined and brought to Candle's order.
        assert_eq!(large_pieces(call)?, 2, "the result, and nothing else");
    }
    Ok(())
}
