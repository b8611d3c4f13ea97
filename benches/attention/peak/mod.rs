//! What this machine's instructions can do at most: multiply-accumulates and exponentials a second,
//! with all threads at work at the same time.
//!
//! A loop keeps all its operands in registers, and makes enough independent results that it waits
//! for none of them: it measures instructions, not memory and not latency. `x86` and `aarch64` hold
//! one loop for each instruction that attention can use; the fastest of the level in use counts.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
use aarch64::loops;
use candle_int8_attention::cpu::levels;
use serde::Serialize;
use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::thread::available_parallelism;
use std::time::Instant;
#[cfg(target_arch = "x86_64")]
use x86::loops;

/// No loop is written for this architecture: its peaks are unknown.
#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
fn loops() -> Vec<Loop> {
    Vec::new()
}

/// What a loop counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// 8-bit products with exact int32 sums.
    Int8,
    /// 16-bit products with exact int32 sums.
    Int16,
    /// bf16 products with f32 sums.
    Bf16,
    /// f32 fused multiply-adds.
    F32,
    /// `2^x` in f32 with a polynomial of degree 5: reduce, 5 fused multiply-adds, scale.
    Exp2,
}

/// One instruction, or a short sequence, over and over.
pub struct Loop {
    pub quantity: Quantity,
    /// The lowest level of the processor that has its instructions.
    pub level: &'static str,
    pub instructions: &'static str,
    /// Multiply-accumulates, or exponentials, in one step.
    pub per_step: usize,
    /// Makes this many steps. Its instructions exist, or it would not be in the list.
    pub run: fn(usize),
}

/// The fastest loop for a quantity.
#[derive(Debug, Clone, Serialize)]
pub struct Peak {
    pub instructions: &'static str,
    /// Multiply-accumulates, or exponentials, a second, by all threads together.
    pub per_second: f64,
}

/// All peaks; `None` where the level lacks the instruction or this bench a loop for it.
#[derive(Debug, Clone, Serialize)]
pub struct Peaks {
    pub int8: Option<Peak>,
    pub int16: Option<Peak>,
    pub bf16: Option<Peak>,
    pub f32: Option<Peak>,
    pub exp2: Option<Peak>,
}

impl Peaks {
    /// Measures those of a level in about a second, on all threads of the current pool.
    pub fn measure(level: &str) -> Self {
        // Best first: a level has what those after it have.
        let levels = levels();
        let place = |name: &str| levels.iter().position(|level| level.name == name);
        let mut loops = loops();
        loops.retain(|candidate| place(candidate.level) >= place(level));
        let fastest = |quantity| {
            let of_kind = loops.iter().filter(|candidate| candidate.quantity == quantity);
            of_kind.map(measure).max_by(|a, b| a.per_second.total_cmp(&b.per_second))
        };
        Self {
            int8: fastest(Quantity::Int8),
            int16: fastest(Quantity::Int16),
            bf16: fastest(Quantity::Bf16),
            f32: fastest(Quantity::F32),
            exp2: fastest(Quantity::Exp2),
        }
    }
}

/// The best of many short rounds: what the machine can do, not what it did while interrupted. It
/// errs upwards, if at all, and makes the fraction of the limit too small.
fn measure(candidate: &Loop) -> Peak {
    const ROUNDS: usize = 60;
    const SECONDS: f64 = 1e-3;
    let seconds = |steps: usize| {
        let start = Instant::now();
        (candidate.run)(steps);
        start.elapsed().as_secs_f64()
    };
    seconds(10_000); // wakes the vector units
    let steps = (10_000.0 * SECONDS / seconds(10_000)).ceil() as usize;
    let work = (steps * candidate.per_step) as f64;
    // All start together, so that they share what cores and threads share. More threads than cores
    // would have the cores one after the other, and each would report its full speed.
    let cores = available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = rayon::current_num_threads().min(cores);
    let barrier = Barrier::new(threads);
    let one = || {
        barrier.wait();
        work / seconds(steps)
    };
    let round = |_| -> f64 {
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
            all.into_iter().filter_map(|thread| thread.join().ok()).sum()
        })
    };
    let per_second = (0..ROUNDS).map(round).fold(0.0, f64::max);
    Peak { instructions: candidate.instructions, per_second }
}
