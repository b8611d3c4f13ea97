//! Values in the order a kernel reads them.

use super::int8::{Channels, Dequantize, LARGEST, code, dequantize};
use super::kernel::{
    Int8Run, KEY_GROUP, LANES, PvKernel, PvPanel, RUN, VECTORS, ValueFormat, bf16_bits,
};
use crate::aligned::AlignedBytes;
use crate::simd::{each_lane, lanes, widest};
use std::borrow::Cow;
use std::ops::{BitOr, Range, Shl};

/// Rows whose int8 sums are on the stack at a time.
const INT8_ROWS: usize = 24;

/// The values of one head, `[N, Dv]`.
///
/// Rows that the format cannot hold as finite numbers take no part in the product and are kept
/// beside, so that a NaN of a masked key does not leak through `0 * NaN`.
pub(crate) struct PackedValues {
    kernel: &'static dyn PvKernel,
    bytes: AlignedBytes,
    keys: usize,
    depth: usize,
    /// What stands for a row that is not there: zeros, or the offsets of int8 channels.
    fill: Vec<f32>,
    /// Of int8 values only.
    channels: Option<Channels>,
    exceptions: Vec<(usize, Vec<f32>)>,
}

impl PackedValues {
    /// Room for `keys` rows of `depth` values: for int8, [`PackedValues::observe`] has to see all
    /// of them; then [`PackedValues::put`] fills it.
    pub(crate) fn new(kernel: &'static dyn PvKernel, keys: usize, depth: usize) -> Self {
        assert!(kernel.is_available(), "{} cannot run on this machine", kernel.name());
        assert!(KEY_GROUP.is_multiple_of(kernel.group()), "groups of {}", kernel.group());
        let mut packed = Self {
            kernel,
            bytes: AlignedBytes::zeroed(0),
            keys,
            depth,
            fill: Vec::new(),
            channels: None,
            exceptions: Vec::new(),
        };
        packed.reset(keys, depth);
        packed
    }

    /// Room for other values, in the place of those that are there. Padded channels may hold
    /// anything: their sums are dropped.
    pub(crate) fn reset(&mut self, keys: usize, depth: usize) {
        let format = self.kernel.format();
        let padded = keys.next_multiple_of(self.kernel.group()) * depth.next_multiple_of(LANES);
        self.bytes.grow(padded * format.size());
        (self.keys, self.depth) = (keys, depth);
        self.fill.clear();
        self.fill.resize(depth, 0.0);
        self.channels = (format == ValueFormat::Int8).then(|| Channels::new(depth));
        self.exceptions.clear();
    }

