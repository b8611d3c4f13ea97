//! Mask tensors, read where they lie: a row at a time, broadcast by strides.

use crate::cpu::plain::widest;
use crate::view::from;
use crate::{Error, Result};
use candle_core::{CpuStorage, Layout, Storage};
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
    /// The same, from a tensor's storage.
    ///
    /// # Errors
    /// Those of [`MaskView::new`], and [`Error::Mismatch`] unless the mask is on the CPU.
    pub(in crate::attention) fn of(storage: &'a Storage, layout: &Layout) -> Result<Self> {
        match storage {
            Storage::Cpu(storage) => Self::new(storage, layout),
            _ => {
                let found = storage.device().location();
                Err(Error::Mismatch(format!("mask on {found:?}, expected the CPU, like q")))
            }
        }
    }

    /// `layout` is already broadcast to `[B, H, M, N]`.
    ///
    /// # Errors
    /// [`Error::DType`] unless the mask is U8 or a float.
    fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
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

    /// The number of keys that are seen in each sequence, if a boolean mask hides just the last ones, the
    /// same for all heads and queries: what a batch of padded sequences has. `dims` is batch and keys.
    pub(in crate::attention) fn lens(&self, (batch, keys): (usize, usize)) -> Option<Vec<usize>> {
        let (Data::Bool(data), [stride, 0, 0, step]) = (&self.data, self.strides) else {
            return None;
        };
        let seen = |batch: usize, key: usize| data[batch * stride + key * step] != 0;
        (0..batch)
            .map(|batch| {
                let len = (0..keys).take_while(|&key| seen(batch, key)).count();
                (len..keys).all(|key| !seen(batch, key)).then_some(len)
            })
            .collect()
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
        let [batch, head, query, step] = self.strides;
        let start = at[0] * batch + at[1] * head + at[2] * query + keys.start * step;
        let job = (&self.data, (start, step), factor, scores);
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
fn add(score: f32, mask: f32, factor: f32, masked: bool) -> f32 {
    // Beyond these, the product or the sum would be infinite, which is the mark of other things.
    const FAR: f32 = f32::MAX / 4.0;
    let far = if mask.is_finite() { FAR } else { f32::INFINITY };
    let mask = (mask * factor).clamp(-far, far);
    if masked { f32::NEG_INFINITY } else { score + mask }
}

/// `scores[i] = f(scores[i], mask[i * step])`.
#[inline(always)]
fn each<T: Copy>(mask: &[T], step: usize, scores: &mut [f32], f: impl Fn(f32, T) -> f32) {
    match step {
        0 => scores.iter_mut().for_each(|s| *s = f(*s, mask[0])),
        1 => scores.iter_mut().zip(mask).for_each(|(s, &x)| *s = f(*s, x)),
        _ => scores.iter_mut().zip(mask.iter().step_by(step)).for_each(|(s, &x)| *s = f(*s, x)),
    }
}
