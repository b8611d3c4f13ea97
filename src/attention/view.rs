//! A four-dimensional float tensor in CPU storage, whatever its strides: read row by row, never
//! copied whole.

use crate::quant::rows::Rows;
use crate::{Error, Result};
use candle_core::{CpuStorage, Layout, Storage};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::{Deref, Range};

enum Data<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// What follows `start`; nothing where a view of no elements starts beyond its storage.
pub(super) fn from<T>(data: &[T], start: usize) -> &[T] {
    data.get(start..).unwrap_or_default()
}

/// The storage of a tensor on the CPU.
pub(super) fn cpu(storage: &impl Deref<Target = Storage>) -> Result<&CpuStorage> {
    match &**storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(Error::Mismatch("a tensor on another device, expected the CPU".into())),
    }
}

/// `[B, H, S, D]` with any strides.
pub(super) struct View<'a> {
    data: Data<'a>,
    dims: [usize; 4],
    strides: [usize; 4],
}

impl<'a> View<'a> {
    /// # Errors
    /// [`Error::Rank`] unless the layout has rank 4, [`Error::DType`] unless f32, f16 or bf16.
    pub(super) fn new(
        op: &'static str,
        tensor: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> Result<Self> {
        let (Ok(dims), Ok(strides)) =
            (<[usize; 4]>::try_from(layout.dims()), <[usize; 4]>::try_from(layout.stride()))
        else {
            let shape = layout.dims().to_vec();
            return Err(Error::Rank { op, tensor, shape, expected: "[B, H, S, D]" });
        };
        let start = layout.start_offset();
        let data = match storage {
            CpuStorage::F32(data) => Data::F32(from(data, start)),
            CpuStorage::F16(data) => Data::F16(from(data, start)),
            CpuStorage::BF16(data) => Data::BF16(from(data, start)),
            other => {
                let dtype = candle_core::backend::BackendStorage::dtype(other);
                return Err(Error::DType { op, tensor, dtype, expected: "F32, F16 or BF16" });
            }
        };
        Ok(Self { data, dims, strides })
    }

    /// `[B, H, S, D]`.
    pub(super) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// `B * H`.
    pub(super) fn heads(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// How many elements.
    pub(super) fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// `S`.
    pub(super) fn tokens(&self) -> usize {
        self.dims[2]
    }

    /// `D`.
    pub(super) fn depth(&self) -> usize {
        self.dims[3]
    }

    /// Rows `tokens` of head `head` (counted over the batch) as f32: where they lie, if they are
    /// f32 and their elements lie together, else gathered into `buffer`.
    pub(super) fn rows<'b>(
        &'b self,
        head: usize,
        tokens: Range<usize>,
        buffer: &'b mut Vec<f32>,
    ) -> Rows<'b> {
        let [batch_stride, head_stride, token_stride, depth_stride] = self.strides;
        let (batch, head) = (head / self.dims[1], head % self.dims[1]);
        let (count, depth) = (tokens.len(), self.depth());
        if count == 0 || depth == 0 {
            return Rows::new(&[], count, depth, 0);
        }
        let start = batch * batch_stride + head * head_stride + tokens.start * token_stride;
        if let (Data::F32(data), true) = (&self.data, depth_stride == 1 || depth == 1) {
            return Rows::new(&data[start..], count, depth, token_stride);
        }
        buffer.resize(count * depth, 0.0);
        match self.data {
            Data::F32(data) => {
                let copy = |from: &[f32], to: &mut [f32]| to.copy_from_slice(from);
                self.gather(&data[start..], buffer, |x| x, copy);
            }
            Data::F16(data) => {
                let convert = |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to);
                self.gather(&data[start..], buffer, f16::to_f32, convert);
            }
            Data::BF16(data) => {
                let convert = |from: &[bf16], to: &mut [f32]| from.convert_to_f32_slice(to);
                self.gather(&data[start..], buffer, bf16::to_f32, convert);
            }
        }
        Rows::contiguous(buffer, depth)
    }

    fn gather<T: Copy>(
        &self,
        data: &[T],
        out: &mut [f32],
        one: impl Fn(T) -> f32,
        many: impl Fn(&[T], &mut [f32]),
    ) {
        let (depth, [_, _, token_stride, depth_stride]) = (self.depth(), self.strides);
        if depth_stride == 1 || depth == 1 {
            for (token, row) in out.chunks_exact_mut(depth).enumerate() {
                many(&data[token * token_stride..][..depth], row);
            }
            return;
        }
        // A transposed tensor is contiguous over tokens: keep those in the inner loop.
        for d in 0..depth {
            for (token, row) in out.chunks_exact_mut(depth).enumerate() {
                row[d] = one(data[token * token_stride + d * depth_stride]);
            }
        }
    }
}
