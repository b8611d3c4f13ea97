//! The dtypes of the output.

use crate::cpu::plain::widest;
use half::{bf16, f16};
use std::mem::MaybeUninit;

/// What an output is made of.
pub(in crate::attention) trait Element: Copy + Default + Send + Sync {
    /// Writes `x * factor` for every element of `row`; `out` is as long.
    fn write_scaled(row: &[f32], factor: f32, out: &mut [MaybeUninit<Self>]);
}

impl Element for f32 {
    fn write_scaled(row: &[f32], factor: f32, out: &mut [MaybeUninit<f32>]) {
        type Arguments<'a> = (&'a [f32], f32, &'a mut [MaybeUninit<f32>]);
        widest!(scale_body, (row, factor, out), Arguments<'_> => ());
    }
}

#[inline(always)]
fn scale_body((row, factor, out): (&[f32], f32, &mut [MaybeUninit<f32>])) {
    for (out, x) in out.iter_mut().zip(row) {
        out.write(x * factor);
    }
}

impl Element for f16 {
    fn write_scaled(row: &[f32], factor: f32, out: &mut [MaybeUninit<f16>]) {
        out.iter_mut().zip(row).for_each(|(out, x)| _ = out.write(f16::from_f32(x * factor)));
    }
}

impl Element for bf16 {
    fn write_scaled(row: &[f32], factor: f32, out: &mut [MaybeUninit<bf16>]) {
        out.iter_mut().zip(row).for_each(|(out, x)| _ = out.write(bf16::from_f32(x * factor)));
    }
}
