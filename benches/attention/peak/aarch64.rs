//! The loops for 64-bit Arm. The int8 and bf16 intrinsics are not stable, so those instructions are
//! written as assembly.

use super::{Loop, Quantity};
use std::arch::aarch64::*;
use std::arch::{asm, is_aarch64_feature_detected};
use std::f32::consts::LN_2;
use std::hint::black_box;

/// Independent sums in a step: more than any core needs (4 a cycle with a latency of 4), and few
/// enough for the 32 registers.
const CHAINS: usize = 24;
/// Exponentials (vectors of them) in a step; they do not depend on each other at all.
const EXPONENTIALS: usize = 8;

/// Levels of the crate.
const I8MM: &str = "aarch64-i8mm";
const DOTPROD: &str = "aarch64-dotprod";
const NEON: &str = "aarch64-neon";

/// Every loop whose instructions this machine has.
pub fn loops() -> Vec<Loop> {
    use Quantity::*;
    let dotprod = is_aarch64_feature_detected!("dotprod");
    let i8mm = is_aarch64_feature_detected!("i8mm");
    let bf16 = is_aarch64_feature_detected!("bf16");
    let mut loops = Vec::new();
    let mut add = |available, level, quantity, instructions, per_step, run| {
        if available {
            loops.push(Loop { quantity, level, instructions, per_step, run });
        }
    };
    // SAFETY: what each function needs was detected, or `add` drops it unused.
    unsafe {
        add(i8mm, I8MM, Int8, "smmla", 32 * CHAINS, |n| smmla(n));
        add(dotprod, DOTPROD, Int8, "sdot", 16 * CHAINS, |n| sdot(n));
        add(bf16, I8MM, Bf16, "bfmmla", 16 * CHAINS, |n| bfmmla(n));
        add(bf16, I8MM, Bf16, "bfdot", 8 * CHAINS, |n| bfdot(n));
    }
    add(true, NEON, Int8, "smlal (from int16)", 4 * CHAINS, smlal);
    add(true, NEON, F32, "fmla", 4 * CHAINS, fmla);
    let instructions = "fadd, 2 fsub, 5 fmla, shl, add";
    add(true, NEON, Exp2, instructions, 4 * EXPONENTIALS, exp2);
    loops
}

#[target_feature(enable = "neon,i8mm")]
fn smmla(steps: usize) {
    let (a, b) = (black_box(vdupq_n_s8(1)), black_box(vdupq_n_s8(2)));
    let mut sums = [vdupq_n_s32(0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `i8mm` has.
            unsafe {
                asm!(
                    "smmla {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                    sum = inout(vreg) *sum, a = in(vreg) a, b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

#[target_feature(enable = "neon,dotprod")]
fn sdot(steps: usize) {
    let (a, b) = (black_box(vdupq_n_s8(1)), black_box(vdupq_n_s8(2)));
    let mut sums = [vdupq_n_s32(0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `dotprod` has.
            unsafe {
                asm!(
                    "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
                    sum = inout(vreg) *sum, a = in(vreg) a, b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

#[target_feature(enable = "neon,bf16")]
fn bfmmla(steps: usize) {
    let (a, b) = (black_box(vdupq_n_u16(0x3f80)), black_box(vdupq_n_u16(0x3f80)));
    let mut sums = [vdupq_n_f32(0.0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `bf16` has.
            unsafe {
                asm!(
                    "bfmmla {sum:v}.4s, {a:v}.8h, {b:v}.8h",
                    sum = inout(vreg) *sum, a = in(vreg) a, b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

#[target_feature(enable = "neon,bf16")]
fn bfdot(steps: usize) {
    let (a, b) = (black_box(vdupq_n_u16(0x3f80)), black_box(vdupq_n_u16(0x3f80)));
    let mut sums = [vdupq_n_f32(0.0); CHAINS];
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one instruction on registers, which `bf16` has.
            unsafe {
                asm!(
                    "bfdot {sum:v}.4s, {a:v}.8h, {b:v}.8h",
                    sum = inout(vreg) *sum, a = in(vreg) a, b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

/// The exact product of any 64-bit Arm: four int16 products into int32 sums.
fn smlal(steps: usize) {
    let (a, b) = (black_box([1i16; 4]), black_box([2i16; 4]));
    // SAFETY: both arrays hold the four elements that are read.
    let (a, b) = unsafe { (vld1_s16(a.as_ptr()), vld1_s16(b.as_ptr())) };
    // SAFETY: NEON is part of the architecture.
    let mut sums = unsafe { [vdupq_n_s32(0); CHAINS] };
    for _ in 0..steps {
        for sum in &mut sums {
            // SAFETY: one NEON instruction on registers. Were it an intrinsic, the compiler would
            // multiply once, outside of the loop.
            unsafe {
                asm!(
                    "smlal {sum:v}.4s, {a:v}.4h, {b:v}.4h",
                    sum = inout(vreg) *sum, a = in(vreg) a, b = in(vreg) b,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
        }
    }
    black_box(sums);
}

fn fmla(steps: usize) {
    let (a, b) = (black_box(1e-3), black_box(0.5));
    // SAFETY: NEON is part of the architecture.
    unsafe {
        let (a, b) = (vdupq_n_f32(a), vdupq_n_f32(b));
        let mut sums = [vdupq_n_f32(0.0); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = vfmaq_f32(*sum, a, b);
            }
        }
        black_box(sums);
    }
}

/// `2^n * 2^(x - n)` with `n` the nearest integer: round by adding a large number, and add the
/// integer to the exponent.
fn exp2(steps: usize) {
    /// Highest power first; their values do not change the speed.
    const COEFFICIENTS: [f32; 6] = [1.327e-3, 9.672e-3, 5.551e-2, 0.240_22, LN_2, 1.0];
    /// 1.5 * 2^23: the sum's low mantissa bits are the rounded integer.
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: NEON is part of the architecture. The empty instructions make `x` a new number for
    // the compiler, and the result read.
    unsafe {
        let mut x = black_box(vdupq_n_f32(-1.5));
        let round = black_box(vdupq_n_f32(ROUND));
        let c = black_box(COEFFICIENTS).map(|c| vdupq_n_f32(c));
        for _ in 0..steps {
            for _ in 0..EXPONENTIALS {
                asm!("/* {0:v} */", inout(vreg) x, options(nomem, nostack, preserves_flags));
                let shifted = vaddq_f32(x, round);
                let f = vsubq_f32(x, vsubq_f32(shifted, round));
                let mut p = c[0];
                for &c in &c[1..] {
                    p = vfmaq_f32(c, p, f);
                }
                let exponent = vshlq_n_s32::<23>(vreinterpretq_s32_f32(shifted));
                let power = vaddq_s32(vreinterpretq_s32_f32(p), exponent);
                asm!("/* {0:v} */", in(vreg) power, options(nomem, nostack, preserves_flags));
            }
        }
    }
}
