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

/// Channels in a vector of a kernel's layout.
pub(crate) const LANES: usize = 16;
/// Vectors in a panel, at most.
pub(crate) const VECTORS: usize = 4;
/// Rows of a tile, at most.
pub(crate) const ROWS: usize = 6;
/// Keys in a group, at most: rows of probabilities that hold a multiple of this hold whole groups
/// of every kernel.
pub(crate) const KEY_GROUP: usize = 8;

/// How operands are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueFormat {
    /// f32; f32 sums.
    F32,
    /// bf16; f32 sums.
    Bf16,
    /// u8 probabilities, i8 values; exact i32 sums.
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
    /// The first sum of the first row, an f32 or an i32; `vectors * LANES` in each row are added
    /// to.
    pub sums: *mut u8,
    /// Bytes from one row of sums to the next.
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
            rest.sums = rest.sums.wrapping_add(rows * rest.sums_stride);
            left -= 1;
            Some(tile)
        })
    }

    /// The sum of a row's `channel`-th channel.
    #[inline(always)]
    pub(crate) fn sums_of<T>(&self, row: usize, channel: usize) -> *mut T {
        self.sums.wrapping_add(row * self.sums_stride).cast::<T>().wrapping_add(channel)
    }

    /// The first probability of a row.
    #[inline(always)]
    pub(crate) fn probs_of<T>(&self, row: usize) -> *const T {
        self.probs.wrapping_add(row * self.probs_stride).cast()
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
    /// multiplies u8 by u8. Its sums are larger by `bias * sum_j probs[r, j]`, modulo 2^32.
    fn bias(&self) -> u8 {
        0
    }

    /// `sums[r, c] += sum_j probs[r, j] * values[j, c]`; i32 sums wrap around.
    ///
    /// # Safety
    /// The kernel is available, and the pointers of `panel` are valid for what is named there: for
    /// reads, the sums for writes too; sums are aligned to 4 bytes.
    unsafe fn panel(&self, panel: PvPanel);
}
