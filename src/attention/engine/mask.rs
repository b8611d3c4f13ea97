//! Mask tensors, read where they lie: a row at a time, broadcast by strides.

use crate::cpu::plain::widest;
use crate::view::from;
use crate::{Error, Result};
use candle_core::{CpuStorage, Layout};
use half::{bf16, f16};
use std::ops::Range;

enum Data<'a> {
    Bool(&'a [u8]),
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    F64(&'a [f64]),
}

/// A mask tensor seen as `[B, H, M, N]`: U8 (boolean, non-zero = attend) or float (additive).
pub(in crate::attention) struct MaskView<'a> {
    data: Data<'a>,
    strides: [usize; 4],
}

impl<'a> MaskView<'a> {
    /// `layout` is already broadcast to `[B, H, M, N]`.
    ///
    /// # Errors
    /// [`Error::DType`] unless the mask is U8 or a float.
    pub(in crate::attention) fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let start = layout.start_offset();
        let data = match storage {
            CpuStorage::U8(data) => Data::Bool(from(data, start)),
            CpuStorage::F32(data) => Data::F32(from(data, start)),
            CpuStorage::F16(data) => Data::F16(from(data, start)),
            CpuStorage::BF16(data) => Data::BF16(from(data, start)),
            CpuStorage::F64(data) => Data::F64(from(data, start)),
            other => {
                let dtype = candle_core::backend::BackendStorage::dtype(other);
                return Err(crate::attention::mask::unsupported(dtype));
            }
        };
        let strides = <[usize; 4]>::try_from(layout.stride()).map_err(|_| Error::Rank {
            op: "attention",
            tensor: "mask",
            shape: layout.dims().to_vec(),
            expected: "[B, H, M, N]",
        })?;
        Ok(Self { data, strides })
    }

    /// Whether heads see different keys.
    pub(in crate::attention) fn tells_heads_apart(&self) -> bool {
        self.strides[1] != 0
    }

    /// Whether all queries of a head see the same keys.
    pub(in crate::attention) fn is_one_for_all_queries(&self) -> bool {
        self.strides[2] == 0
    }

    /// Whether it hides keys from all queries of a sequence alike and does nothing else.
    pub(in crate::attention) fn only_hides_keys(&self) -> bool {
        let one_for_all = !self.tells_heads_apart() && self.is_one_for_all_queries();
        matches!(self.data, Data::Bool(_)) && one_for_all
    }

    /// Marks those of `keys` that a row lets see; returns whether there is one.
    pub(in crate::attention) fn mark(
        &self,
        at: [usize; 3],
        keys: Range<usize>,
        marks: &mut [u8],
    ) -> bool {
        if keys.is_empty() {
            return false;
        }
        let (start, step) = self.start(at, &keys);
        let job = (&self.data, start, step, marks);
        widest!(mark_body, job, (&Data<'_>, usize, usize, &mut [u8]) => bool)
    }

    /// Where a row starts, and the step from key to key.
    fn start(&self, at: [usize; 3], keys: &Range<usize>) -> (usize, usize) {
        let [batch, head, query, step] = self.strides;
        (at[0] * batch + at[1] * head + at[2] * query + keys.start * step, step)
    }

    /// Applies one row to scores: masked ones become minus infinity whatever they were, an additive mask times
    /// `factor` is added to the others.
    pub(super) fn apply(
        &self,
        at: [usize; 3],
        keys: Range<usize>,
        factor: f32,
        scores: &mut [f32],
    ) {
        if keys.is_empty() {
            return;
        }
        let start = self.start(at, &keys);
        let job = (&self.data, start, factor, scores);
        widest!(apply_body, job, (&Data<'_>, (usize, usize), f32, &mut [f32]) => ());
    }
}

#[inline(always)]
fn apply_body((data, (start, step), factor, scores): (&Data<'_>, (usize, usize), f32, &mut [f32])) {
    match *data {
        Data::Bool(data) => {
            let keep = |score: f32, keep: u8| if keep == 0 { f32::NEG_INFINITY } else { score };
            each(&data[start..], step, scores, keep);
        }
        Data::F32(data) => {
            each(&data[start..], step, scores, |s, x| add(s, x, factor, x <= f32::MIN));
        }
        Data::F16(data) => {
            each(&data[start..], step, scores, |s, x| add(s, x.to_f32(), factor, x <= f16::MIN));
        }
        Data::BF16(data) => {
            each(&data[start..], step, scores, |s, x| add(s, x.to_f32(), factor, x <= bf16::MIN));
        }
        Data::F64(data) => {
            each(&data[start..], step, scores, |s, x| add(s, x as f32, factor, x <= f64::MIN));
        }
    }
}

#[inline(always)]
fn mark_body((data, start, step, marks): (&Data<'_>, usize, usize, &mut [u8])) -> bool {
    let mut any = 0;
    let mut mark = |mark: u8, seen: bool| {
        any |= u8::from(seen);
        mark | u8::from(seen)
    };
    match *data {
        Data::Bool(data) => each(&data[start..], step, marks, |m, x| mark(m, x != 0)),
        Data::F32(data) => {
            each(&data[start..], step, marks, |m, x| mark(m, x > f32::MIN || x.is_nan()))
        }
        Data::F16(data) => {
            each(&data[start..], step, marks, |m, x| mark(m, x > f16::MIN || x.is_nan()))
        }
        Data::BF16(data) => {
            each(&data[start..], step, marks, |m, x| mark(m, x > bf16::MIN || x.is_nan()))
        }
        Data::F64(data) => {
            each(&data[start..], step, marks, |m, x| mark(m, x > f64::MIN || x.is_nan()))
        }
    }
    any != 0
}

#[inline(always)]
fn add(score: f32, mask: f32, factor: f32, masked: bool) -> f32 {
    // Beyond these, the product or the sum would be infinite, which is the mark of other things.
    const FAR: f32 = f32::MAX / 4.0;
    let far = if mask.is_finite() { FAR } else { f32::INFINITY };
    let mask = (mask * factor).clamp(-far, far);
    if masked { f32::NEG_INFINITY } else { score + mask }
}

/// `scores[i] = f(scores[i], mask[i * step])`.
#[inline(always)]
fn each<S: Copy, T: Copy>(mask: &[T], step: usize, scores: &mut [S], mut f: impl FnMut(S, T) -> S) {
    match step {
        0 => scores.iter_mut().for_each(|s| *s = f(*s, mask[0])),
        1 => scores.iter_mut().zip(mask).for_each(|(s, &x)| *s = f(*s, x)),
        _ => scores.iter_mut().zip(mask.iter().step_by(step)).for_each(|(s, &x)| *s = f(*s, x)),
    }
}
