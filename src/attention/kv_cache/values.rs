//! Values of a page: row-major, in two bytes an element or one.

use super::config::CacheValues;
use crate::cpu::Level;
use crate::cpu::contracts::{BlockCodes, LANES, Rows, Stored, bf16_bits};
use crate::cpu::plain::widest;
use crate::memory::Aligned;
use crate::product::{LARGEST, StoredMatrix};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::ops::Range;

/// The values of some tokens, `[slots, Dv]`; each row is padded to whole vectors, so that products read it
/// where it lies.
#[derive(Clone)]
pub(super) struct Values {
    format: CacheValues,
    bytes: Aligned<u8>,
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
    /// How a product sees it.
    fn stored(self) -> Stored {
        match self {
            CacheValues::F16 => Stored::F16,
            CacheValues::Bf16 => Stored::Bf16,
            CacheValues::Int8 => Stored::Int8,
        }
    }

    /// Bytes of an element.
    pub(super) fn size(self) -> usize {
        self.stored().size()
    }

    /// The largest magnitude that it holds.
    pub(super) fn limit(self) -> f32 {
        match self {
            // What rounds to infinity is not held.
            CacheValues::F16 => 65_519.0,
            CacheValues::Bf16 | CacheValues::Int8 => LARGEST,
        }
    }
}

impl Values {
    /// Room for `slots` rows of `dim` values.
    pub(super) fn new(format: CacheValues, slots: usize, dim: usize) -> Self {
        let scales = if format == CacheValues::Int8 { slots } else { 0 };
        Self {
            format,
            bytes: Aligned::zeroed(slots * dim.next_multiple_of(LANES) * format.size()),
            dim,
            scales: vec![0.0; scales],
            exceptions: Vec::new(),
        }
    }

    /// Bytes in memory.
    pub(super) fn size(&self) -> usize {
        let exceptions = self.exceptions.len() * self.dim * size_of::<f32>();
        self.bytes.len() + size_of_val(self.scales.as_slice()) + exceptions
    }

    /// Bytes from one row to the next.
    fn stride(&self) -> usize {
        self.dim.next_multiple_of(LANES) * self.format.size()
    }

    /// The bytes of the rows in some slots, without their padding.
    fn rows(&self, slots: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let (stride, width) = (self.stride(), self.dim * self.format.size());
        slots.map(move |slot| &self.bytes[slot * stride..][..width])
    }

    /// Writes row-major rows from slot `first` on, over what was there.
    pub(super) fn put(&mut self, level: Level, first: usize, rows: &[f32]) {
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
            self.put_row(level, slot, &row_or_zeros);
        }
    }

    /// Writes a row that the format holds.
    fn put_row(&mut self, level: Level, slot: usize, row: &[f32]) {
        let (stride, width) = (self.stride(), self.dim * self.format.size());
        let out = &mut self.bytes[slot * stride..][..width];
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
                level.quantize(false, Rows::contiguous(row, row.len()), None, codes_out);
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = code as u8);
            }
        }
    }

    /// Rows as they are stored.
    pub(super) fn stored(&self, slots: Range<usize>) -> StoredRows {
        let bytes = self.rows(slots.clone()).collect::<Vec<_>>().concat();
        let scales = match self.format {
            CacheValues::Int8 => self.scales[slots].to_vec(),
            _ => Vec::new(),
        };
        StoredRows { bytes, scales }
    }

    /// The reverse of [`Values::stored`]. `rows` are as many whole rows as the slots from `first`
    /// on can take.
    pub(super) fn restore(&mut self, first: usize, rows: &StoredRows) {
        let (stride, width) = (self.stride(), self.dim * self.format.size());
        if width > 0 {
            let outs = self.bytes[first * stride..].chunks_mut(stride);
            for (out, row) in outs.zip(rows.bytes.chunks_exact(width)) {
                out[..width].copy_from_slice(row);
            }
        }
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

    /// The rows in some slots as they lie. A row of int8 is codes: their scales go to the left side.
    pub(super) fn matrix(&self, slots: Range<usize>) -> StoredMatrix<'_> {
        let (stride, form) = (self.stride(), self.format.stored());
        let shape = (slots.len(), self.dim.next_multiple_of(LANES));
        StoredMatrix::new(form, &self.bytes[slots.start * stride..], shape, stride)
    }

    /// One a row of int8, by slot.
    pub(super) fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Appends the rows in some slots, in f32. Exceptions are zeros.
    pub(super) fn decode(&self, slots: Range<usize>, out: &mut Vec<f32>) {
        let start = out.len();
        out.resize(start + slots.len() * self.dim, 0.0);
        let out = &mut out[start..];
        let halves = self.rows(slots.clone()).flat_map(|row| row.as_chunks().0.iter().copied());
        match self.format {
            // Of the crate `half`, which has an instruction for many at a time.
            CacheValues::F16 => {
                halves.map(f16::from_le_bytes).collect::<Vec<_>>().convert_to_f32_slice(out);
            }
            CacheValues::Bf16 => {
                halves.map(bf16::from_le_bytes).collect::<Vec<_>>().convert_to_f32_slice(out);
            }
            CacheValues::Int8 => {
                let outs = out.chunks_exact_mut(self.dim.max(1));
                for ((slot, row), out) in slots.clone().zip(self.rows(slots)).zip(outs) {
                    let job = (out, row, self.scales[slot]);
                    widest!(dequantize, job, (&mut [f32], &[u8], f32) => ());
                }
            }
        }
    }
}

