//! The keys of one head of a tensor in int8.

use crate::cpu::Level;
use crate::memory::{Aligned, Footprint};
use crate::product::PackedRhs;
use std::ops::Range;

/// The keys of one head that are seen, quantized, packed and shared by its query heads. What is one a key
/// is padded to whole panels of the kernel; what stands in the padding does not matter.
pub(super) struct PackedKeys {
    pub head: usize,
    pub rhs: PackedRhs,
    pub scales: Aligned<f32>,
    /// `[N, D]`, conditioned as the codes are, where queries are smoothed: their mean is multiplied with
    /// these.
    pub conditioned: Aligned<f32>,
    /// What smoothing subtracted, `[blocks, D]`; empty without smoothing.
    pub means: Aligned<f32>,
    /// Keys of a block.
    pub block: usize,
    /// The keys that stand out of their block, in order, whose scores are in f32, and their rows.
    pub outliers: Vec<usize>,
    pub outlier_rows: Vec<f32>,
    /// What is subtracted from the queries of each query head that shares these keys, where it is the same
    /// for all of a head.
    pub query_means: Vec<Option<Vec<f32>>>,
}

impl PackedKeys {
    /// Bytes that a thread may keep for the next head.
    pub(super) const KEPT: usize = 512 << 10;

    /// No keys yet.
    pub(super) fn new(level: Level) -> Self {
        Self {
            head: 0,
            rhs: PackedRhs::new(level, 0, 0, false),
            scales: Aligned::default(),
            conditioned: Aligned::default(),
            means: Aligned::default(),
            block: 1,
            outliers: Vec::new(),
            outlier_rows: Vec::new(),
            query_means: Vec::new(),
        }
    }

    /// Those that stand out, by their places among them, of some keys.
    pub(super) fn outliers_in(&self, keys: &Range<usize>) -> Range<usize> {
        let before = |end: usize| self.outliers.partition_point(|&key| key < end);
        before(keys.start)..before(keys.end)
    }

    /// Blocks of keys that have a bias of their own for each query.
    pub(super) fn blocks(&self) -> usize {
        self.rhs.rows().div_ceil(self.block).max(1)
    }
}

impl Footprint for PackedKeys {
    fn footprint(&self) -> usize {
        let Self { rhs, scales, conditioned, means, outliers, outlier_rows, .. } = self;
        let floats = conditioned.footprint() + means.footprint() + outlier_rows.footprint();
        let query_means: usize = self.query_means.iter().map(Footprint::footprint).sum();
        rhs.footprint() + scales.footprint() + floats + outliers.footprint() + query_means
    }
}
