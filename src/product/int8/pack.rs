//! Operands in the order a kernel reads them. Packed data remembers its level.

use super::spread::{Spread, spread};
use crate::cpu::Level;
use crate::cpu::contracts::{Geometry, LhsFormat, MAX_TILE, TileInput, ZeroPair, zero_groups};
use crate::cpu::plain::widest;
use crate::memory::{Aligned, footprint};

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

/// Rows of codes as u8, 128 more than they are, each filled up to `stride`.
#[inline(always)]
fn bias((out, stride, codes, depth): (&mut [u8], usize, &[i8], usize)) {
    for (row, codes) in out.chunks_exact_mut(stride).zip(codes.chunks_exact(depth)) {
        row.iter_mut().zip(codes).for_each(|(to, &code)| *to = code as u8 ^ 0x80);
    }
}

/// Rows of codes as i16 in native byte order, each filled up to `stride` bytes.
#[inline(always)]
fn widen((out, stride, codes, depth): (&mut [u8], usize, &[i8], usize)) {
    for (row, codes) in out.chunks_exact_mut(stride).zip(codes.chunks_exact(depth)) {
        let row = row.as_chunks_mut::<2>().0.iter_mut();
        row.zip(codes).for_each(|(to, &code)| *to = i16::from(code).to_ne_bytes());
    }
}

/// What stands in a group of pairs for a sum of codes.
fn part(sum: i32, group: usize, groups: usize) -> i16 {
    const MOST: i32 = i16::MAX as i32;
    if groups == 1 {
        return sum as i16;
    }
    let Some(before) = group.checked_sub(1) else { return (sum & 255) as i16 };
    let (high, before) = (sum >> 8, MOST * before as i32);
    (high - high.clamp(-before, before)).clamp(-MOST, MOST) as i16
}

/// What stands beside it for a zero point: 256 times as much where it meets the rest of a sum.
fn factor(zero: i32, group: usize) -> i16 {
    (if group == 0 { zero } else { 256 * zero }) as i16
}

/// The sums of the codes of rows, and their zero points, which are codes; empty where all are 0.
#[derive(Clone, Copy)]
pub(crate) struct RowSums<'a> {
    pub sums: &'a [i32],
    pub zeros: &'a [i32],
}

/// The codes of `rows` rows of `depth`, row-major, from where they lie in the order of a
/// [`PackedRhs::layout`], of this level or of another.
///
/// # Panics
/// Unless the layout has room for them, and `packed` is as long as it says.
pub(crate) fn unpack(
    [panels, groups, nr, group]: [usize; 4],
    packed: &[u8],
    (rows, depth): (usize, usize),
) -> Vec<i8> {
    assert!(panels * nr >= rows && groups * group >= depth);
    assert_eq!(packed.len(), panels * groups * nr * group);
    let code = |row: usize, d: usize| {
        let at = ((row / nr * groups + d / group) * nr + row % nr) * group + d % group;
        packed[at] as i8
    };
    (0..rows).flat_map(|row| (0..depth).map(move |d| code(row, d))).collect()
}

/// Left side, any number of rows. The memory is kept from one [`PackedLhs::put`] to the next.
#[derive(Clone)]
pub(crate) struct PackedLhs {
    level: Level,
    geometry: Geometry,
    bytes: Aligned<u8>,
    rows: usize,
    depth: usize,
    /// Pairs for zero points, `[rows, groups]`; none where nothing is known of any.
    zeros: Vec<ZeroPair>,
}

impl PackedLhs {
    /// No rows yet.
    pub(crate) fn new(level: Level) -> Self {
        let geometry = level.int8_product().geometry;
        let Geometry { mr, nr, .. } = geometry;
        assert!(mr * nr <= MAX_TILE, "{level:?}: a tile of {mr} x {nr}");
        let bytes = Aligned::default();
        Self { level, geometry, bytes, rows: 0, depth: 0, zeros: Vec::new() }
    }

