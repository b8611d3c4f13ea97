//! The least time that the machine's instructions allow.

use crate::args::Pv;
use crate::peak::{Peak, Peaks};
use crate::shape::Shape;
use serde::Serialize;

/// Seconds of each part at its instruction peak, on all threads. Loads, stores, quantizing, packing,
/// maxima and sums of the softmax and waiting for memory are not in it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Limit {
    /// Queries times keys in int8.
    pub int8: f64,
    /// Probabilities times values; 0 for scores alone.
    pub pv: f64,
    /// One `2^x` for each score; 0 for scores alone.
    pub exp2: f64,
}

impl Limit {
    /// Of raw scores; `None` where the peak is unknown.
    pub fn scores(shape: Shape, peaks: &Peaks) -> Option<Self> {
        let int8 = shape.macs() / peaks.int8.as_ref()?.per_second;
        Some(Self { int8, pv: 0.0, exp2: 0.0 })
    }

    /// Of attention; `None` where a peak is unknown.
    pub fn attention(shape: Shape, peaks: &Peaks, pv: Pv) -> Option<Self> {
        Some(Self {
            pv: shape.macs() / pv_peak(peaks, pv).1?.per_second,
            exp2: shape.scores() / peaks.exp2.as_ref()?.per_second,
            ..Self::scores(shape, peaks)?
        })
    }

    pub fn seconds(&self) -> f64 {
        self.macs() + self.exp2
    }

    /// Without the exponentials.
    pub fn macs(&self) -> f64 {
        self.int8 + self.pv
    }
}

/// The precision of probabilities times values that the limit is made for, and its peak.
pub fn pv_peak(peaks: &Peaks, pv: Pv) -> (&'static str, Option<&Peak>) {
    match pv {
        Pv::Bf16 => ("bf16", peaks.bf16.as_ref()),
        Pv::F32 => ("f32", peaks.f32.as_ref()),
        // As the library chooses.
        Pv::Auto if cfg!(target_arch = "aarch64") && peaks.bf16.is_some() => {
            ("bf16", peaks.bf16.as_ref())
        }
        Pv::Auto | Pv::Int16 => ("int16", peaks.int16.as_ref()),
    }
}
