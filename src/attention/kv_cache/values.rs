//! Values of a page: row-major, in two bytes an element or one.

use super::config::CacheValues;
use super::product::{Format, product};
use crate::aligned::AlignedBytes;
use crate::pv::{PackedValues, PvKernel, ValueFormat, bf16_bits};
use crate::quant::Scheme;
use crate::quant::rows::{BlockCodes, RowParams, Rows, quantize_block};
use crate::simd::widest;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// Up to this many rows of probabilities values are multiplied as they are stored; for more it pays
/// to bring them into the order of faster kernels first.
const FEW: usize = 8;

/// Keys that a kernel for many rows may sum in one step, at most.
const GROUP: usize = 8;

/// The values of some tokens, `[slots, Dv]`.
#[derive(Clone)]
pub(super) struct Values {
    format: CacheValues,
    bytes: AlignedBytes,
    dim: usize,
    /// Of int8 rows only.
    scales: Vec<f32>,
    /// Rows that the format cannot hold, which are zeros there.
    exceptions: Vec<(usize, Vec<f32>)>,
}

/// Some rows in the format of the cache, as they are stored in files.
pub(super) struct StoredRows {
    /// Row-major, little-endian.
    pub bytes: Vec<u8>,
    pub scales: Vec<f32>,
}

impl CacheValues {
    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        match self {
            CacheValues::F16 | CacheValues::Bf16 => 2,
            CacheValues::Int8 => 1,
        }
    }

    /// The largest magnitude that it holds.
    fn limit(self) -> f32 {
        match self {
            // What rounds to infinity is not held.
            CacheValues::F16 => 65_519.0,
            CacheValues::Bf16 => bf16::MAX.to_f32(),
            // A product of scale and code stays finite, whatever the rounding.
            CacheValues::Int8 => f32::MAX / 2.0,
        }
    }
}

impl Values {
    /// Room for `slots` rows of `dim` values.
    pub(super) fn new(format: CacheValues, slots: usize, dim: usize) -> Self {
        let scales = if format == CacheValues::Int8 { slots } else { 0 };
        Self {
            format,
            bytes: AlignedBytes::zeroed(slots * dim * format.size()),
            dim,
            scales: vec![0.0; scales],
            exceptions: Vec::new(),
        }
    }

    /// Bytes in memory.
    pub(super) fn size(&self) -> usize {
        let exceptions = self.exceptions.len() * self.dim * size_of::<f32>();
        self.bytes.as_slice().len() + size_of_val(self.scales.as_slice()) + exceptions
    }

    /// Writes row-major rows from slot `first` on, over what was there.
    pub(super) fn put(&mut self, first: usize, rows: &[f32]) {
        if self.dim == 0 {
            return;
        }
        let slots = first..first + rows.len() / self.dim;
        self.exceptions.retain(|(slot, _)| !slots.contains(slot));
        let limit = self.format.limit();
        let mut row_or_zeros = vec![0f32; self.dim];
        for (slot, row) in slots.zip(rows.chunks_exact(self.dim)) {
            // NaN is above every limit.
            let held = row.iter().all(|x| x.abs() <= limit);
            if held {
                row_or_zeros.copy_from_slice(row);
            } else {
                row_or_zeros.fill(0.0);
                self.exceptions.push((slot, row.to_vec()));
            }
            self.put_row(slot, &row_or_zeros);
        }
    }

