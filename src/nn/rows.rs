//! The rows of an f32 tensor in CPU storage, whatever its strides, read some at a time.

use candle_core::{CpuStorage, Layout, Result, bail};
use std::ops::Range;

/// A tensor seen as `[rows, width]`: the last dimension is a row, of rank 4 the last two, so that
/// `[B, N, H, D]`, heads merged, is `[B * N, H * D]` without being copied whole.
pub(super) struct Rows<'a> {
    data: &'a [f32],
    dims: [usize; 4],
    strides: [usize; 4],
    contiguous: bool,
}

impl<'a> Rows<'a> {
    /// # Errors
    /// Unless the storage holds f32 and the rank is 1 to 4.
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let CpuStorage::F32(data) = storage else {
            bail!("linear: the input is not f32");
        };
        // A view of no elements may start beyond its storage.
        let data = data.get(layout.start_offset()..).unwrap_or_default();
        let four = |from: &[usize], fill: usize| -> Option<[usize; 4]> {
            match *from {
                [d] => Some([fill, fill, fill, d]),
                [n, d] => Some([fill, n, fill, d]),
                [b, n, d] => Some([b, n, fill, d]),
                [b, n, h, d] => Some([b, n, h, d]),
                _ => None,
            }
        };
        let Some((dims, strides)) = four(layout.dims(), 1).zip(four(layout.stride(), 0)) else {
            bail!("linear: the input has shape {:?}, expected rank 1 to 4", layout.dims());
        };
        Ok(Self { data, dims, strides, contiguous: layout.is_contiguous() })
    }

    /// As rank 4; the first of lower ranks are 1.
    pub(super) fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Matrix `index` of `[B, H, N, D]`, counted over the batch: its rows are the N tokens.
    pub(super) fn matrix(&self, index: usize) -> Rows<'a> {
        let ([_, h, n, d], [s_b, s_h, s_n, s_d]) = (self.dims, self.strides);
        let data = self.data.get(index / h * s_b + index % h * s_h..).unwrap_or_default();
        let contiguous = (s_d == 1 || d == 1) && (s_n == d || n == 1);
        Rows { data, dims: [1, n, 1, d], strides: [0, s_n, 0, s_d], contiguous }
    }

    /// Rows.
    pub(super) fn count(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.dims[2] * self.dims[3]
    }

    /// Some rows one after the other: where they lie, or gathered into `buffer`.
    pub(super) fn read<'b>(&'b self, rows: Range<usize>, buffer: &'b mut Vec<f32>) -> &'b [f32] {
        let width = self.width();
        if self.contiguous {
            return &self.data[rows.start * width..rows.end * width];
        }
        buffer.clear();
        let ([_, n, heads, depth], [s_b, s_n, s_h, s_d]) = (self.dims, self.strides);
        for row in rows {
            for head in 0..heads {
                let start = row / n * s_b + row % n * s_n + head * s_h;
                match s_d {
                    1 => buffer.extend_from_slice(&self.data[start..start + depth]),
                    _ => buffer.extend((0..depth).map(|d| self.data[start + d * s_d])),
                }
            }
        }
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Storage, Tensor};

    /// All rows, in blocks of 3.
    fn read(x: &Tensor) -> Vec<f32> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        let rows = Rows::new(storage, layout).unwrap();
        let mut buffer = vec![7.0; 2];
        let starts = (0..rows.count()).step_by(3);
        starts
            .flat_map(|start| rows.read(start..(start + 3).min(rows.count()), &mut buffer).to_vec())
            .collect()
    }

    /// All matrices.
    fn matrices(x: &Tensor) -> Vec<f32> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
        let rows = Rows::new(storage, layout).unwrap();
        let [b, h, n, _] = rows.dims();
        let mut buffer = Vec::new();
        (0..b * h).flat_map(|index| rows.matrix(index).read(0..n, &mut buffer).to_vec()).collect()
    }

    #[test]
    fn any_strides_read_as_the_contiguous_copy() {
        let x = Tensor::arange(0f32, 240., &Device::Cpu).unwrap().reshape((2, 3, 5, 8)).unwrap();
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
        ] {
            let copy: Vec<f32> =
                view.contiguous().unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert_eq!(read(&view), copy, "{:?} {:?}", view.dims(), view.stride());
            if view.rank() == 4 {
                assert_eq!(matrices(&view), copy, "{:?} {:?}", view.dims(), view.stride());
            }
        }
    }

    #[test]
    fn what_it_cannot_read_is_an_error() {
        let error = |x: Tensor| {
            let (storage, layout) = x.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { panic!("not on the CPU") };
            Rows::new(storage, layout).err().unwrap().to_string()
        };
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        assert!(error(zeros(&[2], candle_core::DType::U8)).contains("not f32"));
        let text = error(zeros(&[1, 1, 1, 1, 2], candle_core::DType::F32));
        assert!(text.contains("[1, 1, 1, 1, 2]"), "{text}");
    }
}
