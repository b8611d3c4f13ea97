//! The order of elements in a panel, from rows of the matrix.

use super::runs::code;
use crate::cpu::contracts::{Format, LANES, PanelProduct, bf16_bits};
use crate::cpu::plain::lanes::{each_lane, lanes};
use std::ops::{BitOr, Range, Shl};

/// Rows of a matrix, and the place of their groups in one panel.
pub(super) struct Spread<'a> {
    pub product: &'static PanelProduct,
    pub rows: &'a [f32],
    /// Columns of a row.
    pub width: usize,
    /// Those of the panel, padded to whole vectors.
    pub columns: Range<usize>,
    /// Inverse scales of int8 and int16 columns, padded like these.
    pub inverses: &'a [f32],
    pub out: &'a mut [u8],
}

#[inline(always)]
pub(super) fn spread(job: Spread<'_>) {
    let PanelProduct { format, group, bias, .. } = *job.product;
    let inverses = job.inverses;
    let bf16 = |_: usize, x: [f32; LANES]| each_lane(|i| bf16_bits(x[i]).into());
    let int8 = |at: usize, x: [f32; LANES]| {
        let inverse = lanes(inverses, at);
        each_lane(|i| u32::from(code(x[i], inverse[i]) as u8 ^ bias))
    };
    let int16 = |at: usize, x: [f32; LANES]| {
        let inverse = lanes(inverses, at);
        each_lane(|i| code(x[i], inverse[i]) & 0xffff)
    };
    match (format, group) {
        (Format::F32, _) => copy(job),
        (Format::Bf16, 2) => interleave::<2, u32>(job, bf16),
        (Format::Bf16, _) => interleave::<4, u64>(job, bf16),
        (Format::Int8, 1) => interleave::<1, u8>(job, int8),
        (Format::Int8, 4) => interleave::<4, u32>(job, int8),
        (Format::Int8, _) => interleave::<8, u64>(job, int8),
        (Format::Int16, 1) => interleave::<1, u16>(job, int16),
        (Format::Int16, _) => interleave::<2, u32>(job, int16),
    }
}

/// Rows of f32 as they are.
#[inline(always)]
fn copy(job: Spread<'_>) {
    let Spread { rows, width, columns, out, .. } = job;
    let vectors = out.as_chunks_mut::<4>().0.as_chunks_mut::<LANES>().0;
    let outs = vectors.chunks_exact_mut(columns.len() / LANES);
    for (row, out) in rows.chunks_exact(width).zip(outs) {
        let row = &row[columns.start..columns.end.min(width)];
        for (i, out) in out.iter_mut().enumerate() {
            let numbers = lanes(row, i * LANES);
            *out = each_lane(|i| numbers[i].to_ne_bytes());
        }
    }
}

/// What one column of a group becomes.
trait Word: Copy + Default + BitOr<Output = Self> + Shl<usize, Output = Self> {
    /// An element in the lowest bits.
    fn of(element: u32) -> Self;

    fn write(self, out: &mut [u8]);
}

macro_rules! words {
    ($($word:ty),*) => {
        $(impl Word for $word {
            #[inline(always)]
            fn of(element: u32) -> Self {
                element as Self
            }

            #[inline(always)]
            fn write(self, out: &mut [u8]) {
                out.copy_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
words!(u8, u16, u32, u64);

/// Groups of `G` rows, a word for each column; the first row is in the lowest bits, which come
/// first in memory.
#[inline(always)]
fn interleave<const G: usize, W: Word>(
    job: Spread<'_>,
    elements: impl Fn(usize, [f32; LANES]) -> [u32; LANES],
) {
    let known = job.columns.start..job.columns.end.min(job.width);
    let groups = job.rows.chunks(G * job.width);
    let outs = job.out.chunks_exact_mut(job.columns.len() * size_of::<W>());
    for (group, out) in groups.zip(outs) {
        // Behind the last row are zeros.
        let mut rows = [&job.rows[..0]; G];
        for (row, values) in rows.iter_mut().zip(group.chunks_exact(job.width)) {
            *row = &values[known.clone()];
        }
        for (i, out) in out.chunks_exact_mut(LANES * size_of::<W>()).enumerate() {
            let mut words = [W::default(); LANES];
            for (g, row) in rows.iter().enumerate() {
                let row = row.get(i * LANES..).unwrap_or_default();
                let elements = elements(i * LANES, lanes(row, 0));
                let shift = 8 * size_of::<W>() / G * g;
                words = each_lane(|c| words[c] | W::of(elements[c]) << shift);
            }
            for (word, out) in words.iter().zip(out.chunks_exact_mut(size_of::<W>())) {
                word.write(out);
            }
        }
    }
}
