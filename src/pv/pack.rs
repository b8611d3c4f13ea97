//! Values in the order a kernel reads them.

use super::kernel::{LANES, PvKernel, PvTile, ROWS, VECTORS, ValueFormat, bf16_bits};
use crate::aligned::AlignedBytes;
use crate::simd::widest;
use std::ops::Range;

/// Channels in a panel.
const PANEL: usize = LANES * VECTORS;

/// The values of one head, `[N, Dv]`.
///
/// Rows that the format cannot hold as finite numbers are stored as zeros and kept beside, so that
/// a NaN of a masked key does not leak through `0 * NaN`.
pub(crate) struct PackedValues {
    kernel: &'static dyn PvKernel,
    bytes: AlignedBytes,
    keys: usize,
    depth: usize,
    exceptions: Vec<(usize, Vec<f32>)>,
}

impl PackedValues {
    /// Room for `keys` rows of `depth` values; [`PackedValues::put`] fills it.
    pub(crate) fn new(kernel: &'static dyn PvKernel, keys: usize, depth: usize) -> Self {
        assert!(kernel.is_available(), "{} cannot run on this machine", kernel.name());
        let format = kernel.format();
        let padded = keys.next_multiple_of(format.group()) * depth.next_multiple_of(LANES);
        let bytes = AlignedBytes::zeroed(padded * format.size());
        Self { kernel, bytes, keys, depth, exceptions: Vec::new() }
    }

    /// Channels, padded to whole vectors: the stride of the sums.
    pub(crate) fn width(&self) -> usize {
        self.depth.next_multiple_of(LANES)
    }

    /// The keys whose values are not finite (in the format), with those values.
    pub(crate) fn exceptions(&self) -> &[(usize, Vec<f32>)] {
        &self.exceptions
    }

    /// Packs the rows from `first` on, which is even; `rows` is row-major.
    pub(crate) fn put(&mut self, first: usize, rows: &[f32]) {
        let depth = self.depth;
        if depth == 0 {
            return;
        }
        assert!(first.is_multiple_of(2) && first + rows.len() / depth <= self.keys);
        let limit = match self.kernel.format() {
            ValueFormat::F32 => f32::MAX,
            ValueFormat::Bf16 => half::bf16::MAX.to_f32(),
        };
        let group = self.kernel.format().group();
        let zeros = vec![0f32; depth];
        let fits = |row: &[f32]| widest!(all_below, (row, limit), (&[f32], f32) => bool);
        for (pair, rows) in rows.chunks(group * depth).enumerate() {
            let key = first + pair * group;
            let (a, b) = rows.split_at(depth);
            let b = if b.is_empty() { &zeros } else { b };
            let mut checked = [a, b];
            for (i, row) in checked.iter_mut().enumerate() {
                if !fits(row) {
                    self.exceptions.push((key + i, row.to_vec()));
                    *row = &zeros;
                }
            }
            self.put_group(key / group, checked[0], checked[1]);
        }
    }

    /// Writes one group of keys into all panels.
    fn put_group(&mut self, index: usize, a: &[f32], b: &[f32]) {
        let (format, width) = (self.kernel.format(), self.width());
        let key_bytes = self.keys.next_multiple_of(format.group()) * format.size();
        for start in (0..self.depth).step_by(PANEL) {
            let panel = PANEL.min(width - start);
            let channels = start..(start + panel).min(self.depth);
            let at = start * key_bytes + index * panel * format.group() * format.size();
            let out = &mut self.bytes.as_mut_slice()[at..];
            let out = &mut out.as_chunks_mut::<4>().0[..channels.len()];
            match format {
                ValueFormat::F32 => {
                    out.iter_mut().zip(&a[channels]).for_each(|(o, x)| *o = x.to_ne_bytes());
                }
                ValueFormat::Bf16 => {
                    let job = (out, &a[channels.clone()], &b[channels]);
                    widest!(interleave, job, (&mut [[u8; 4]], &[f32], &[f32]) => ());
                }
            }
        }
    }