    /// Packs row-major signed codes, `rows * depth` of them, in the place of what was there, with their zero
    /// points if any of this product is not 0.
    pub(crate) fn put(
        &mut self,
        codes: &[i8],
        rows: usize,
        depth: usize,
        zeros: Option<RowSums<'_>>,
    ) {
        let Geometry { mr, group, lhs, .. } = self.geometry;
        assert_eq!(codes.len(), rows * depth);
        (self.rows, self.depth) = (rows, depth);
        self.zeros.clear();
        if let Some(RowSums { sums, zeros }) = zeros {
            assert!(sums.len() == rows && zeros.len() == rows);
            let groups = zero_groups(depth);
            for (&sum, &zero) in sums.iter().zip(zeros) {
                // Negative, because 256 times the smallest zero point is in an i16 and its negative is not.
                let term = (depth as i32).wrapping_mul(zero).wrapping_sub(sum);
                let pair = |group| [part(term, group, groups), factor(zero, group)];
                self.zeros.extend((0..groups).map(pair));
            }
        }
        // Padding may hold anything: in the depth it meets zeros on the right side, and padded rows
        // are dropped.
        self.bytes.grow(packed_bytes((rows, depth), (mr, group), lhs.size()));
        let stride = self.row_bytes();
        let out = &mut *self.bytes;
        match lhs {
            LhsFormat::Signed => spread(group, Spread { codes, depth, first: 0, panel: mr, out }),
            LhsFormat::Biased if depth > 0 => {
                widest!(bias, (out, stride, codes, depth), (&mut [u8], usize, &[i8], usize) => ());
            }
            LhsFormat::Wide if depth > 0 => {
                widest!(widen, (out, stride, codes, depth), (&mut [u8], usize, &[i8], usize) => ());
            }
            LhsFormat::Biased | LhsFormat::Wide => {}
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes of one row: whole groups.
    fn row_bytes(&self) -> usize {
        self.depth.next_multiple_of(self.geometry.group) * self.geometry.lhs.size()
    }

    /// All rows as the input of a kernel, against the right panel of column `column`.
    pub(super) fn against(&self, rhs: &PackedRhs, column: usize) -> TileInput {
        let column_zeros = rhs.pairs(column);
        let zero_groups = if self.zeros.is_empty() { 0 } else { zero_groups(self.depth) };
        assert_eq!(column_zeros.is_empty(), zero_groups == 0, "zero points of one side alone");
        TileInput {
            rows: self.rows,
            groups: self.depth.div_ceil(self.geometry.group),
            lhs: self.bytes.as_ptr(),
            row_bytes: self.row_bytes(),
            rhs: rhs.panel(column),
            init: rhs.init(column).as_ptr(),
            zero_groups,
            row_zeros: self.zeros.as_ptr(),
            column_zeros: column_zeros.as_ptr(),
        }
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}

/// Right side: the keys of one head.
#[derive(Clone)]
pub(crate) struct PackedRhs {
    level: Level,
    geometry: Geometry,
    bytes: Aligned<u8>,
    rows: usize,
    depth: usize,
    /// What the sums of each column start from, padded to whole panels.
    init: Vec<i32>,
    /// Pairs for zero points, `[panels, groups, nr]`; none where all of them are 0.
    zeros: Vec<ZeroPair>,
}

/// Some whole panels of the right side, to be filled by one thread.
pub(crate) struct RhsChunk<'a> {
    geometry: Geometry,
    bytes: &'a mut [u8],
    init: &'a mut [i32],
    zeros: &'a mut [ZeroPair],
    depth: usize,
}

impl RhsChunk<'_> {
    /// Packs the rows from `first` of this chunk on: row-major codes, and the sum and zero point of each row.
    pub(crate) fn put(&mut self, first: usize, codes: &[i8], RowSums { sums, zeros }: RowSums<'_>) {
        assert_eq!(codes.len(), sums.len() * self.depth);
        let Geometry { nr, group, lhs, .. } = self.geometry;
        let init = &mut self.init[first..first + sums.len()];
        for (init, sum) in init.iter_mut().zip(sums) {
            *init = (-lhs.bias()).wrapping_mul(*sum);
        }
        if !self.zeros.is_empty() {
            assert_eq!(zeros.len(), sums.len());
            let groups = zero_groups(self.depth);
            for (row, (&sum, &zero)) in (first..).zip(sums.iter().zip(zeros)) {
                for group in 0..groups {
                    let pair = [factor(zero, group), part(sum.wrapping_neg(), group, groups)];
                    self.zeros[(row / nr * groups + group) * nr + row % nr] = pair;
                }
            }
        }
        let (depth, out) = (self.depth, &mut *self.bytes);
        spread(group, Spread { codes, depth, first, panel: nr, out });
    }
}

impl PackedRhs {
    /// Room for `rows` rows of `depth` codes, with zero points if any of their products is not 0;
    /// [`PackedRhs::put`] fills it.
    pub(crate) fn new(level: Level, rows: usize, depth: usize, with_zeros: bool) -> Self {
        let (geometry, bytes) = (level.int8_product().geometry, Aligned::default());
        let (init, zeros) = (Vec::new(), Vec::new());
        let mut packed = Self { level, geometry, bytes, rows, depth, init, zeros };
        packed.reset(rows, depth, with_zeros);
        packed
    }

    /// Room for other rows, in the place of those that are there.
    pub(crate) fn reset(&mut self, rows: usize, depth: usize, with_zeros: bool) {
        let Geometry { nr, group, .. } = self.geometry;
        (self.rows, self.depth) = (rows, depth);
        let used = packed_bytes((rows, depth), (nr, group), 1);
        self.bytes.grow(used);
        if !depth.is_multiple_of(group) {
            self.bytes[..used].fill(0); // the padding of the depth
        }
        let padded = rows.next_multiple_of(nr);
        self.init.resize(padded, 0);
        // What stands in the padding of columns does not matter.
        self.zeros.resize(if with_zeros { padded * zero_groups(depth) } else { 0 }, [0; 2]);
    }

