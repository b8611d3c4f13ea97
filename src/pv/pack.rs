//! Values in the order a kernel reads them.

use super::int8::{Channels, Dequantize, Int8Row, LARGEST, code, dequantize};
use super::kernel::{KEY_GROUP, LANES, PvKernel, PvPanel, VECTORS, ValueFormat, bf16_bits};
use crate::aligned::AlignedBytes;
use crate::simd::widest;
use std::borrow::Cow;
use std::ops::Range;

/// Rows whose int32 sums are on the stack at a time.
const INT8_ROWS: usize = 48;

/// Most keys of one int8 call: `255 * 127` times as many still fit an i32.
const INT8_KEYS: usize = 1 << 16;

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
            self.fill.copy_from_slice(&channels.offsets);
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
            let channels = panel.start..panel.end.min(self.depth);
            let of = |all: fn(&Channels) -> &Vec<f32>| match &self.channels {
                Some(known) => &all(known)[channels.clone()],
                None => &[],
            };
            let job = Spread {
                kernel: (self.kernel.format(), self.kernel.group(), self.kernel.bias()),
                rows: &rows,
                depth: self.depth,
                channels: channels.clone(),
                fill: &self.fill,
                int8: (of(|known| &known.offsets), of(|known| &known.inverses)),
                out: &mut self.bytes.as_mut_slice()[at..],
                width: panel.len(),
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

    /// [`PackedValues::accumulate_f32`] for int8 probabilities, which are codes; `rows` says what
    /// those of each row stand for. At most 65,536 keys a call.
    pub(crate) fn accumulate_int8(
        &self,
        keys: Range<usize>,
        probs: &[u8],
        stride: usize,
        rows: &[Int8Row],
        out: &mut [f32],
    ) {
        let channels = self.channels.as_ref().expect("int8 values");
        assert!(keys.len() <= INT8_KEYS, "int32 sums over {} keys may overflow", keys.len());
        let width = self.width();
        assert_eq!(out.len(), rows.len() * width);
        let mut sums = [0i32; INT8_ROWS * LANES * VECTORS];
        let blocks = rows.chunks(INT8_ROWS).zip(out.chunks_mut((INT8_ROWS * width).max(1)));
        for (i, (rows, out)) in blocks.enumerate() {
            for panel in self.panels() {
                let sums = &mut sums[..rows.len() * panel.len()];
                sums.fill(0);
                let probs = &probs[i * INT8_ROWS * stride..];
                self.panel(&panel, &keys, (probs, stride), (sums, panel.len()));
                let known = panel.start..panel.end.min(self.depth);
                dequantize(Dequantize {
                    sums,
                    bias: self.kernel.bias(),
                    rows,
                    scales: &channels.scales[known.clone()],
                    offsets: &channels.offsets[known],
                    out: &mut out[panel.start..],
                    strides: (panel.len(), width),
                });
            }
        }
    }

    /// Every panel, into f32 sums.
    fn accumulate<P>(&self, keys: Range<usize>, probs: &[P], stride: usize, out: &mut [f32]) {
        let width = self.width();
        if out.is_empty() {
            return;
        }
        for panel in self.panels() {
            self.panel(&panel, &keys, (probs, stride), (&mut out[panel.start..], width));
        }
    }

    /// Adds to the sums of one panel's channels; the last row of `sums` may end with them.
    fn panel<P, S>(
        &self,
        panel: &Range<usize>,
        keys: &Range<usize>,
        (probs, stride): (&[P], usize),
        (sums, sums_stride): (&mut [S], usize),
    ) {
        let group = self.kernel.group();
        let groups = keys.len().div_ceil(group);
        let rows = sums.len().div_ceil(sums_stride);
        assert!(keys.start.is_multiple_of(KEY_GROUP) && keys.end <= self.keys, "{keys:?}");
        assert!(size_of::<P>() == self.kernel.format().size() && size_of::<S>() == 4);
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
            sums: sums.as_mut_ptr().cast(),
            sums_stride: sums_stride * size_of::<S>(),
        };
        // SAFETY: `new` asserted that the kernel is available. Whole groups of probabilities and
        // the panel's sums are in every row, as just asserted, with the sizes of the format. From
        // `at` on, the panel holds the groups of all keys up to `keys.end <= self.keys`.
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
    channels: Range<usize>,
    /// The row after the last one.
    fill: &'a [f32],
    /// Offsets and inverse scales of int8 channels.
    int8: (&'a [f32], &'a [f32]),
    out: &'a mut [u8],
    /// Channels of the panel, padded.
    width: usize,
}

#[inline(always)]
fn spread(job: Spread<'_>) {
    let (format, group, bias) = job.kernel;
    let (offsets, inverses) = job.int8;
    let bf16 = |_: usize, x: f32| u64::from(bf16_bits(x));
    let int8 = |c: usize, x: f32| u64::from(code(x, offsets[c], inverses[c]) as u8 ^ bias);
    match (format, group) {
        (ValueFormat::F32, _) => interleave::<1, 4>(job, |_, x| u64::from(x.to_bits())),
        (ValueFormat::Bf16, 2) => interleave::<2, 4>(job, bf16),
        (ValueFormat::Bf16, _) => interleave::<4, 8>(job, bf16),
        (ValueFormat::Int8, 4) => interleave::<4, 4>(job, int8),
        (ValueFormat::Int8, _) => interleave::<8, 8>(job, int8),
    }
}

/// Groups of `G` rows: for every channel, `BYTES / G` bytes of each row, the first row's first.
#[inline(always)]
fn interleave<const G: usize, const BYTES: usize>(
    job: Spread<'_>,
    element: impl Fn(usize, f32) -> u64,
) {
    let groups = job.rows.chunks(G * job.depth);
    let outs = job.out.as_chunks_mut::<BYTES>().0.chunks_exact_mut(job.width);
    for (group, out) in groups.zip(outs) {
        let mut rows = [&job.fill[job.channels.clone()]; G];
        for (row, values) in rows.iter_mut().zip(group.chunks_exact(job.depth)) {
            *row = &values[job.channels.clone()];
        }
        for (c, out) in out[..job.channels.len()].iter_mut().enumerate() {
            let mut word = 0;
            for (g, row) in rows.iter().enumerate() {
                word |= element(c, row[c]) << (8 * BYTES / G * g);
            }
            out.copy_from_slice(&word.to_le_bytes()[..BYTES]);
        }
    }
}