    /// What multiplies them.
    pub(crate) fn kernel(&self) -> &'static dyn PvKernel {
        self.kernel
    }

    /// Bytes of memory in use.
    pub(crate) fn memory(&self) -> usize {
        self.bytes.len()
    }

    /// Channels, padded to whole vectors: the stride of the sums.
    pub(crate) fn width(&self) -> usize {
        self.depth.next_multiple_of(LANES)
    }

    /// The keys whose values are not finite (in the format), with what they add to the sums for a
    /// probability of 1.
    pub(crate) fn exceptions(&self) -> &[(usize, Vec<f32>)] {
        &self.exceptions
    }

    /// Whether [`PackedValues::observe`] is wanted.
    pub(crate) fn needs_ranges(&self) -> bool {
        self.channels.is_some()
    }

    /// Widens the range of every int8 channel to these rows; does nothing for other formats.
    pub(crate) fn observe(&mut self, rows: &[f32]) {
        if let Some(channels) = &mut self.channels {
            channels.observe(rows);
            self.fill.copy_from_slice(&channels.offsets[..self.depth]);
        }
    }

    /// Packs the rows from `first` on, which is a multiple of [`KEY_GROUP`]; `rows` is row-major.
    pub(crate) fn put(&mut self, first: usize, rows: &[f32]) {
        if self.depth == 0 {
            return;
        }
        let end = first + rows.len() / self.depth;
        assert!(first.is_multiple_of(KEY_GROUP) && end <= self.keys, "{first}..{end}");
        let limit = match self.kernel.format() {
            ValueFormat::F32 => f32::MAX,
            ValueFormat::Bf16 => half::bf16::MAX.to_f32(),
            ValueFormat::Int8 => LARGEST,
        };
        let fits = |rows: &[f32]| widest!(all_below, (rows, limit), (&[f32], f32) => bool);
        let mut rows = Cow::Borrowed(rows);
        if !fits(&rows) {
            for (key, row) in (first..).zip(rows.to_mut().chunks_exact_mut(self.depth)) {
                if !fits(row) {
                    let added = row.iter().zip(&self.fill).map(|(x, fill)| x - fill).collect();
                    self.exceptions.push((key, added));
                    row.copy_from_slice(&self.fill);
                }
            }
        }
        for panel in self.panels() {
            let at = self.panel_start(&panel, first);
            let int8 = match &self.channels {
                Some(known) => (&known.offsets[panel.clone()], &known.inverses[panel.clone()]),
                None => Default::default(),
            };
            let job = Spread {
                kernel: (self.kernel.format(), self.kernel.group(), self.kernel.bias()),
                rows: &rows,
                depth: self.depth,
                channels: panel,
                fill: &self.fill,
                int8,
                out: &mut self.bytes.as_mut_slice()[at..],
            };
            widest!(spread, job, Spread<'_> => ());
        }
    }

    /// The channels of every panel: at most 64 in each, as even as can be.
    fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let vectors = self.depth.div_ceil(LANES);
        let count = vectors.div_ceil(VECTORS);
        (0..count).map(move |i| vectors * i / count * LANES..vectors * (i + 1) / count * LANES)
    }

    /// Bytes before the group that `key` starts, in the panel of these channels.
    fn panel_start(&self, panel: &Range<usize>, key: usize) -> usize {
        let keys = self.keys.next_multiple_of(self.kernel.group());
        (panel.start * keys + panel.len() * key) * self.kernel.format().size()
    }

    /// `out[r, c] += sum_j probs[r, j] * values[j, c]` for `j` in `keys`, `out` row-major with
    /// [`PackedValues::width`] columns; `probs[r * stride]` belongs to the first key.
    ///
    /// `keys` starts at a multiple of [`KEY_GROUP`]. Each row of `probs` is filled up with zeros to
    /// another one.
    pub(crate) fn accumulate_f32(
        &self,
        keys: Range<usize>,
        probs: &[f32],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.kernel.format(), ValueFormat::F32);
        self.accumulate(keys, probs, stride, out);
    }

    /// [`PackedValues::accumulate_f32`] for bf16 probabilities.
    pub(crate) fn accumulate_bf16(
        &self,
        keys: Range<usize>,
        probs: &[u16],
        stride: usize,
        out: &mut [f32],
    ) {
        assert_eq!(self.kernel.format(), ValueFormat::Bf16);
        self.accumulate(keys, probs, stride, out);
    }

    /// [`PackedValues::accumulate_f32`] for int8 probabilities, which are codes; `runs` says what
    /// they stand for: [`RUN`] keys each, all runs of a row before those of the next.
    pub(crate) fn accumulate_int8(
        &self,
        keys: Range<usize>,
        probs: &[u8],
        stride: usize,
        runs: &[Int8Run],
        out: &mut [f32],
    ) {
        let (width, per_row) = (self.width(), keys.len().div_ceil(RUN));
        if per_row == 0 || width == 0 {
            return;
        }
        assert_eq!(out.len() / width * per_row, runs.len(), "{per_row} runs in each row");
        let blocks = out.chunks_mut(INT8_ROWS * width).zip(runs.chunks(INT8_ROWS * per_row));
        for (i, (out, runs)) in blocks.enumerate() {
            let probs = &probs[i * INT8_ROWS * stride..];
            for panel in self.panels() {
                self.int8_panel(&panel, &keys, (probs, stride), runs, out);
            }
        }
    }

    /// Up to [`INT8_ROWS`] rows of one panel.
    fn int8_panel(
        &self,
        panel: &Range<usize>,
        keys: &Range<usize>,
        (probs, stride): (&[u8], usize),
        runs: &[Int8Run],
        out: &mut [f32],
    ) {
        let channels = self.channels.as_ref().expect("int8 values");
        let per_row = keys.len().div_ceil(RUN);
        let (rows, width) = (runs.len() / per_row, panel.len());
        let mut sums = [0f32; INT8_ROWS * LANES * VECTORS];
        let sums = &mut sums[..rows * width];
        self.panel(panel, keys, (probs, stride), runs, (sums, width));
        let job = Dequantize {
            sums,
            runs,
            per_row,
            scales: &channels.scales[panel.clone()],
            offsets: &channels.offsets[panel.clone()],
            out: &mut out[panel.start..],
            stride: self.width(),
        };
        widest!(dequantize, job, Dequantize<'_> => ());
    }

    /// Every panel of a float format.
    fn accumulate<P>(&self, keys: Range<usize>, probs: &[P], stride: usize, out: &mut [f32]) {
        let width = self.width();
        if out.is_empty() {
            return;
        }
        for panel in self.panels() {
            self.panel(&panel, &keys, (probs, stride), &[], (&mut out[panel.start..], width));
        }
    }

    /// Adds to the sums of one panel's channels; the last row of `sums` may end with them.
    fn panel<P>(
        &self,
        panel: &Range<usize>,
        keys: &Range<usize>,
        (probs, stride): (&[P], usize),
        runs: &[Int8Run],
        (sums, sums_stride): (&mut [f32], usize),
    ) {
        let (format, group) = (self.kernel.format(), self.kernel.group());
        let groups = keys.len().div_ceil(group);
        let rows = sums.len().div_ceil(sums_stride);
        let runs_stride = if format == ValueFormat::Int8 { keys.len().div_ceil(RUN) } else { 0 };
        assert!(keys.start.is_multiple_of(KEY_GROUP) && keys.end <= self.keys, "{keys:?}");
        assert!(size_of::<P>() == format.size() && runs.len() == rows * runs_stride);
        assert!(stride >= groups * group && probs.len() >= (rows - 1) * stride + groups * group);
        assert!(sums_stride >= panel.len() && sums.len() >= (rows - 1) * sums_stride + panel.len());
        let at = self.panel_start(panel, keys.start);
        let job = PvPanel {
            rows,
            vectors: panel.len() / LANES,
            groups,
            probs: probs.as_ptr().cast(),
            probs_stride: stride * size_of::<P>(),
            // SAFETY: the buffer holds all groups of all panels, and `keys` are inside.
            values: unsafe { self.bytes.as_ptr().add(at) },
            runs: runs.as_ptr(),
            runs_stride,
            sums: sums.as_mut_ptr(),
            sums_stride,
        };
        // SAFETY: `new` asserted that the kernel is available. Whole groups of probabilities, the
        // runs of all keys and the panel's sums are in every row, as just asserted, probabilities
        // with the size of the format. From `at` on, the panel holds the groups of all keys up to
        // `keys.end <= self.keys`.
        unsafe { self.kernel.panel(job) };
    }
}

