//! Whether rows met scores that f32 does not hold.

use super::tile::Running;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the rows of a call met. A score that is too small for f32 is nothing beside one that is not, so a row is
/// asked once, after all of its keys.
#[derive(Default)]
pub(in crate::attention) struct Doubt {
    /// Infinity as the largest score, of either sign.
    beyond: AtomicBool,
    /// NaN.
    nan: AtomicBool,
}

impl Doubt {
    /// Whether the largest score of a row is finite and its sum not NaN: then there is nothing to take in.
    pub(super) fn is_none(running: &Running) -> bool {
        running.max.is_finite() && !running.sum.is_nan()
    }

    /// Takes in a row; `sees` is whether it sees a key.
    pub(super) fn add(&self, running: &Running, sees: impl FnOnce() -> bool) {
        if running.sum.is_nan() {
            self.nan.store(true, Ordering::Relaxed);
        }
        if running.max.is_infinite() && (running.max > 0.0 || sees()) {
            self.beyond.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the largest score of a row was infinite.
    pub(in crate::attention) fn is_beyond(&self) -> bool {
        self.beyond.load(Ordering::Relaxed)
    }

    /// Whether that of a row was infinite, or a score was NaN.
    pub(in crate::attention) fn is_there(&self) -> bool {
        self.is_beyond() || self.nan.load(Ordering::Relaxed)
    }
}
