//! What the memory alone allows: a result of the size of all scores that is allocated, written once by all threads and
//! freed, with nothing computed.

use crate::contenders::{Contender, Inputs};
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// Elements that a thread writes at a time.
const PIECE: usize = 1 << 14;

/// `[B, H, N, N]` of ones.
pub fn writing(inputs: &Inputs) -> Result<Contender> {
    let ((b, h, m, _), n) = (inputs.q.dims4()?, inputs.k.dim(2)?);
    Ok(Contender::new("memory", "writing alone", move || {
        let len = b * h * m * n;
        let mut out: Vec<f32> = Vec::with_capacity(len);
        ask_for_huge_pages(&mut out);
        let pieces = out.spare_capacity_mut()[..len].par_chunks_mut(PIECE);
        pieces.for_each(|piece| piece.iter_mut().for_each(|x| _ = x.write(1.0)));
        // SAFETY: the pieces cover all elements.
        unsafe { out.set_len(len) };
        Tensor::from_vec(out, (b, h, m, n), &Device::Cpu)
    }))
}

/// As the crate does for results that an allocator takes fresh from the system.
fn ask_for_huge_pages(out: &mut Vec<f32>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let (start, bytes) = (out.as_mut_ptr() as usize, size_of::<f32>() * out.capacity());
        let (first, end) = (start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
        if bytes >= 32 << 20 {
            // SAFETY: whole pages of the vector's own; the advice changes how they are backed, not what they hold.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = out;
}
