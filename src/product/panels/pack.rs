//! A matrix in the order a kernel reads it.

use super::order::{Spread, spread};
use super::runs::RunScales;
use crate::cpu::Level;
use crate::cpu::contracts::{Format, GROUP, LANES, PanelProduct, RUN, Rows, Transpose};
use crate::cpu::plain::widest;
use crate::memory::{Aligned, Footprint};
use std::borrow::Cow;
use std::ops::Range;

/// The largest magnitude, 2^95, of what is added up with factors of at most 1: 2^32 of them are finite by
/// far, and so is the width of a range between two of them. Rows of a [`PackedMatrix`] that hold more stand
/// beside it.
pub(crate) const LARGEST: f32 = f32::from_bits((127 + 95) << 23);

/// A matrix `[K, C]` for products `[M, K] x [K, C]`: the values of a head (K keys, C channels), its keys
/// transposed (K channels, C keys), or the weights of a linear layer, transposed.
///
/// Rows with a number beyond [`LARGEST`] or NaN take no part in the product and are kept beside, so that sums
/// are finite, and a NaN of a masked key does not leak through `0 * NaN`.
pub(crate) struct PackedMatrix {
    pub(super) level: Level,
    pub(super) product: &'static PanelProduct,
    pub(super) bytes: Aligned<u8>,
    pub(super) depth: usize,
    pub(super) columns: usize,
    /// Whether all panels but the last are as wide as can be, so that they start where one expects;
    /// otherwise they are as even as can be.
    pub(super) aligned: bool,
    /// Of int8 and int16 only.
    pub(super) run_scales: Option<RunScales>,
    exceptions: Vec<(usize, Vec<f32>)>,
}

impl PackedMatrix {
    /// Room for `depth` rows of `columns` numbers: [`PackedMatrix::put`] or [`PackedMatrix::put_columns`]
    /// fills it.
    ///
    /// # Panics
    /// For a format that the machine does not multiply, and a matrix larger than the address space.
    pub(crate) fn new(level: Level, format: Format, depth: usize, columns: usize) -> Self {
        let product = level.panels(format).expect("a format that the machine multiplies");
        let mut packed = Self {
            level,
            product,
            bytes: Aligned::default(),
            depth,
            columns,
            aligned: false,
            run_scales: RunScales::new(product.format),
            exceptions: Vec::new(),
        };
        packed.reset(depth, columns);
        packed
    }

    /// Room for other numbers, in the place of those that are there. Padded columns may hold
    /// anything: their sums are dropped.
    pub(crate) fn reset(&mut self, depth: usize, columns: usize) {
        let PanelProduct { format, group, .. } = *self.product;
        let padded =
            depth.checked_next_multiple_of(group).zip(columns.checked_next_multiple_of(LANES));
        let bytes = padded
            .and_then(|(depth, columns)| depth.checked_mul(columns)?.checked_mul(format.size()));
        self.bytes.grow(bytes.expect("a matrix larger than the address space"));
        (self.depth, self.columns, self.aligned) = (depth, columns, false);
        if let Some(scales) = &mut self.run_scales {
            scales.reset(depth, columns);
        }
        self.exceptions.clear();
    }

    /// Room for columns that are put as rows, and of which parts are multiplied.
    pub(crate) fn reset_columns(&mut self, depth: usize, columns: usize) {
        self.reset(depth, columns);
        self.aligned = true;
    }

    /// The level that it is packed for.
    pub(crate) fn level(&self) -> Level {
        self.level
    }

    /// How it is stored.
    pub(crate) fn format(&self) -> Format {
        self.product.format
    }

    /// K.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    /// C.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Columns, padded to whole vectors: the stride of the sums.
    pub(crate) fn width(&self) -> usize {
        self.columns.next_multiple_of(LANES)
    }

    /// Columns in a panel, at most; columns that are asked for start at a multiple of this.
    pub(crate) fn panel_width(&self) -> usize {
        self.product.vectors * LANES
    }

    /// The rows with a number beyond [`LARGEST`] or NaN, with what they add to the sums for a 1 on the
    /// left side.
    pub(crate) fn exceptions(&self) -> &[(usize, Vec<f32>)] {
        &self.exceptions
    }

    /// Packs the rows from `first` on, which is a multiple of [`GROUP`], and for integers of [`RUN`], as is
    /// their number unless they are the last; `rows` is row-major.
    pub(crate) fn put(&mut self, first: usize, rows: &[f32]) {
        if self.columns == 0 {
            return;
        }
        let end = first + rows.len() / self.columns;
        assert!(first.is_multiple_of(GROUP) && end <= self.depth, "{first}..{end}");
        let rows = self.without_exceptions(first, rows);
        if self.run_scales.is_none() {
            return self.spread(first, &rows);
        }
        assert!(first.is_multiple_of(RUN) && (end == self.depth || end.is_multiple_of(RUN)));
        for (run, rows) in (first / RUN..).zip(rows.chunks(RUN * self.columns)) {
            let scales = self.run_scales.as_mut().expect("integers");
            let largest = scales.observe(run, rows, self.columns);
            let far = scales.outliers(rows, self.columns, largest);
            if far.is_empty() {
                self.spread(run * RUN, rows);
                continue;
            }
            let rows = self.keep_beside(run * RUN, rows, far);
            self.run_scales.as_mut().expect("integers").observe(run, &rows, self.columns);
            self.spread(run * RUN, &rows);
        }
    }

