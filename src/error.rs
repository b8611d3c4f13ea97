//! One error type for the whole crate.
//!
//! Every variant names the value that was found and what was expected. Its message is whole: what
//! the operating system said is in it, and is not a
//! [`source`](std::error::Error::source) as well, because whoever prints the chain of causes would
//! print it twice. [`Error`] converts into [`candle_core::Error`], which keeps the message and no
//! causes, so `?` works inside a Candle model.

use candle_core::{DType, DeviceLocation};
use std::path::PathBuf;

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong number of dimensions.
    #[error("{op}: {tensor} has shape {shape:?} (rank {}), expected rank 4: {expected}", shape.len())]
    Rank {
        /// The function that was called.
        op: &'static str,
        /// Which of its arguments.
        tensor: &'static str,
        /// The shape that was found.
        shape: Vec<usize>,
        /// The layout that was expected, for example `[B, H, M, D]`.
        expected: &'static str,
    },

    /// Two shapes that must agree do not.
    #[error("{op}: {tensor} has shape {shape:?}, expected {expected}")]
    Shape {
        /// The function that was called.
        op: &'static str,
        /// Which of its arguments.
        tensor: &'static str,
        /// The shape that was found.
        shape: Vec<usize>,
        /// What would have fitted, with the other shape's values.
        expected: String,
    },

    /// A tensor's element type is not supported.
    #[error("{op}: {tensor} has dtype {dtype:?}, expected {expected}")]
    DType {
        /// The function that was called.
        op: &'static str,
        /// Which of its arguments.
        tensor: &'static str,
        /// The dtype that was found.
        dtype: DType,
        /// The dtypes that are supported.
        expected: &'static str,
    },

    /// The device has no implementation of this operation.
    #[error("{op}: {tensor} is on {device:?}, but the int8 kernels run on the CPU; {hint}")]
    Device {
        /// The function that was called.
        op: &'static str,
        /// Which of its arguments.
        tensor: &'static str,
        /// Where the tensor lives.
        device: DeviceLocation,
        /// What to call instead.
        hint: &'static str,
    },

    /// NaN or infinity where only finite numbers have a meaning.
    #[error("{op}: element {index} is {value}, expected a finite number")]
    NonFinite {
        /// The function that was called.
        op: &'static str,
        /// Row-major index of the first such element.
        index: usize,
        /// Its value.
        value: f32,
    },

    /// A scale, zero point or range with which quantization is not defined.
    #[error("invalid quantization parameters: {0}")]
    QuantParams(String),

    /// Something that is well defined, but that this crate, this function or this machine cannot
    /// do.
    #[error("not supported: {0}")]
    Unsupported(String),

    /// Settings that exclude each other.
    #[error("contradictory settings: {0}")]
    Contradiction(String),

    /// Something that does not match what it is used with: the shapes of a call, a model, a cache,
    /// or another part of the same result.
    #[error("does not match: {0}")]
    Mismatch(String),

    /// A value that makes no sense wherever it is used: a number out of its range, a word that is
    /// none of those expected, nothing at all where something is needed.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),

    /// A cache of fixed capacity has no room for more tokens.
    #[error(
        "{added} tokens more than the {held} in the cache exceed its capacity of {capacity}; \
         truncate or reset it, or configure a larger capacity or a sliding window"
    )]
    Capacity {
        /// Tokens of the sequence.
        held: usize,
        /// Tokens that were to be appended.
        added: usize,
        /// The most that the cache takes.
        capacity: usize,
    },

    /// The sum over the depth could leave the range of int32.
    #[error("depth (head dim) {depth} is too large for exact int32 sums; the limit is {limit}")]
    Depth {
        /// The depth that was asked for.
        depth: usize,
        /// The largest depth that works.
        limit: usize,
    },

    /// `CANDLE_INT8_CPU` names a level that does not exist or that this machine cannot run.
    #[error("level {name:?} in CANDLE_INT8_CPU {problem}; available on this machine: {available}")]
    Level {
        /// The name that was asked for.
        name: String,
        /// Why it cannot be used.
        problem: &'static str,
        /// The names that would work here.
        available: String,
    },

    /// A file that should be there is not.
    #[error("{what} not found: {}", path.display())]
    MissingFile {
        /// What the file is for.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
    },

    /// A file could not be read or written.
    #[error("{}: {problem}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        problem: std::io::Error,
    },

    /// A file's content is not what its name promises (truncated, corrupt, not UTF-8, ...).
    #[error("{}: {problem}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// A model's weights lack a tensor.
    #[error("{}: no tensor named {name:?}{hint}", path.display())]
    MissingTensor {
        /// The weights file.
        path: PathBuf,
        /// The tensor that was looked for.
        name: String,
        /// What is there instead, if that helps.
        hint: String,
    },

    /// The configuration of a model does not fit its weights.
    #[error("{}: tensor {name:?} has shape {found:?}, but the config asks for {expected:?}", path.display())]
    ModelShape {
        /// The weights file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that follows from the config.
        expected: Vec<usize>,
    },

    /// A sequence is longer than the context that is left for it.
    #[error(
        "{tokens} tokens do not fit: {used} of the context's {context} are in use, expected at \
         most {} more",
        context - used
    )]
    ContextLength {
        /// The tokens that were to be added.
        tokens: usize,
        /// The tokens that are there already.
        used: usize,
        /// The most tokens there can be.
        context: usize,
    },

    /// A model could not be had from the Hugging Face Hub.
    #[error("{model}: {problem}")]
    Hub {
        /// Model id and revision.
        model: String,
        /// What happened, and what to do about it.
        problem: String,
    },

    /// An error of Candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// [`Error::Shape`].
    pub(crate) fn shape(
        op: &'static str,
        tensor: &'static str,
        shape: &[usize],
        expected: impl Into<String>,
    ) -> Self {
        Self::Shape { op, tensor, shape: shape.to_vec(), expected: expected.into() }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => candle_core::Error::wrap(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_into_candle_error_and_keeps_its_message() {
        let candle: candle_core::Error = Error::Depth { depth: 70_000, limit: 65_793 }.into();
        assert!(candle.to_string().contains("70000"), "{candle}");
    }

    #[test]
    fn causes_are_told_once() {
        let problem = std::io::Error::other("the disk is on fire");
        let error = Error::Io { path: "model.gguf".into(), problem };
        assert_eq!(error.to_string(), "model.gguf: the disk is on fire");
        let chain = format!("{:#}", anyhow::Error::from(error).context("cannot load"));
        assert_eq!(chain, "cannot load: model.gguf: the disk is on fire");
    }
}
