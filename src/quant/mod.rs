//! Numbers to int8 and back: `real = scale * (q - zero_point)`.
//!
//! | question | type |
//! |---|---|
//! | where is zero? | [`Scheme`]: symmetric (`zero_point = 0`) or affine |
//! | what shares one scale? | [`Granularity`]: tensor, head, token or block of tokens |
//! | where does the range come from? | [`RangeSource`]: the data itself, or given |
//! | which range, from many calls? | [`Observer`] |
//! | which scale and zero point follow? | [`QuantParams`] |
//! | how does int32 become int8? | [`Requantizer`] |
//! | how does an outlier spoil no row? | [`Rotation`] |
//!
//! Rounding is to nearest, ties to even, then saturating, except in the requantization mode that
//! is named after gemmlowp's fixed-point arithmetic.

mod condition;
mod config;
mod observers;
mod params;
mod requantize;
mod rotation;
pub(crate) mod rows;
mod scheme;
mod smooth;
mod tensor;
pub(crate) mod words;

pub(crate) use condition::{Conditioned, ConditionedHead, Conditioning};
pub use condition::{KEY_BLOCK, QUERY_BLOCK};
pub use config::{Granularity, QuantConfig, RangeSource};
pub use observers::{Histogram, MinMax, MovingAverage, Observer, ObserverKind};
pub use params::{QuantParams, ValueRange};
pub use requantize::{FixedPointMultiplier, Requantizer};
pub use rotation::Rotation;
pub use scheme::Scheme;
pub(crate) use smooth::{MeanSums, mean_of_rows};
pub use smooth::{Smoothing, token_mean};
pub use tensor::{CodeStorage, QuantizedTensor};