    /// `out[r, c] += sum_j probs[r, j] * values[j, c]` for `j` in `keys`, `out` row-major with
    /// [`PackedValues::width`] columns; `probs[r * stride]` belongs to the first key.
    pub(crate) fn accumulate_f32(
        &self,
        keys: Range<usize>,
        probs: &[f32],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.kernel.format(), ValueFormat::F32);
        let rows = out.len().checked_div(self.width()).unwrap_or(0);
        assert!(rows == 0 || probs.len() >= (rows - 1) * stride + keys.len());
        // SAFETY: the probabilities of all rows and keys were just asserted to be there.
        unsafe { self.accumulate(keys, probs.as_ptr().cast(), stride, out) };
    }

    /// [`PackedValues::accumulate_f32`] for bf16 probabilities. `keys` starts at an even key; when
    /// it ends at an odd one, each row of `probs` holds one more element, which is 0.
    pub(crate) fn accumulate_bf16(
        &self,
        keys: Range<usize>,
        probs: &[u16],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.kernel.format(), ValueFormat::Bf16);
        assert!(keys.start.is_multiple_of(2));
        let rows = out.len().checked_div(self.width()).unwrap_or(0);
        assert!(rows == 0 || probs.len() >= (rows - 1) * stride + keys.len().next_multiple_of(2));
        // SAFETY: the probabilities of all rows and whole groups were just asserted to be there.
        unsafe { self.accumulate(keys, probs.as_ptr().cast(), stride, out) };
    }

    /// # Safety
    /// `probs` is valid for reads of whole groups of `keys` in each row of `out`.
    unsafe fn accumulate(
        &self,
        keys: Range<usize>,
        probs: *const u8,
        stride: usize,
        out: &mut [f32],
    ) {
        assert!(keys.end <= self.keys);
        assert!(out.len().is_multiple_of(self.width().max(1)), "whole rows of sums");
        let (format, width) = (self.kernel.format(), self.width());
        let (group, size) = (format.group(), format.size());
        if keys.is_empty() || width == 0 {
            return;
        }
        let key_bytes = self.keys.next_multiple_of(group) * size;
        let groups = keys.end.div_ceil(group) - keys.start / group;
        for start in (0..width).step_by(PANEL) {
            let panel = PANEL.min(width - start);
            let at = start * key_bytes + keys.start / group * panel * group * size;
            for (i, out) in out.chunks_mut(ROWS * width).enumerate() {
                let tile = PvTile {
                    rows: out.len() / width,
                    vectors: panel / LANES,
                    groups,
                    // SAFETY: row `i * ROWS` is one of the rows that are valid by contract.
                    probs: unsafe { probs.add(i * ROWS * stride * size) },
                    probs_stride: stride * size,
                    // SAFETY: a panel starts at `start * key_bytes` and holds all groups.
                    values: unsafe { self.bytes.as_ptr().add(at) },
                    out: out[start..].as_mut_ptr(),
                    out_stride: width,
                };
                // SAFETY: `new` asserted that the kernel is available; `tile` names `rows` rows of
                // `panel` sums inside `out`, probabilities valid by contract, and whole groups of
                // values inside the buffer, since `keys.end <= self.keys`.
                unsafe { self.kernel.tile(tile) };
            }
        }
    }
}

/// Whether every magnitude is at most `limit` (NaN is not).
#[inline(always)]
fn all_below((row, limit): (&[f32], f32)) -> bool {
    row.iter().fold(true, |all, x| all & (x.abs() <= limit))
}

/// Pairs of bf16, the first key's in the low half.
#[inline(always)]
fn interleave((out, a, b): (&mut [[u8; 4]], &[f32], &[f32])) {
    for ((o, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *o = (u32::from(bf16_bits(a)) | u32::from(bf16_bits(b)) << 16).to_ne_bytes();
    }
}
