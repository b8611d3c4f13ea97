//! Numbers at the end of f32's range: whether a result may have met scores that f32 does not hold on the way,
//! and the same attention with room for them.
//!
//! Scores are multiplied by log2(e), keys by the scale, blocks of both are rotated, each before what brings it
//! down again: what is finite as `(q·k^T * scale)` may not be finite then. Attention with a large scale has
//! [units](super::engine::Modifiers) that leave room, so queries and keys hand their powers of two to the scale:
//!
//! ```text
//! scale * q·k  =  (scale * 2^(a + b)) * (q / 2^a)·(k / 2^b)
//! ```
//!
//! Ordinary numbers never come here: that costs a look at the largest score of each row.

use super::engine::{Running, Tile};
use crate::Result;
use candle_core::{DType, Tensor};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether rows met scores that are not finite.
#[derive(Default)]
pub(super) struct Doubt {
    /// Infinity.
    beyond: AtomicBool,
    /// NaN, or minus infinity for all keys, as of a row whose keys are masked.
    elsewhere: AtomicBool,
}

impl Doubt {
    /// Looks at the rows of a tile after their softmax.
    pub(super) fn watch(&self, tile: &Tile<'_>, running: &[Running]) {
        for (running, visible) in running.iter().zip(tile.visible) {
            if running.max == f32::INFINITY {
                self.beyond.store(true, Ordering::Relaxed);
            }
            if running.sum.is_nan() || running.max == f32::NEG_INFINITY && !visible.is_empty() {
                self.elsewhere.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Whether there was a score of infinity.
    pub(super) fn is_beyond(&self) -> bool {
        self.beyond.load(Ordering::Relaxed)
    }

    /// Whether a row is NaN, or has seen no key.
    pub(super) fn is_there(&self) -> bool {
        self.is_beyond() || self.elsewhere.load(Ordering::Relaxed)
    }
}

/// The power of two of the scale that leaves room on both sides: scores beyond 2^64 have a unit, and queries
/// and keys that go with ordinary scores are ordinary.
const SCALE: i32 = 96;

/// What rotating, the mean of a block and the factor on scores add to a number's power of two.
const ADDED: i32 = 8;

/// Powers of two of finite numbers are at most this.
const LARGEST: i32 = 127;

/// Queries, keys and their scale with room for every score that is finite, where the numbers may have left
/// f32's range without it.
///
/// # Errors
/// Candle's own.
pub(super) fn with_room(
    q: &Tensor,
    k: &Tensor,
    scale: f32,
) -> Result<Option<(Tensor, Tensor, f32)>> {
    let (Some(of_q), Some(of_k)) = (largest(q)?, largest(k)?) else { return Ok(None) };
    let (of_scale, depth) = (exponent(scale), q.dim(3)?.max(1) as f32);
    let sum = of_q + of_k + exponent(depth) + 1;
    let most = sum.max(of_q).max(of_k) + of_scale.max(0) + ADDED;
    match scale.is_normal() && most >= LARGEST {
        true => {
            let q = times_power(q, of_scale + of_k - SCALE)?;
            Ok(Some((q, times_power(k, -of_k)?, with_exponent(scale, SCALE))))
        }
        false => Ok(None),
    }
}

/// The same for queries whose keys cannot change.
///
/// # Errors
/// Candle's own.
pub(super) fn queries_with_room(q: &Tensor, scale: f32) -> Result<Option<(Tensor, f32)>> {
    match largest(q)?.is_some() && scale.is_normal() && exponent(scale) < SCALE {
        true => {
            let q = times_power(q, exponent(scale) - SCALE)?;
            Ok(Some((q, with_exponent(scale, SCALE))))
        }
        false => Ok(None),
    }
}

/// The power of two of the largest magnitude, unless that is not finite.
fn largest(x: &Tensor) -> Result<Option<i32>> {
    let numbers = x.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    // NaN and infinity have larger bits than all numbers.
    let bits = numbers.iter().fold(0, |max, x| x.abs().to_bits().max(max));
    let largest = f32::from_bits(bits);
    Ok(largest.is_finite().then(|| exponent(largest)))
}

fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 0xff) as i32 - 127
}

/// A normal number with another power of two.
fn with_exponent(x: f32, exponent: i32) -> f32 {
    f32::from_bits(x.to_bits() & !(0xff << 23) | ((exponent + 127).cast_unsigned() << 23))
}

/// `x * 2^power` in f32, in two steps that f32 holds.
fn times_power(x: &Tensor, power: i32) -> Result<Tensor> {
    let half = power / 2;
    let x = x.to_dtype(DType::F32)?;
    Ok(((x * 2f64.powi(half))? * 2f64.powi(power - half))?)
}
