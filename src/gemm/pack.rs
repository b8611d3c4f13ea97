//! Operands in the order a kernel reads them. Packed data remembers its kernel.

use super::kernel::{Geometry, Kernel, LhsFormat, MAX_TILE};
use crate::aligned::AlignedBytes;

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

/// Where element `(row, depth)` of an operand lies in its packed form.
fn offset(panel: usize, groups: usize, group: usize, row: usize, depth: usize) -> usize {
    ((row / panel * groups + depth / group) * panel + row % panel) * group + depth % group
}

/// Runs `put(destination, source)` for every stretch of up to `group` elements of a row.
fn for_each_group(
    (rows, depth): (usize, usize),
    (panel, group): (usize, usize),
    mut put: impl FnMut(usize, std::ops::Range<usize>),
) {
    let groups = depth.div_ceil(group);
    for row in 0..rows {
        let start = offset(panel, groups, group, row, 0);
        for g in 0..groups {
            let from = row * depth + g * group;
            let to = row * depth + ((g + 1) * group).min(depth);
            put(start + g * panel * group, from..to);
        }
    }
}

/// Left side, any number of rows.
#[derive(Clone)]
pub(crate) struct PackedLhs {
    kernel: &'static dyn Kernel,
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
        for_each_group((rows, depth), (mr, group), |at, source| {
            let source = &codes[source];
            match lhs {
                LhsFormat::Signed => {
                    out[at..].iter_mut().zip(source).for_each(|(o, &q)| *o = q as u8);
                }
                LhsFormat::Biased => {
                    out[at..].iter_mut().zip(source).for_each(|(o, &q)| *o = q as u8 ^ 0x80);
                }
                LhsFormat::Wide => {
                    let pairs = out[2 * at..].as_chunks_mut::<2>().0;
                    let wide = source.iter().map(|&q| i16::from(q).to_ne_bytes());
                    pairs.iter_mut().zip(wide).for_each(|(o, q)| *o = q);
                }
            }
        });
        Self { kernel, bytes, rows, depth }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The panel that starts at row `row`, a multiple of the kernel's `mr`.
    pub(super) fn panel(&self, row: usize) -> *const u8 {
        let Geometry { mr, group, lhs, .. } = self.kernel.geometry();
        assert!(row < self.rows && row.is_multiple_of(mr));
        let panel_bytes = mr * self.depth.div_ceil(group) * group * lhs.size();
        // SAFETY: `packed_bytes` made room for ceil(rows / mr) panels of this size, and row < rows.
        unsafe { self.bytes.as_ptr().add(row / mr * panel_bytes) }
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
        Self { kernel, bytes, rows, depth, init: vec![0; rows.next_multiple_of(nr)] }
    }

    /// Packs the rows from `first` on: row-major codes, and the sum of each row.
    pub(crate) fn put(&mut self, first: usize, codes: &[i8], sums: &[i32]) {
        assert_eq!(codes.len(), sums.len() * self.depth);
        assert!(first + sums.len() <= self.rows);
        let Geometry { nr, group, lhs, .. } = self.kernel.geometry();
        let groups = self.depth.div_ceil(group);
        let out = self.bytes.as_mut_slice();
        for (i, &sum) in sums.iter().enumerate() {
            let row = first + i;
            self.init[row] = (-lhs.bias()).wrapping_mul(sum);
            let source = &codes[i * self.depth..(i + 1) * self.depth];
            let start = offset(nr, groups, group, row, 0);
            for (g, stretch) in source.chunks(group).enumerate() {
                let at = start + g * nr * group;
                out[at..].iter_mut().zip(stretch).for_each(|(o, &q)| *o = q as u8);
            }
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The panel that starts at row `row`, a multiple of the kernel's `nr`.
    pub(super) fn panel(&self, row: usize) -> *const i8 {
        let Geometry { nr, group, .. } = self.kernel.geometry();
        assert!(row < self.rows && row.is_multiple_of(nr));
        let panel_bytes = nr * self.depth.div_ceil(group) * group;
        // SAFETY: `packed_bytes` made room for ceil(rows / nr) panels of this size, and row < rows.
        unsafe { self.bytes.as_ptr().add(row / nr * panel_bytes).cast() }
    }

    /// The `nr` starting sums of that panel.
    pub(super) fn init(&self, row: usize) -> &[i32] {
        &self.init[row..row + self.kernel.geometry().nr]
    }

    pub(super) fn kernel(&self) -> &'static dyn Kernel {
        self.kernel
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}