    /// Packs the rows from `first` on: row-major codes, and the sum and zero point of each row.
    pub(crate) fn put(&mut self, first: usize, codes: &[i8], sums: RowSums<'_>) {
        assert!(first + sums.sums.len() <= self.rows);
        let (geometry, depth) = (self.geometry, self.depth);
        let (bytes, init) = (&mut *self.bytes, self.init.as_mut_slice());
        RhsChunk { geometry, bytes, init, zeros: &mut self.zeros, depth }.put(first, codes, sums);
    }

    /// The whole in chunks of `rows` rows, a multiple of the kernel's `nr`; the last may be
    /// shorter.
    pub(crate) fn chunks_mut(&mut self, rows: usize) -> impl Iterator<Item = RhsChunk<'_>> {
        assert!(rows > 0 && rows.is_multiple_of(self.geometry.nr));
        let (geometry, depth) = (self.geometry, self.depth);
        let row_bytes = depth.next_multiple_of(geometry.group);
        let (mut bytes, mut zeros) = (&mut *self.bytes, self.zeros.as_mut_slice());
        let chunk = move |init| {
            let bytes = take_front(&mut bytes, rows * row_bytes);
            let zeros = take_front(&mut zeros, rows * zero_groups(depth));
            RhsChunk { geometry, bytes, init, zeros, depth }
        };
        self.init.chunks_mut(rows).map(chunk)
    }

    /// The codes of a row, as [`PackedRhs::put`] got them.
    pub(crate) fn get(&self, row: usize, codes: &mut [i8]) {
        assert!(row < self.rows && codes.len() == self.depth);
        let Geometry { nr, group, .. } = self.geometry;
        let panel = row / nr * nr * self.depth.div_ceil(group) * group;
        // Without a depth there are no bytes.
        let bytes = self.bytes.get(panel + row % nr * group..).unwrap_or_default();
        let groups = bytes.chunks(nr * group);
        for (codes, bytes) in codes.chunks_mut(group).zip(groups) {
            codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = byte as i8);
        }
    }

    /// `[panels, groups, nr, group]`: the order in which all codes lie in memory.
    pub(crate) fn layout(&self) -> [usize; 4] {
        let Geometry { nr, group, .. } = self.geometry;
        [self.rows.div_ceil(nr), self.depth.div_ceil(group), nr, group]
    }

    /// All codes in the order of [`PackedRhs::layout`], padding included.
    pub(crate) fn packed(&self) -> &[u8] {
        &self.bytes[..self.layout().iter().product()]
    }

    /// Takes over codes in the order of [`PackedRhs::layout`]; returns the sum of each row.
    pub(crate) fn put_packed(&mut self, packed: &[u8]) -> Vec<i32> {
        let [panels, groups, nr, group] = self.layout();
        self.bytes[..panels * groups * nr * group].copy_from_slice(packed);
        let mut sums = vec![0i32; panels * nr];
        if groups > 0 {
            let panels = packed.chunks_exact(groups * nr * group);
            for (sums, panel) in sums.chunks_exact_mut(nr).zip(panels) {
                for codes in panel.chunks_exact(nr * group) {
                    for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(group)) {
                        *sum += codes.iter().map(|&code| i32::from(code as i8)).sum::<i32>();
                    }
                }
            }
        }
        let bias = self.geometry.lhs.bias();
        let starts = self.init.iter_mut().zip(&sums);
        starts.for_each(|(init, sum)| *init = (-bias).wrapping_mul(*sum));
        sums.truncate(self.rows);
        sums
    }

    /// The pairs for zero points of that panel, if there are any.
    fn pairs(&self, row: usize) -> &[ZeroPair] {
        if self.zeros.is_empty() {
            return &[];
        }
        let groups = zero_groups(self.depth);
        &self.zeros[row * groups..(row + self.geometry.nr) * groups]
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The panel that starts at row `row`, a multiple of the kernel's `nr`.
    fn panel(&self, row: usize) -> *const i8 {
        let Geometry { nr, group, .. } = self.geometry;
        assert!(row < self.rows && row.is_multiple_of(nr));
        let panel_bytes = nr * self.depth.div_ceil(group) * group;
        // SAFETY: `packed_bytes` made room for ceil(rows / nr) panels of this size, and row < rows.
        unsafe { self.bytes.as_ptr().add(row / nr * panel_bytes).cast() }
    }

    /// The `nr` starting sums of that panel.
    fn init(&self, row: usize) -> &[i32] {
        &self.init[row..row + self.geometry.nr]
    }

    pub(crate) fn level(&self) -> Level {
        self.level
    }

    pub(super) fn depth(&self) -> usize {
        self.depth
    }
}

/// The first `count` elements, or as many as there are, which leave the slice.
fn take_front<'a, T>(slice: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let whole = std::mem::take(slice);
    let (front, rest) = whole.split_at_mut(count.min(whole.len()));
    *slice = rest;
    front
}

footprint!(PackedLhs: bytes, zeros);

footprint!(PackedRhs: bytes, init, zeros);
