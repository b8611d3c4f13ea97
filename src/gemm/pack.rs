//! Operands in the order a kernel reads them. Packed data remembers its kernel.

use super::kernel::{Geometry, Kernel, LhsFormat, MAX_TILE};
use crate::aligned::AlignedBytes;
use std::ops::Range;

/// Bytes of a packed operand: whole panels of whole groups. An overflow panics, because the
/// pointers into panels are sound only if the buffer has the size that it should have.
fn packed_bytes(
    (rows, depth): (usize, usize),
    (panel, group): (usize, usize),
    element: usize,
) -> usize {
    let rows = rows.checked_next_multiple_of(panel);
    let depth = depth.checked_next_multiple_of(group);
    rows.zip(depth)
        .and_then(|(rows, depth)| rows.checked_mul(depth)?.checked_mul(element))
        .expect("an operand larger than the address space")
}

/// Spreads rows of codes over panels, `GROUP` elements at a time, each through `encode`. `out`
/// starts with the panel of the row `first`.
fn spread<const GROUP: usize, T: Copy>(
    codes: &[i8],
    depth: usize,
    (first, panel): (usize, usize),
    out: &mut [[T; GROUP]],
    encode: impl Fn(i8) -> T,
) {
    let groups = depth.div_ceil(GROUP);
    for (row, codes) in (first..).zip(codes.chunks_exact(depth.max(1))) {
        let out = &mut out[row / panel * groups * panel + row % panel..];
        let (whole, tail) = codes.as_chunks::<GROUP>();
        // One group every `panel` groups. Padding at the end of the depth stays as it is.
        let mut places = out.iter_mut().step_by(panel);
        for (group, place) in whole.iter().zip(&mut places) {
            // Not `map`, which is not always inlined.
            for (to, &code) in place.iter_mut().zip(group) {
                *to = encode(code);
            }
        }
        if let (false, Some(place)) = (tail.is_empty(), places.next()) {
            place.iter_mut().zip(tail).for_each(|(to, &code)| *to = encode(code));
        }
    }
}

/// [`spread`] for operands of one byte an element.
fn spread_bytes(
    codes: &[i8],
    depth: usize,
    (first, panel): (usize, usize),
    group: usize,
    out: &mut [u8],
    flip: u8,
) {
    let encode = |code: i8| code as u8 ^ flip;
    match group {
        2 => spread(codes, depth, (first, panel), out.as_chunks_mut::<2>().0, encode),
        4 => spread(codes, depth, (first, panel), out.as_chunks_mut::<4>().0, encode),
        8 => spread(codes, depth, (first, panel), out.as_chunks_mut::<8>().0, encode),
        _ => unreachable!("no kernel sums {group} elements a step"),
    }
}

/// Left side, any number of rows.
#[derive(Clone)]
pub(crate) struct PackedLhs {
    kernel: &'static dyn Kernel,
    geometry: Geometry,
    bytes: AlignedBytes,
    rows: usize,
    depth: usize,
}