    /// Writes a row that the format holds.
    fn put_row(&mut self, slot: usize, row: &[f32]) {
        let width = self.dim * self.format.size();
        let out = &mut self.bytes.as_mut_slice()[slot * width..][..width];
        let bf16 = |x: f32| bf16_bits(x).to_le_bytes();
        match self.format {
            CacheValues::Bf16 => {
                out.as_chunks_mut::<2>().0.iter_mut().zip(row).for_each(|(o, &x)| *o = bf16(x));
            }
            CacheValues::F16 => {
                let mut halves = vec![f16::ZERO; row.len()];
                halves.convert_from_f32_slice(row);
                let outs = out.as_chunks_mut::<2>().0.iter_mut();
                outs.zip(halves).for_each(|(out, x)| *out = x.to_le_bytes());
            }
            CacheValues::Int8 => {
                let mut codes = vec![0i8; row.len()];
                let codes_out = BlockCodes {
                    codes: &mut codes,
                    scales: &mut self.scales[slot..=slot],
                    zeros: &mut [0],
                    sums: &mut [0],
                };
                let (rows, params) =
                    (Rows::contiguous(row, row.len()), RowParams::Own(Scheme::Symmetric));
                quantize_block(rows, None, params, codes_out);
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = code as u8);
            }
        }
    }

    /// Rows as they are stored.
    pub(super) fn stored(&self, slots: Range<usize>) -> StoredRows {
        let width = self.dim * self.format.size();
        let bytes = self.bytes.as_slice()[slots.start * width..slots.end * width].to_vec();
        let scales = match self.format {
            CacheValues::Int8 => self.scales[slots].to_vec(),
            _ => Vec::new(),
        };
        StoredRows { bytes, scales }
    }

    /// The reverse of [`Values::stored`]. `rows` are as many whole rows as the slots from `first`
    /// on can take.
    pub(super) fn restore(&mut self, first: usize, rows: &StoredRows) {
        let width = self.dim * self.format.size();
        let out = &mut self.bytes.as_mut_slice()[first * width..];
        out[..rows.bytes.len()].copy_from_slice(&rows.bytes);
        if self.format == CacheValues::Int8 {
            self.scales[first..first + rows.scales.len()].copy_from_slice(&rows.scales);
        }
    }

    /// The rows that the format cannot hold, by slot.
    pub(super) fn exceptions(&self) -> &[(usize, Vec<f32>)] {
        &self.exceptions
    }

    /// Adds a row that the format cannot hold; its slot holds zeros.
    pub(super) fn restore_exception(&mut self, slot: usize, row: Vec<f32>) {
        self.exceptions.push((slot, row));
    }

    /// Forgets the rows from slot `slots` on.
    pub(super) fn truncate(&mut self, slots: usize) {
        self.exceptions.retain(|(slot, _)| *slot < slots);
    }

    /// `sums[r, c] += sum_j probs[r, j] * values[j, c]` for the first `slots` rows. `probs` is
    /// row-major with rows `stride` apart and is overwritten; `sums` is `[rows, Dv]`. `many`
    /// multiplies where there are many rows.
    pub(super) fn accumulate(
        &self,
        slots: usize,
        probs: &mut [f32],
        stride: usize,
        sums: &mut [f32],
        many: &'static dyn PvKernel,
    ) {
        if self.dim == 0 {
            return;
        }
        for (probs, sums) in probs.chunks(stride).zip(sums.chunks_exact_mut(self.dim)) {
            for (slot, row) in self.exceptions.iter().filter(|(slot, _)| *slot < slots) {
                // Not seen: its NaN must not leak through 0 * NaN.
                if probs[*slot] != 0.0 {
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += probs[*slot] * x);
                }
            }
        }
        if sums.len() / self.dim > FEW {
            self.accumulate_many(slots, probs, stride, sums, many);
        } else {
            self.accumulate_few(slots, probs, stride, sums);
        }
    }

    /// Values as they are stored, widened in registers.
    fn accumulate_few(&self, slots: usize, probs: &mut [f32], stride: usize, sums: &mut [f32]) {
        if self.format == CacheValues::Int8 {
            for probs in probs.chunks_mut(stride).take(sums.len() / self.dim) {
                probs[..slots].iter_mut().zip(&self.scales).for_each(|(p, scale)| *p *= scale);
            }
        }
        let bytes = &self.bytes.as_slice()[..slots * self.dim * self.format.size()];
        let format = match self.format {
            CacheValues::F16 => Format::F16,
            CacheValues::Bf16 => Format::Bf16,
            CacheValues::Int8 => Format::Int8,
        };
        product(format, bytes, self.dim, probs, stride, sums);
    }

    /// A copy of this page's values in the order of a kernel for many rows.
    fn accumulate_many(
        &self,
        slots: usize,
        probs: &mut [f32],
        stride: usize,
        sums: &mut [f32],
        kernel: &'static dyn PvKernel,
    ) {
        let mut packed = PackedValues::new(kernel, slots, self.dim);
        packed.put(0, &self.decoded(slots));
        let (rows, width) = (sums.len() / self.dim, packed.width());
        // Whole groups of keys, whatever the kernel.
        let group = slots.next_multiple_of(GROUP).min(stride);
        let rows_of_probs = probs.chunks_mut(stride).take(rows);
        rows_of_probs.for_each(|probs| probs[slots..group].fill(0.0));
        let mut added = vec![0f32; rows * width];
        match kernel.format() {
            ValueFormat::F32 => packed.accumulate_f32(0..slots, probs, stride, &mut added),
            ValueFormat::Bf16 => {
                let mut halves = vec![0u16; rows * group];
                for (halves, probs) in halves.chunks_exact_mut(group).zip(probs.chunks(stride)) {
                    widest!(round, (halves, probs), (&mut [u16], &[f32]) => ());
                }
                packed.accumulate_bf16(0..slots, &halves, group, &mut added);
            }
            ValueFormat::Int8 => unreachable!("a cache refuses P·V in int8"),
        }
        for (sums, added) in sums.chunks_exact_mut(self.dim).zip(added.chunks_exact(width)) {
            sums.iter_mut().zip(added).for_each(|(sum, x)| *sum += x);
        }
    }

    /// The first `slots` rows in f32. Exceptions are zeros.
    fn decoded(&self, slots: usize) -> Vec<f32> {
        let mut rows = vec![0f32; slots * self.dim];
        let bytes = &self.bytes.as_slice()[..rows.len() * self.format.size()];
        match self.format {
            CacheValues::F16 => {
                let halves = bytes.as_chunks().0.iter().copied().map(f16::from_le_bytes);
                halves.collect::<Vec<_>>().convert_to_f32_slice(&mut rows);
            }
            CacheValues::Bf16 => {
                let halves = bytes.as_chunks().0.iter().copied().map(bf16::from_le_bytes);
                halves.collect::<Vec<_>>().convert_to_f32_slice(&mut rows);
            }
            CacheValues::Int8 => {
                let job = (&mut rows[..], bytes, &self.scales[..], self.dim);
                widest!(dequantize, job, (&mut [f32], &[u8], &[f32], usize) => ());
            }
        }
        rows
    }
}

