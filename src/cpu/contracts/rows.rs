//! Loops over rows of f32: codes with a scale a row, rotations, dot products, and transposing.

use super::LANES;
use crate::memory::footprint;

/// Some rows of `depth` f32 each, the same distance apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    data: &'a [f32],
    count: usize,
    depth: usize,
    stride: usize,
}

impl<'a> Rows<'a> {
    /// `count` rows, `stride` elements from one start to the next; 0 repeats one row.
    pub(crate) fn new(data: &'a [f32], count: usize, depth: usize, stride: usize) -> Self {
        let needed = count.checked_sub(1).map_or(Some(0), |before| {
            before.checked_mul(stride).and_then(|before| before.checked_add(depth))
        });
        assert!(needed.is_some_and(|needed| data.len() >= needed));
        Self { data, count, depth, stride }
    }

    /// Rows that follow each other, `depth` at least 1.
    pub(crate) fn contiguous(data: &'a [f32], depth: usize) -> Self {
        assert!(depth > 0 && data.len().is_multiple_of(depth));
        Self::new(data, data.len() / depth, depth, depth)
    }

    /// One row.
    pub(crate) fn one(row: &'a [f32]) -> Self {
        Self::new(row, 1, row.len(), 0)
    }

    /// How many rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// Elements from the start of a row to that of the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Everything from the first element of the first row on.
    pub(crate) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// All rows as one slice: where they lie if they follow each other, else copied to `buffer`.
    pub(crate) fn as_slice<'b>(self, buffer: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        if self.stride == self.depth || self.count <= 1 {
            return &self.data[..self.count * self.depth];
        }
        buffer.clear();
        self.iter().for_each(|row| buffer.extend_from_slice(row));
        buffer
    }

    /// Some of the rows.
    pub(crate) fn part(&self, rows: std::ops::Range<usize>) -> Self {
        let data = self.data.get(rows.start * self.stride..).unwrap_or_default();
        Self::new(data, rows.len(), self.depth, self.stride)
    }

    /// The rows, first to last.
    #[inline(always)]
    pub(crate) fn iter(self) -> impl Iterator<Item = &'a [f32]> {
        (0..self.count).map(move |row| self.row(row))
    }

    /// One row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..self.depth]
    }
}

/// Codes of a block of rows.
pub(crate) struct BlockCodes<'a> {
    /// `[rows, depth]`.
    pub codes: &'a mut [i8],
    /// One a row. NaN for a row that holds NaN or infinity; its codes are 0.
    pub scales: &'a mut [f32],
    /// One a row.
    pub zeros: &'a mut [i32],
    /// The sum of the codes of each row.
    pub sums: &'a mut [i32],
}

impl BlockCodes<'_> {
    /// # Panics
    /// Unless there is room for the codes of `rows`.
    pub(crate) fn check(&self, rows: Rows<'_>) {
        let count = rows.count();
        assert_eq!(Some(self.codes.len()), count.checked_mul(rows.depth()));
        let lens = [self.scales.len(), self.zeros.len(), self.sums.len()];
        assert!(lens.iter().all(|&len| len == count), "{lens:?} for {count} rows");
    }
}

/// The range of each row, widened to hold 0. One end is infinite or NaN for a row that is not finite.
///
/// As signed integers, the bits of numbers from 0 on have the order of the numbers, and those of negative
/// ones are less; as unsigned integers, those of negative ones are the larger the smaller the number, and more
/// than all others. So two integer maxima find both ends, and keep infinity and NaN.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct RowRanges {
    /// The smallest element, or -0 where none is negative.
    pub low: Vec<f32>,
    /// The largest, or 0 where none is positive.
    pub high: Vec<f32>,
}

impl RowRanges {
    /// Room for as many rows.
    pub(crate) fn resize(&mut self, rows: usize) {
        self.low.resize(rows, 0.0);
        self.high.resize(rows, 0.0);
    }

    /// The largest magnitude of each row, infinite or NaN for one that is not finite.
    pub(crate) fn magnitudes(&self) -> impl Iterator<Item = f32> {
        let magnitude = |x: &f32| x.to_bits() & 0x7fff_ffff;
        let ends = self.low.iter().zip(&self.high);
        ends.map(move |(low, high)| f32::from_bits(magnitude(low).max(magnitude(high))))
    }
}

footprint!(RowRanges: low, high);

/// Rows on their way to codes.
pub(crate) struct Condition<'a> {
    pub rows: Rows<'a>,
    /// What is subtracted from each of them, if anything.
    pub mean: Option<&'a [f32]>,
    /// Whether they are rotated then.
    pub rotate: bool,
    /// `[rows, depth]`, what comes of them.
    pub values: &'a mut [f32],
    /// The range of each of those.
    pub ranges: &'a mut RowRanges,
}

/// Rows on their way to columns.
pub(crate) struct Transpose<'a> {
    pub rows: Rows<'a>,
    /// Multiplies every element.
    pub factor: f32,
    /// Element `k` of row `i` comes to `k * width + i`, as bytes; up to a multiple of 16 rows, what is missing
    /// repeats the last.
    pub columns: &'a mut [[u8; size_of::<f32>()]],
    pub width: usize,
}

impl Transpose<'_> {
    /// # Panics
    /// Unless there is a place for everything.
    pub(crate) fn check(&self) {
        let Self { rows, width, .. } = self;
        let places = rows.count().next_multiple_of(LANES);
        let needed = rows.depth().checked_sub(1).map_or(Some(0), |before| {
            before.checked_mul(*width).and_then(|before| before.checked_add(places))
        });
        assert!(places <= *width && needed.is_some_and(|needed| self.columns.len() >= needed));
    }
}

/// Elements of the largest block that is rotated: enough to spread an outlier, and a block fits the
/// registers.
pub(crate) const ROTATED: usize = 128;

/// One instruction set's way. All give the same bits.
#[derive(Debug)]
pub(crate) struct RowKernels {
    /// Name in reports.
    pub name: &'static str,
    /// Codes with a scale a row, and a zero point if they are affine: `(affine, rows, ranges, out)`, with the
    /// range of each row where it is known. Lengths are checked by the caller.
    ///
    /// # Safety
    /// The instructions are there; so for the others.
    pub quantize: unsafe fn(bool, Rows<'_>, Option<&RowRanges>, BlockCodes<'_>),
    /// Subtracts a mean and rotates, in one pass.
    pub condition: unsafe fn(Condition<'_>),
    /// Multiplies rows of `depth` elements by the matrix of [`Rotation`](crate::quant::Rotation), in place:
    /// `(depth, rows)`, of which only whole rows are there. A block is multiplied by its factor first; then
    /// come the sums and differences of elements that are 1, 2, 4 .. apart, each rounded.
    pub rotate: unsafe fn(usize, &mut [f32]),
    /// The dot product of every vector with every row: `(rows, vectors, out)`, `[vectors, rows]`. Sums of 16
    /// lanes, each product and each addition rounded, that are added up as
    /// [`sum_lanes`](crate::cpu::plain::lanes::sum_lanes) does.
    pub dots: unsafe fn(Rows<'_>, Rows<'_>, &mut [f32]),
    /// Makes columns of rows.
    pub transpose: unsafe fn(Transpose<'_>),
}