impl PackedLhs {
    /// Packs row-major signed codes, `rows * depth` of them.
    pub(crate) fn new(
        kernel: &'static dyn Kernel,
        codes: &[i8],
        rows: usize,
        depth: usize,
    ) -> Self {
        assert!(kernel.is_available(), "{} cannot run on this machine", kernel.name());
        let Geometry { mr, nr, group, lhs } = kernel.geometry();
        assert!(mr * nr <= MAX_TILE, "{}: a tile of {mr} x {nr}", kernel.name());
        let mut bytes = AlignedBytes::zeroed(packed_bytes((rows, depth), (mr, group), lhs.size()));
        assert_eq!(codes.len(), rows * depth);
        let out = bytes.as_mut_slice();
        match lhs {
            LhsFormat::Signed => spread_bytes(codes, depth, (0, mr), group, out, 0),
            LhsFormat::Biased => spread_bytes(codes, depth, (0, mr), group, out, 0x80),
            LhsFormat::Wide => {
                assert_eq!(group, 2, "{}", kernel.name());
                // Two i16 in native byte order.
                let pairs = out.as_chunks_mut::<2>().0.as_chunks_mut::<2>().0;
                spread(codes, depth, (0, mr), pairs, |code| i16::from(code).to_ne_bytes());
            }
        }
        Self { kernel, geometry: kernel.geometry(), bytes, rows, depth }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Every panel: the rows in it, and its first byte.
    pub(super) fn panels(&self) -> impl Iterator<Item = (Range<usize>, *const u8)> {
        let Geometry { mr, group, lhs, .. } = self.geometry;
        let panel_bytes = mr * self.depth.div_ceil(group) * group * lhs.size();
        (0..self.rows).step_by(mr).enumerate().map(move |(index, row)| {
            // SAFETY: `packed_bytes` made room for ceil(rows / mr) panels of this size.
            let panel = unsafe { self.bytes.as_ptr().add(index * panel_bytes) };
            (row..(row + mr).min(self.rows), panel)
        })
    }

    pub(super) fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}

/// Right side: the keys of one head.
#[derive(Clone)]
pub(crate) struct PackedRhs {
    kernel: &'static dyn Kernel,
    geometry: Geometry,
    bytes: AlignedBytes,
    rows: usize,
    depth: usize,
    /// What the sums of each column start from, padded to whole panels.
    init: Vec<i32>,
}

impl PackedRhs {
    /// Room for `rows` rows of `depth` codes; [`PackedRhs::put`] fills it.
    pub(crate) fn new(kernel: &'static dyn Kernel, rows: usize, depth: usize) -> Self {
        assert!(kernel.is_available(), "{} cannot run on this machine", kernel.name());
        let Geometry { nr, group, .. } = kernel.geometry();
        let bytes = AlignedBytes::zeroed(packed_bytes((rows, depth), (nr, group), 1));
        let init = vec![0; rows.next_multiple_of(nr)];
        Self { kernel, geometry: kernel.geometry(), bytes, rows, depth, init }
    }

    /// Packs the rows from `first` on: row-major codes, and the sum of each row.
    pub(crate) fn put(&mut self, first: usize, codes: &[i8], sums: &[i32]) {
        assert_eq!(codes.len(), sums.len() * self.depth);
        assert!(first + sums.len() <= self.rows);
        let Geometry { nr, group, lhs, .. } = self.geometry;
        for (init, sum) in self.init[first..].iter_mut().zip(sums) {
            *init = (-lhs.bias()).wrapping_mul(*sum);
        }
        spread_bytes(codes, self.depth, (first, nr), group, self.bytes.as_mut_slice(), 0);
    }

    /// The codes of a row, as [`PackedRhs::put`] got them.
    pub(crate) fn get(&self, row: usize, codes: &mut [i8]) {
        assert!(row < self.rows && codes.len() == self.depth);
        let Geometry { nr, group, .. } = self.geometry;
        let panel = row / nr * nr * self.depth.div_ceil(group) * group;
        let groups = self.bytes.as_slice()[panel + row % nr * group..].chunks(nr * group);
        for (codes, bytes) in codes.chunks_mut(group).zip(groups) {
            codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = byte as i8);
        }
    }

    /// Bytes in memory.
    pub(crate) fn size(&self) -> usize {
        self.bytes.as_slice().len() + size_of_val(self.init.as_slice())
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The panel that starts at row `row`, a multiple of the kernel's `nr`.
    pub(super) fn panel(&self, row: usize) -> *const i8 {
        let Geometry { nr, group, .. } = self.geometry;
        assert!(row < self.rows && row.is_multiple_of(nr));
        let panel_bytes = nr * self.depth.div_ceil(group) * group;
        // SAFETY: `packed_bytes` made room for ceil(rows / nr) panels of this size, and row < rows.
        unsafe { self.bytes.as_ptr().add(row / nr * panel_bytes).cast() }
    }

    /// The `nr` starting sums of that panel.
    pub(super) fn init(&self, row: usize) -> &[i32] {
        &self.init[row..row + self.geometry.nr]
    }

    pub(super) fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}
