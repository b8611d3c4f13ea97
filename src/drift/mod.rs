//! Quantization error, which is what drift means here: what differs between the fp32 and the int8
//! path on the same weights and inputs, not a shift in the distribution of the data.
//!
//! * [`layers`] has the error of every layer of a model, for many configurations at once.
//! * [`linear`] has what the precision of each linear layer costs, alone and accumulated.
//! * [`search`] finds the cheapest attention of each layer, and the cheapest precision of each linear layer, that
//!   keep a drift budget.
//! * [`metrics`] holds one function a number, over f32 slices; [`ErrorSums`] and [`Summary`] gather
//!   the same over data that comes in pieces, in constant memory, and merge.
//! * [`Drift`] is the set of numbers shown for a tensor of reals (an attention output, say).
//! * [`ProbabilityDrift`] is the set of numbers shown for rows of probabilities.
//! * [`tokens`] has the numbers shown for a language model's predictions over a text.
//!
//! No number is enough alone: a cosine hides a wrong length, a mean hides one bad row, and a
//! signal-to-noise ratio does not say whether the most attended word is still the same.
//!
//! With the feature `drift` there is more:
//!
//! * `Recorder` runs a whole model, your own too
//!   ([`LayeredModel`](crate::models::LayeredModel)), in both paths and gathers every
//!   stage of every layer and head; `Distribution` adds percentiles to a summary.
//! * `Report` is what it found, with the causes that explain it, for the terminal, as JSON, or as
//!   one HTML page; `Gate` holds it against thresholds.
//!
//! The example `drift` does all of this from the command line.

#[cfg(feature = "drift")]
mod bf16;
#[cfg(feature = "drift")]
mod candidate;
#[cfg(feature = "drift")]
mod distribution;
#[cfg(feature = "drift")]
mod explain;
mod figures;
#[cfg(feature = "drift")]
mod gate;
pub mod layers;
pub mod linear;
#[cfg(feature = "drift")]
mod merge;
pub mod metrics;
#[cfg(feature = "drift")]
mod recorder;
#[cfg(feature = "drift")]
pub mod report;
pub mod search;
#[cfg(feature = "drift")]
mod subject;
mod sums;
pub mod tokens;

pub use figures::{Drift, ProbabilityDrift};
pub use sums::{ErrorSums, Sum, Summary};
#[cfg(feature = "drift")]
pub use {
    candidate::Candidate,
    distribution::Distribution,
    explain::{Cause, Finding, HeadFacts, Peak, SideShape},
    gate::{Gate, Violation},
    recorder::{Embeddings, MovedSentence, MovedWord, Recorder, Target},
    report::Report,
    subject::{Subject, Text},
};
