//! What a kernel of this product is, and the layout it reads.
//!
//! Values are stored in panels of up to 64 channels, keys in groups of what one instruction sums
//! into a lane (1 in f32, 2 in bf16):
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

/// How operands are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ValueFormat {
    /// f32, one key at a time.
    F32,
    /// bf16, two keys at a time.
    Bf16,
}

impl ValueFormat {
    /// Keys that one instruction sums into a lane.
    pub(crate) const fn group(self) -> usize {
        match self {
            ValueFormat::F32 => 1,
            ValueFormat::Bf16 => 2,
        }
    }

    /// Bytes of an element.
    pub(crate) const fn size(self) -> usize {
        match self {
            ValueFormat::F32 => 4,
            ValueFormat::Bf16 => 2,
        }
    }
}

/// `x` rounded to bf16, ties to even, for x that is not NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// One tile.
#[derive(Clone, Copy)]
pub(crate) struct PvTile {
    /// Rows of probabilities, `1..=ROWS`.
    pub rows: usize,
    /// Vectors of channels, `1..=VECTORS`.
    pub vectors: usize,
    /// Groups of keys.
    pub groups: usize,
    /// The first probability of the first row.
    pub probs: *const u8,
    /// Bytes from one row of probabilities to the next.
    pub probs_stride: usize,
    /// The panel's first group: `groups * vectors * LANES * group` elements.
    pub values: *const u8,
    /// The first sum of the first row; `vectors * LANES` in each row are added to.
    pub out: *mut f32,
    /// Elements from one row of sums to the next.
    pub out_stride: usize,
}

/// One instruction set's way to compute a tile.
///
/// # Safety
/// Implementors promise that `tile` touches nothing but what [`PvTile`] names, and that
/// `is_available` is true only where their instructions exist.
pub(crate) unsafe trait PvKernel: Send + Sync {
    /// Name in reports.
    fn name(&self) -> &'static str;

    /// What it multiplies.
    fn format(&self) -> ValueFormat;

    /// Whether this machine has the instructions.
    fn is_available(&self) -> bool;

    /// `out[r, c] += sum_j probs[r, j] * values[j, c]`.
    ///
    /// # Safety
    /// The kernel is available, and the pointers of `tile` are valid for what is named there.
    unsafe fn tile(&self, tile: PvTile);
}

/// Calls `$f::<ROWS, VECTORS>($tile)` for the constants that the tile asks for.
macro_rules! for_tile_size {
    ($tile:expr, $f:ident) => {
        match ($tile.rows, $tile.vectors) {
            (1, v) => for_tile_size!(@vectors v, 1, $tile, $f),
            (2, v) => for_tile_size!(@vectors v, 2, $tile, $f),
            (3, v) => for_tile_size!(@vectors v, 3, $tile, $f),
            (4, v) => for_tile_size!(@vectors v, 4, $tile, $f),
            (5, v) => for_tile_size!(@vectors v, 5, $tile, $f),
            (_, v) => for_tile_size!(@vectors v, 6, $tile, $f),
        }
    };
    (@vectors $vectors:ident, $rows:literal, $tile:expr, $f:ident) => {
        match $vectors {
            1 => $f::<$rows, 1>($tile),
            2 => $f::<$rows, 2>($tile),
            3 => $f::<$rows, 3>($tile),
            _ => $f::<$rows, 4>($tile),
        }
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use for_tile_size;
