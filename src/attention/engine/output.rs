//! The dtypes of the output.

use super::tile::Running;
use crate::cpu::plain::widest;
use half::{bf16, f16};
use std::mem::MaybeUninit;

/// Rows of values, added up, and what they are divided by.
pub(in crate::attention) struct Means<'a> {
    /// `[rows, width]`, of which the first `value_dim` columns count.
    pub sums: &'a [f32],
    pub width: usize,
    pub value_dim: usize,
    pub running: &'a [Running],
}

impl Means<'_> {
    /// Writes all of `[rows, value_dim]`.
    #[inline(always)]
    fn write<T: Copy>(self, out: &mut [MaybeUninit<T>], of: impl Fn(f32) -> T) {
        let rows = self.sums.chunks_exact(self.width).zip(self.running);
        for ((sums, running), out) in rows.zip(out.chunks_exact_mut(self.value_dim.max(1))) {
            // No key was seen: zeros. A NaN sum stays NaN.
            let inverse = if running.sum == 0.0 { 0.0 } else { 1.0 / running.sum };
            out.iter_mut().zip(sums).for_each(|(out, sum)| _ = out.write(of(sum * inverse)));
        }
    }
}

/// What an output is made of.
pub(in crate::attention) trait Element: Copy + Default + Send + Sync {
    /// Writes all of `[rows, value_dim]`.
    fn write(means: Means<'_>, out: &mut [MaybeUninit<Self>]);
}

impl Element for f32 {
    fn write(means: Means<'_>, out: &mut [MaybeUninit<f32>]) {
        type Arguments<'a> = (Means<'a>, &'a mut [MaybeUninit<f32>]);
        widest!(write_f32, (means, out), Arguments<'_> => ());
    }
}

#[inline(always)]
fn write_f32((means, out): (Means<'_>, &mut [MaybeUninit<f32>])) {
    means.write(out, |x| x);
}

impl Element for f16 {
    fn write(means: Means<'_>, out: &mut [MaybeUninit<f16>]) {
        means.write(out, f16::from_f32);
    }
}

impl Element for bf16 {
    fn write(means: Means<'_>, out: &mut [MaybeUninit<bf16>]) {
        means.write(out, bf16::from_f32);
    }
}
