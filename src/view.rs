//! A float tensor in CPU storage, whatever its strides and dtype: read some rows at a time as f32, never
//! copied whole.

use crate::cpu::contracts::Rows;
use crate::memory::check_size;
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

impl<'a> Data<'a> {
    /// # Errors
    /// [`Error::DType`] unless f32, f16 or bf16.
    fn new(
        op: &'static str,
        tensor: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> Result<Self> {
        let start = layout.start_offset();
        match storage {
            CpuStorage::F32(data) => Ok(Data::F32(from(data, start))),
            CpuStorage::F16(data) => Ok(Data::F16(from(data, start))),
            CpuStorage::BF16(data) => Ok(Data::BF16(from(data, start))),
            other => {
                let dtype = candle_core::backend::BackendStorage::dtype(other);
                Err(Error::DType { op, tensor, dtype, expected: "F32, F16 or BF16" })
            }
        }
    }
}

/// What follows `start`; nothing where a view of no elements starts beyond its storage.
pub(crate) fn from<T>(data: &[T], start: usize) -> &[T] {
    data.get(start..).unwrap_or_default()
}

/// The storage of a tensor on the CPU.
pub(crate) fn cpu(storage: &impl Deref<Target = Storage>) -> Result<&CpuStorage> {
    match &**storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(Error::Mismatch("a tensor on another device, expected the CPU".into())),
    }
}

/// `[B, H, S, D]` with any strides.
pub(crate) struct View<'a> {
    data: Data<'a>,
    dims: [usize; 4],
    strides: [usize; 4],
}

impl<'a> View<'a> {
    /// # Errors
    /// [`Error::Rank`] unless the layout has rank 4, [`Error::DType`] unless f32, f16 or bf16,
    /// [`Error::Shape`] for more elements than memory has addresses, which a stride of 0 makes possible.
    pub(crate) fn new(
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
        Self::of((op, tensor), storage, layout, (dims, strides))
    }

    fn of(
        (op, tensor): (&'static str, &'static str),
        storage: &'a CpuStorage,
        layout: &Layout,
        (dims, strides): ([usize; 4], [usize; 4]),
    ) -> Result<Self> {
        check_size(op, tensor, &dims)?;
        Ok(Self { data: Data::new(op, tensor, storage, layout)?, dims, strides })
    }

    /// A tensor of rank 1 to 4 as rows for [`View::merged`]: the last dimension is a row, of rank 4 the last
    /// two, so that `[B, N, H, D]`, heads merged, is `[B * N, H * D]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another rank, and more elements than memory has addresses, [`Error::DType`]
    /// unless f32, f16 or bf16.
    pub(crate) fn of_rows(
        op: &'static str,
        tensor: &'static str,
        storage: &'a CpuStorage,
        layout: &Layout,
    ) -> Result<Self> {
        let four = |from: &[usize], fill: usize| match *from {
            [d] => Some([fill, fill, fill, d]),
            [n, d] => Some([fill, n, fill, d]),
            [b, n, d] => Some([b, n, fill, d]),
            [b, n, h, d] => Some([b, n, h, d]),
            _ => None,
        };
        let Some((dims, strides)) = four(layout.dims(), 1).zip(four(layout.stride(), 0)) else {
            return Err(Error::shape(op, tensor, layout.dims(), "a tensor of rank 1 to 4"));
        };
        Self::of((op, tensor), storage, layout, (dims, strides))
    }

    /// Rows of f32 that follow each other, for [`View::merged`].
    pub(crate) fn of_slice(rows: &'a [f32], count: usize, depth: usize) -> Self {
        assert_eq!(rows.len(), count * depth);
        let dims = [1, count, 1, depth];
        Self { data: Data::F32(rows), dims, strides: [count * depth, depth, depth, 1] }
    }

    /// `[B, H, S, D]`.
    pub(crate) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// `B * H`.
    pub(crate) fn heads(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// How many elements.
    pub(crate) fn len(&self) -> usize {
        self.dims.iter().product()
    }

    /// `S`.
    pub(crate) fn tokens(&self) -> usize {
        self.dims[2]
    }

    /// `D`.
    pub(crate) fn depth(&self) -> usize {
        self.dims[3]
    }

    /// Rows `tokens` of head `head` (counted over the batch) as f32: where they lie, if they are
    /// f32 and their elements lie together, else gathered into `buffer`.
    pub(crate) fn rows<'b>(
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

    /// Rows of the first two dimensions merged and the last two, one after the other: where they lie, or
    /// gathered into `buffer`.
    pub(crate) fn merged<'b>(&'b self, rows: Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        let ([b, n, heads, depth], [s_b, s_n, s_h, s_d]) = (self.dims, self.strides);
        let width = heads * depth;
        let together = (s_d == 1 || depth == 1)
            && (s_h == depth || heads == 1)
            && (s_n == width || n == 1)
            && (s_b == n * width || b == 1);
        if let (Data::F32(data), true) = (&self.data, together) {
            return &data[rows.start * width..rows.end * width];
        }
        buffer.resize(rows.len() * width, 0.0);
        match self.data {
            // The head dims of most models.
            Data::F32(data) if depth == 32 => self.merge(data, rows, buffer, |x| x, copy::<32>),
            Data::F32(data) if depth == 64 => self.merge(data, rows, buffer, |x| x, copy::<64>),
            Data::F32(data) => {
                let copy = |from: &[f32], to: &mut [f32]| to.copy_from_slice(from);
                self.merge(data, rows, buffer, |x| x, copy);
            }
            Data::F16(data) => {
                let convert = |from: &[f16], to: &mut [f32]| from.convert_to_f32_slice(to);
                self.merge(data, rows, buffer, f16::to_f32, convert);
            }
            Data::BF16(data) => {
                let convert = |from: &[bf16], to: &mut [f32]| from.convert_to_f32_slice(to);
                self.merge(data, rows, buffer, bf16::to_f32, convert);
            }
        }
        buffer
    }