/// Whether every magnitude is at most `limit` (NaN is not).
#[inline(always)]
fn all_below((row, limit): (&[f32], f32)) -> bool {
    row.iter().fold(true, |all, x| all & (x.abs() <= limit))
}

/// Rows of values, and the place of their groups in one panel.
struct Spread<'a> {
    /// Format, keys in a group, bias of int8 codes.
    kernel: (ValueFormat, usize, u8),
    rows: &'a [f32],
    depth: usize,
    /// Of the panel, padded to whole vectors.
    channels: Range<usize>,
    /// The row after the last one.
    fill: &'a [f32],
    /// Offsets and inverse scales of int8 channels, padded like these.
    int8: (&'a [f32], &'a [f32]),
    out: &'a mut [u8],
}

#[inline(always)]
fn spread(job: Spread<'_>) {
    let (format, group, bias) = job.kernel;
    let (offsets, inverses) = job.int8;
    let f32 = |_: usize, x: [f32; LANES]| each_lane(|i| x[i].to_bits());
    let bf16 = |_: usize, x: [f32; LANES]| each_lane(|i| bf16_bits(x[i]).into());
    let int8 = |at: usize, x: [f32; LANES]| {
        let (offset, inverse) = (lanes(offsets, at), lanes(inverses, at));
        each_lane(|i| u32::from(code(x[i], offset[i], inverse[i]) as u8 ^ bias))
    };
    match (format, group) {
        (ValueFormat::F32, _) => interleave::<1, u32>(job, f32),
        (ValueFormat::Bf16, 2) => interleave::<2, u32>(job, bf16),
        (ValueFormat::Bf16, _) => interleave::<4, u64>(job, bf16),
        (ValueFormat::Int8, 1) => interleave::<1, u8>(job, int8),
        (ValueFormat::Int8, 4) => interleave::<4, u32>(job, int8),
        (ValueFormat::Int8, _) => interleave::<8, u64>(job, int8),
    }
}

/// What one channel of a group of keys becomes.
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
words!(u8, u32, u64);

/// Groups of `G` rows, a word for each channel; the first row is in the lowest bits, which come
/// first in memory.
#[inline(always)]
fn interleave<const G: usize, W: Word>(
    job: Spread<'_>,
    elements: impl Fn(usize, [f32; LANES]) -> [u32; LANES],
) {
    let known = job.channels.start..job.channels.end.min(job.depth);
    let groups = job.rows.chunks(G * job.depth);
    let outs = job.out.chunks_exact_mut(job.channels.len() * size_of::<W>());
    for (group, out) in groups.zip(outs) {
        let mut rows = [&job.fill[known.clone()]; G];
        for (row, values) in rows.iter_mut().zip(group.chunks_exact(job.depth)) {
            *row = &values[known.clone()];
        }
        for (i, out) in out.chunks_exact_mut(LANES * size_of::<W>()).enumerate() {
            let mut words = [W::default(); LANES];
            for (g, row) in rows.iter().enumerate() {
                let elements = elements(i * LANES, lanes(row, i * LANES));
                let shift = 8 * size_of::<W>() / G * g;
                words = each_lane(|c| words[c] | W::of(elements[c]) << shift);
            }
            for (word, out) in words.iter().zip(out.chunks_exact_mut(size_of::<W>())) {
                word.write(out);
            }
        }
    }
}
