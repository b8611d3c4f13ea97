//! What a kernel of this product is, and the layout it reads.
//!
//! Values are stored in panels of up to 64 channels, keys in groups of what one instruction sums
//! into a lane:
//!
//! ```text
//! panel of `width` channels:  [N / group][width][group]      width: 16, 32, 48 or 64
//! ```
//!
//! Probabilities are row-major; rows are `stride` elements apart.

use std::ops::Range;

/// Channels in a vector of a kernel's layout.
pub(crate) const LANES: usize = 16;
/// Vectors in a panel, at most.
pub(crate) const VECTORS: usize = 4;
/// Rows of a tile, at most.
pub(crate) const ROWS: usize = 6;
/// Keys in a group, at most: rows of probabilities that hold a multiple of this hold whole groups
/// of every kernel.
pub(crate) const KEY_GROUP: usize = 8;

/// Keys whose int8 probabilities share a scale, a multiple of [`KEY_GROUP`]. A shorter run keeps
/// more of the small probabilities beside a large one, and converts more sums to f32.
pub(crate) const RUN: usize = 64;

/// Int8 probabilities of one query for a run of keys: `scale * code`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Int8Run {
    /// What a code of 1 stands for.
    pub scale: f32,
    /// The sum of all codes of the run.
    pub codes: u32,
}

/// How operands are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueFormat {
    /// f32; f32 sums.
    F32,
    /// bf16; f32 sums.
    Bf16,
    /// u8 probabilities, i8 values; exact i32 sums over a run of keys, then f32.
    Int8,
}

impl ValueFormat {
    /// Bytes of an element.
    pub(crate) const fn size(self) -> usize {
        match self {
            ValueFormat::F32 => 4,
            ValueFormat::Bf16 => 2,
            ValueFormat::Int8 => 1,
        }
    }
}

/// `x` rounded to bf16, ties to even, for x that is not NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// One panel of channels, and rows of probabilities for it.
#[derive(Clone, Copy)]
pub(crate) struct PvPanel {
    /// Rows of probabilities.
    pub rows: usize,
    /// Vectors of channels, `1..=VECTORS`.
    pub vectors: usize,
    /// Groups of keys.
    pub groups: usize,
    /// The first probability of the first row; whole groups of them in each row.
    pub probs: *const u8,
    /// Bytes from one row of probabilities to the next.
    pub probs_stride: usize,
    /// The panel's first group: `groups * vectors * LANES * group` elements.
    pub values: *const u8,
    /// What int8 probabilities stand for: the first run of the first row, and a run for every
    /// [`RUN`] keys in each row. Not read for other formats.
    pub runs: *const Int8Run,
    /// Runs from one row to the next.
    pub runs_stride: usize,
    /// The first sum of the first row; `vectors * LANES` in each row are added to.
    pub sums: *mut f32,
    /// Elements from one row of sums to the next.
    pub sums_stride: usize,
}

impl PvPanel {
    /// Its rows in tiles of at most `most`, as even as can be: 8 rows are 4 and 4, not 6 and 2.
    #[inline(always)]
    pub(crate) fn tiles(self, most: usize) -> impl Iterator<Item = PvPanel> {
        let mut rest = self;
        let mut left = self.rows.div_ceil(most);
        std::iter::from_fn(move || {
            let rows = rest.rows.checked_div(left)?;
            let tile = PvPanel { rows, ..rest };
            rest.rows -= rows;
            rest.probs = rest.probs.wrapping_add(rows * rest.probs_stride);
            rest.runs = rest.runs.wrapping_add(rows * rest.runs_stride);
            rest.sums = rest.sums.wrapping_add(rows * rest.sums_stride);
            left -= 1;
            Some(tile)
        })
    }

    /// The sum of a row's `channel`-th channel.
    #[inline(always)]
    pub(crate) fn sums_of(&self, row: usize, channel: usize) -> *mut f32 {
        self.sums.wrapping_add(row * self.sums_stride + channel)
    }

    /// The first probability of a row.
    #[inline(always)]
    pub(crate) fn probs_of<T>(&self, row: usize) -> *const T {
        self.probs.wrapping_add(row * self.probs_stride).cast()
    }

    /// The groups of each run, of `group` keys each.
    #[inline(always)]
    pub(crate) fn runs(&self, group: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (groups, of_run) = (self.groups, RUN / group);
        (0..groups.div_ceil(of_run))
            .map(move |run| (run, run * of_run..(run * of_run + of_run).min(groups)))
    }

    /// What the probabilities of a row stand for in a run.
    #[inline(always)]
    pub(crate) fn run_of(&self, row: usize, run: usize) -> *const Int8Run {
        self.runs.wrapping_add(row * self.runs_stride + run)
    }
}

/// One instruction set's way to compute a panel.
///
/// # Safety
/// Implementors promise that `panel` touches nothing but what [`PvPanel`] names, that
/// `is_available` is true only where their instructions exist, and that `format`, `group` and
/// `bias` are always the same.
pub(crate) unsafe trait PvKernel: Send + Sync {
    /// Name in reports.
    fn name(&self) -> &'static str;

    /// What it multiplies.
    fn format(&self) -> ValueFormat;

    /// Keys that one instruction sums into a lane: a power of two up to [`KEY_GROUP`].
    fn group(&self) -> usize;

    /// Whether this machine has the instructions.
    fn is_available(&self) -> bool;

    /// What is added to the code of an int8 value when it is stored: 128 for an instruction that
    /// multiplies u8 by u8, whose kernel takes it out again.
    fn bias(&self) -> u8 {
        0
    }

    /// `sums[r, c] += sum_j probs[r, j] * values[j, c]`.
    ///
    /// In int8, run by run: the exact integer, rounded to f32, times the scale of the run, rounded,
    /// is added to the sum, which is rounded; so every kernel gives the same bits.
    ///
    /// # Safety
    /// The kernel is available, and the pointers of `panel` are valid for what is named there, sums
    /// for reads and writes and all else for reads, and aligned for f32 where they are to f32.
    unsafe fn panel(&self, panel: PvPanel);
}