    /// [`View::merged`], head by head of each row.
    fn merge<T: Copy>(
        &self,
        data: &[T],
        rows: Range<usize>,
        out: &mut [f32],
        one: impl Fn(T) -> f32,
        many: impl Fn(&[T], &mut [f32]),
    ) {
        let ([_, n, heads, depth], [s_b, s_n, s_h, s_d]) = (self.dims, self.strides);
        if out.is_empty() {
            return;
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(heads * depth)) {
            let start = row / n * s_b + row % n * s_n;
            for (head, out) in out.chunks_exact_mut(depth).enumerate() {
                let data = &data[start + head * s_h..];
                if s_d == 1 || depth == 1 {
                    many(&data[..depth], out);
                } else {
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = one(data[i * s_d]);
                    }
                }
            }
        }
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

/// As many elements as are known while compiling, which takes a few moves and no call.
fn copy<const N: usize>(from: &[f32], to: &mut [f32]) {
    let (Some(from), Some(to)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) else {
        unreachable!("{} elements to {}, expected {N}", from.len(), to.len());
    };
    *to = *from;
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Storage, Tensor};

    /// All rows of the first two dimensions, in blocks of 3.
    fn merged(x: &Tensor) -> Vec<f32> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        let view = View::of_rows("test", "x", storage, layout).unwrap();
        let mut buffer = vec![7.0; 2];
        let count = view.dims()[0] * view.dims()[1];
        let starts = (0..count).step_by(3);
        starts
            .flat_map(|start| view.merged(start..(start + 3).min(count), &mut buffer).to_vec())
            .collect()
    }

    /// All heads, in blocks of 2.
    fn heads(x: &Tensor) -> Vec<f32> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        let view = View::new("test", "x", storage, layout).unwrap();
        let mut all = Vec::new();
        for head in 0..view.heads() {
            for start in (0..view.tokens()).step_by(2) {
                let mut buffer = Vec::new();
                let tokens = start..(start + 2).min(view.tokens());
                let rows = view.rows(head, tokens, &mut buffer);
                rows.iter().for_each(|row| all.extend_from_slice(row));
            }
        }
        all
    }

    #[test]
    fn any_strides_read_as_the_contiguous_copy() {
        let x = Tensor::arange(0f32, 240., &Device::Cpu).unwrap().reshape((2, 3, 5, 8)).unwrap();
        // As attention leaves them, in numbers that bf16 holds.
        let heads_of = |depth: usize| {
            let x = (0..2 * 3 * 5 * depth).map(|i| (i % 251) as f32);
            let x = Tensor::from_iter(x, &Device::Cpu).unwrap().reshape((2, 3, 5, depth));
            x.unwrap().transpose(1, 2).unwrap()
        };
        for view in [
            x.clone(),
            x.transpose(1, 2).unwrap(),
            x.transpose(2, 3).unwrap(),
            x.permute((3, 2, 1, 0)).unwrap(),
            x.narrow(3, 1, 4).unwrap(),
            x.narrow(0, 1, 1).unwrap(),
            x.flatten_from(2).unwrap().transpose(0, 1).unwrap(),
            x.flatten_from(1).unwrap().t().unwrap(),
            x.flatten_all().unwrap(),
            x.narrow(0, 0, 1).unwrap().expand((4, 3, 5, 8)).unwrap(),
            x.narrow(2, 0, 1).unwrap().expand((2, 3, 4, 8)).unwrap(),
            x.narrow(3, 0, 1).unwrap().expand((2, 3, 5, 4)).unwrap(),
            x.flatten_from(1).unwrap().narrow(1, 0, 1).unwrap().expand((2, 7)).unwrap(),
            heads_of(32),
            heads_of(64),
            heads_of(65),
            heads_of(64).narrow(3, 3, 32).unwrap(),
            heads_of(32).transpose(2, 3).unwrap(),
        ] {
            let copy: Vec<f32> =
                view.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let view =
                    if dtype == DType::F32 { view.clone() } else { view.to_dtype(dtype).unwrap() };
                assert_eq!(merged(&view), copy, "{dtype:?} {:?} {:?}", view.dims(), view.stride());
                if view.rank() == 4 {
                    assert_eq!(
                        heads(&view),
                        copy,
                        "{dtype:?} {:?} {:?}",
                        view.dims(),
                        view.stride()
                    );
                }
            }
        }
    }

    #[test]
    fn what_it_cannot_read_is_an_error() {
        let error = |x: Tensor| {
            let (storage, layout) = x.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
            View::of_rows("test", "x", storage, layout).err().unwrap().to_string()
        };
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        assert!(error(zeros(&[2], DType::U8)).contains("F32, F16 or BF16"));
        let text = error(zeros(&[1, 1, 1, 1, 2], DType::F32));
        assert!(text.contains("[1, 1, 1, 1, 2]"), "{text}");
    }
}