/// `scale * code`, one scale a row of `dim`.
#[inline(always)]
fn dequantize((rows, codes, scales, dim): (&mut [f32], &[u8], &[f32], usize)) {
    let rows = rows.chunks_exact_mut(dim).zip(codes.chunks_exact(dim));
    for ((row, codes), scale) in rows.zip(scales) {
        row.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code as i8) * scale);
    }
}

#[inline(always)]
fn round((halves, numbers): (&mut [u16], &[f32])) {
    halves.iter_mut().zip(numbers).for_each(|(half, x)| *half = bf16_bits(*x));
}

#[cfg(test)]
mod tests {
    use super::ValueFormat::{Bf16, F32};
    use super::*;
    use crate::pv;

    const FORMATS: [(CacheValues, f64); 3] = [
        (CacheValues::F16, 1.0 / 2048.0),
        (CacheValues::Bf16, 1.0 / 256.0),
        (CacheValues::Int8, 1.0 / 254.0),
    ];

    fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn products_are_those_of_the_rounded_values() {
        for (format, step) in FORMATS {
            for dim in [1, 15, 16, 33, 64, 80, 130] {
                for (rows, many) in [(1, F32), (3, F32), (5, F32), (9, F32), (10, Bf16), (55, Bf16)]
                {
                    let Some(kernel) = pv::select(many) else { continue };
                    let (slots, stride) = (37, 40);
                    let values = numbers(slots * dim, dim as u64);
                    let mut packed = Values::new(format, slots, dim);
                    // In pieces, the second of them twice.
                    packed.put(20, &numbers(17 * dim, 5));
                    packed.put(0, &values[..20 * dim]);
                    packed.put(20, &values[20 * dim..]);
                    let probs: Vec<f32> =
                        numbers(rows * stride, 3).iter().map(|p| p.abs()).collect();
                    let mut sums = vec![1f32; rows * dim];
                    packed.accumulate(slots, &mut probs.clone(), stride, &mut sums, kernel);
                    for (i, sum) in sums.iter().enumerate() {
                        let (r, c) = (i / dim, i % dim);
                        let p = |j: usize| f64::from(probs[r * stride + j]);
                        let term = |j: usize| p(j) * f64::from(values[j * dim + c]);
                        let expected = 1.0 + (0..slots).map(term).sum::<f64>();
                        // Every value is below 1, so its error is at most half a step.
                        let step = step * 0.5 + if many == Bf16 { 2.0 / 512.0 } else { 0.0 };
                        let bound = (0..slots).map(p).sum::<f64>() * step + 1e-5;
                        let error = (f64::from(*sum) - expected).abs();
                        assert!(error <= bound, "{format:?} {dim} {rows} {i}: {error} {bound}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_kept_beside_and_leaks_nowhere() {
        for (format, _) in FORMATS {
            let mut packed = Values::new(format, 4, 2);
            let rows = [1.0, 2.0, f32::NAN, 1.0, 3.4e38, 0.0, 0.0, 1.0];
            packed.put(0, &rows);
            let kept: Vec<usize> = packed.exceptions().iter().map(|(slot, _)| *slot).collect();
            assert_eq!(kept, [1, 2]);
            let mut sums = vec![0f32; 2];
            let kernel = pv::select(F32).unwrap();
            packed.accumulate(4, &mut [1.0, 0.0, 1.0, 1.0], 4, &mut sums, kernel);
            assert!((sums[0] / 3.4e38 - 1.0).abs() < 0.01 && (sums[1] - 3.0).abs() < 0.02);
            packed.accumulate(4, &mut [1.0, 0.5, 0.0, 0.0], 4, &mut sums, kernel);
            assert!(sums[0].is_nan());
            // Overwritten, and forgotten.
            packed.put(1, &[5.0, 5.0]);
            packed.truncate(2);
            assert!(packed.exceptions().is_empty());
        }
    }
}
