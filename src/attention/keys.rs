//! The keys of one head of a tensor in int8.

use super::operand::Mean;
use crate::cpu::Level;
use crate::memory::Footprint;
use crate::product::PackedRhs;

/// The keys of one head, quantized, packed and shared by its query heads. All vectors are padded
/// to whole panels of the kernel; what stands in the padding does not matter.
pub(super) struct PackedKeys {
    pub head: usize,
    pub rhs: PackedRhs,
    pub scales: Vec<f32>,
    pub zeros: Vec<i32>,
    pub sums: Vec<i32>,
    /// What smooth-K subtracted.
    pub mean: Mean,
    /// Smooth-Q, for each query head that shares these keys.
    pub smooth_q: Vec<SmoothQ>,
}

/// What smooth-Q subtracts from the queries of one head, and the score of that with every key.
#[derive(Default)]
pub(super) struct SmoothQ {
    pub mean: Mean,
    pub biases: Vec<f32>,
}

impl PackedKeys {
    /// Bytes that a thread may keep for the next head.
    pub(super) const KEPT: usize = 512 << 10;

    /// No keys yet.
    pub(super) fn new(level: Level) -> Self {
        Self {
            head: 0,
            rhs: PackedRhs::new(level, 0, 0),
            scales: Vec::new(),
            zeros: Vec::new(),
            sums: Vec::new(),
            mean: Mean::default(),
            smooth_q: Vec::new(),
        }
    }
}

impl Footprint for PackedKeys {
    fn footprint(&self) -> usize {
        let Self { head: _, rhs, scales, zeros, sums, mean, smooth_q } = self;
        let of_queries = |smooth: &SmoothQ| smooth.mean.footprint() + smooth.biases.footprint();
        let smooth_q: usize = smooth_q.iter().map(of_queries).sum();
        let codes = scales.footprint() + zeros.footprint() + sums.footprint();
        rhs.footprint() + codes + mean.footprint() + smooth_q
    }
}