/// `scale * code`.
#[inline(always)]
fn dequantize((row, codes, scale): (&mut [f32], &[u8], f32)) {
    row.iter_mut().zip(codes).for_each(|(x, &code)| *x = f32::from(code as i8) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;
    use crate::product::Int16Rows;

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

    /// Rows that were put in pieces, the second of them twice.
    fn put(level: Level, format: CacheValues, dim: usize, values: &[f32]) -> Values {
        let mut held = Values::new(format, values.len() / dim, dim);
        held.put(level, 20, &numbers(17 * dim, 5));
        held.put(level, 0, &values[..20 * dim]);
        held.put(level, 20, &values[20 * dim..]);
        held
    }

    #[test]
    fn products_are_those_of_the_rounded_values() {
        const SLOTS: usize = 37;
        for level in runnable() {
            for (format, step) in FORMATS {
                for dim in [1, 15, 16, 33, 64, 80, 130] {
                    let values = numbers(SLOTS * dim, dim as u64);
                    let held = put(level, format, dim, &values);
                    let mut decoded = vec![7.0];
                    held.decode(0..SLOTS, &mut decoded);
                    for (x, found) in values.iter().zip(&decoded[1..]) {
                        // Every value is below 1, so its error is at most a step.
                        let off = f64::from(x - found).abs();
                        assert!(off <= 1.01 * step, "{level:?} {format:?} {dim}: {x} {found}");
                    }
                    for (rows, first) in [(1, 0), (3, 5), (5, 0), (9, 36), (55, 0)] {
                        let (count, width) = (SLOTS - first, dim.next_multiple_of(LANES));
                        let mut probs = numbers(rows * SLOTS, 3);
                        for probs in probs.chunks_mut(SLOTS) {
                            probs[count..].fill(f32::NAN);
                        }
                        let mut scaled = probs.clone();
                        let (mut sums, matrix) =
                            (vec![1f32; rows * width], held.matrix(first..SLOTS));
                        if format == CacheValues::Int8 {
                            for scaled in scaled.chunks_mut(SLOTS) {
                                let scales = &held.scales()[first..];
                                scaled.iter_mut().zip(scales).for_each(|(p, scale)| *p *= scale);
                            }
                            let mut rounded = Int16Rows::default();
                            rounded.put(Rows::new(&scaled, rows, count, SLOTS));
                            matrix.accumulate_int16(level, &rounded, &mut sums);
                        } else {
                            matrix.accumulate(level, &scaled, SLOTS, &mut sums);
                        }
                        for (i, sum) in sums.iter().enumerate() {
                            let (r, c) = (i / width, i % width);
                            let term = |j: usize| {
                                let value = decoded[1 + (first + j) * dim + c];
                                f64::from(probs[r * SLOTS + j]) * f64::from(value)
                            };
                            let exact = match c < dim {
                                true => 1.0 + (0..count).map(term).sum::<f64>(),
                                false => 1.0, // padding
                            };
                            let error = (f64::from(*sum) - exact).abs();
                            // Half a code of 4096 in each probability, none of which is above 1.
                            let rounded = count as f64 / 8192.0;
                            let bound = if format == CacheValues::Int8 { rounded } else { 1e-5 };
                            assert!(
                                error < bound,
                                "{level:?} {format:?} {dim} {rows} {i}: {error}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_the_format_cannot_hold_is_kept_beside() {
        for (format, _) in FORMATS {
            let level = runnable()[0];
            let mut held = Values::new(format, 4, 2);
            held.put(level, 0, &[1.0, 2.0, f32::NAN, 1.0, 3.4e38, 0.0, 0.0, 1.0]);
            let kept: Vec<usize> = held.exceptions().iter().map(|(slot, _)| *slot).collect();
            assert_eq!(kept, [1, 2]);
            let mut decoded = Vec::new();
            held.decode(0..4, &mut decoded);
            assert_eq!(decoded[2..6], [0.0; 4]);
            // Overwritten, and forgotten.
            held.put(level, 1, &[5.0, 5.0]);
            held.truncate(2);
            assert!(held.exceptions().is_empty());
        }
    }
}
