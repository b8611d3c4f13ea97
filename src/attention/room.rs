//! Numbers at the end of f32's range: the same attention with room for scores that f32 does not hold on the way.
//!
//! Scores are multiplied by log2(e), keys by the scale, blocks of both are rotated, each before what brings it
//! down again: what is finite as `(q·k^T * scale)` may not be finite then. Attention with a large scale has
//! [units](super::engine::Modifiers) that leave room, so queries and keys hand their powers of two to the scale:
//!
//! ```text
//! scale * q·k  =  (scale * 2^(a + b)) * (q / 2^a)·(k / 2^b)
//! ```
//!
//! Only rows in [doubt](super::engine::Doubt) come here.

use super::config::{AttentionConfig, Backend};
use super::engine::exponent;
use crate::quant::rows::row_range;
use crate::quant::{QuantParams, RangeSource, ValueRange};
use crate::view::{View, cpu};
use crate::{Result, parallel};
use candle_core::{DType, Tensor};

/// The power of two of the scale that leaves room on both sides: scores beyond 2^64 have a unit, and queries
/// and keys that go with ordinary scores are ordinary.
const SCALE: i32 = 96;

/// What rotating, the mean of a block and the factor on scores add to a number's power of two.
const ADDED: i32 = 8;

/// Powers of two of finite numbers are at most this.
const LARGEST: i32 = 127;

/// Queries, keys and a configuration for them with room for every score that is finite, where the numbers may have
/// left f32's range without it.
///
/// # Errors
/// Candle's own.
pub(super) fn with_room(
    q: &Tensor,
    k: &Tensor,
    config: &AttentionConfig,
) -> Result<Option<(Tensor, Tensor, AttentionConfig)>> {
    let (Some(of_q), Some(of_k)) = (largest(q)?, largest(k)?) else { return Ok(None) };
    let depth = q.dim(3)?;
    let scale = config.spec.scale(depth)?;
    let of_scale = exponent(scale);
    let sum = of_q + of_k + exponent(depth.max(1) as f32) + 1;
    let most = sum.max(of_q).max(of_k) + of_scale.max(0) + ADDED;
    if !scale.is_normal() || most < LARGEST {
        return Ok(None);
    }
    let powers = [of_scale + of_k - SCALE, -of_k];
    let mut config = config.clone().softmax_scale(with_exponent(scale, SCALE));
    if let Backend::Int8(int8) = &mut config.backend {
        for (side, power) in [&mut int8.scores.q, &mut int8.scores.k].into_iter().zip(powers) {
            if let RangeSource::Static(params) = &mut side.range {
                let times_power = |params: &QuantParams| params.times_power(power);
                let Some(moved) = params.iter().map(times_power).collect() else { return Ok(None) };
                *params = moved;
            }
        }
    }
    Ok(Some((times_power(q, powers[0])?, times_power(k, powers[1])?, config)))
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
    let (storage, layout) = x.storage_and_layout();
    let x = View::new("attention", "q or k", cpu(&storage)?, layout)?;
    let of_head = |head| {
        let (mut rows, mut gathered) = (Vec::new(), Vec::new());
        row_range(x.rows(head, 0..x.tokens(), &mut rows).as_slice(&mut gathered))
    };
    let heads = parallel::map(0..x.heads(), of_head);
    let all = heads.iter().fold(ValueRange::EMPTY, |all, head| all.union(head.range));
    Ok(heads.iter().all(|head| head.finite).then(|| exponent(all.max_abs())))
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