    /// Packs all rows of an int16 matrix, row-major and finite; none of them is kept beside.
    pub(crate) fn put_runs(&mut self, rows: &[f32]) {
        assert_eq!(rows.len(), self.depth * self.columns);
        if rows.is_empty() {
            return;
        }
        for (run, rows) in rows.chunks(RUN * self.columns).enumerate() {
            self.run_scales.as_mut().expect("int16").observe(run, rows, self.columns);
            self.spread(run * RUN, rows);
        }
    }

    /// Rows from `first` on, those that the format cannot hold kept beside.
    fn without_exceptions<'a>(&mut self, first: usize, rows: &'a [f32]) -> Cow<'a, [f32]> {
        let fits = |rows: &[f32]| widest!(all_below, (rows, LARGEST), (&[f32], f32) => bool);
        if fits(rows) {
            return Cow::Borrowed(rows);
        }
        let kept = rows.chunks_exact(self.columns).enumerate().filter(|(_, row)| !fits(row));
        let kept = kept.map(|(row, _)| row).collect();
        Cow::Owned(self.keep_beside(first, rows, kept))
    }

    /// The rows with zeros for those that are kept beside.
    fn keep_beside(&mut self, first: usize, rows: &[f32], kept: Vec<usize>) -> Vec<f32> {
        let mut rows = rows.to_vec();
        for index in kept {
            let row = &mut rows[index * self.columns..][..self.columns];
            self.exceptions.push((first + index, row.to_vec()));
            row.fill(0.0);
        }
        rows
    }

    /// Writes rows that the format holds to their place in every panel; in integers those of the run that was
    /// observed last.
    fn spread(&mut self, first: usize, rows: &[f32]) {
        for panel in self.panels() {
            let at = self.panel_start(&panel, first);
            let inverses = match &self.run_scales {
                Some(known) => &known.inverses()[panel.clone()],
                None => Default::default(),
            };
            let job = Spread {
                product: self.product,
                rows,
                width: self.columns,
                columns: panel,
                inverses,
                out: &mut self.bytes[at..],
            };
            widest!(spread, job, Spread<'_> => ());
        }
    }

    /// Packs the columns from `first` on, a multiple of [`PackedMatrix::panel_width`], each a row of
    /// `columns` and times `factor`. Of f32 only; numbers that are not finite are packed as they are.
    pub(crate) fn put_columns(&mut self, first: usize, columns: Rows<'_>, factor: f32) {
        assert!(self.product.format == Format::F32 && self.aligned);
        assert_eq!(columns.depth(), self.depth);
        let end = first + columns.count();
        assert!(first.is_multiple_of(self.panel_width()) && end <= self.columns, "{first}..{end}");
        for panel in self.panels_in(first..end) {
            let at = self.panel_start(&panel, 0);
            self.level.transpose(Transpose {
                rows: columns.part(panel.start - first..panel.end.min(end) - first),
                factor,
                columns: self.bytes[at..].as_chunks_mut().0,
                width: panel.len(),
            });
        }
    }

    /// A column, as it is stored in f32.
    pub(crate) fn column(&self, column: usize) -> impl Iterator<Item = f32> {
        assert!(self.product.format == Format::F32 && column < self.columns);
        let panel = self.panels().find(|panel| panel.contains(&column)).expect("a panel for it");
        let start = self.panel_start(&panel, 0) + (column - panel.start) * size_of::<f32>();
        let numbers = self.bytes.get(start..).unwrap_or_default().as_chunks::<4>().0;
        numbers.iter().step_by(panel.len()).take(self.depth).map(|&x| f32::from_ne_bytes(x))
    }

    /// The columns of every panel.
    pub(super) fn panels(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (vectors, most) = (self.columns.div_ceil(LANES), self.product.vectors);
        let (count, aligned) = (vectors.div_ceil(most), self.aligned);
        (0..count).map(move |i| {
            if aligned {
                most * i * LANES..(most * (i + 1)).min(vectors) * LANES
            } else {
                vectors * i / count * LANES..vectors * (i + 1) / count * LANES
            }
        })
    }

    /// Those that hold some of `columns`, which start with a panel.
    pub(super) fn panels_in(
        &self,
        columns: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let panels = self.panels().skip_while(move |panel| panel.start < columns.start);
        panels.take_while(move |panel| panel.start < columns.end)
    }

    /// Bytes before the group that `row` starts, in the panel of these columns.
    pub(super) fn panel_start(&self, panel: &Range<usize>, row: usize) -> usize {
        let depth = self.depth.next_multiple_of(self.product.group);
        (panel.start * depth + panel.len() * row) * self.product.format.size()
    }
}

impl Footprint for PackedMatrix {
    fn footprint(&self) -> usize {
        let rows = self.exceptions.iter().map(|(_, row)| row.footprint() + size_of_val(row));
        self.bytes.footprint() + self.run_scales.footprint() + rows.sum::<usize>()
    }
}

/// Whether every magnitude is at most `limit` (NaN is not).
#[inline(always)]
fn all_below((row, limit): (&[f32], f32)) -> bool {
    row.iter().fold(true, |all, x| all & (x.abs() <= limit))
}
