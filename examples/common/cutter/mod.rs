//! A text as passages of tokens, each no longer than the model reads at once.

pub mod decoder;
pub mod encoder;

use anyhow::Result;
use candle_core::Tensor;

/// A run of tokens that a model reads at once.
pub struct Passage {
    /// `[1, N]`
    pub ids: Tensor,
    /// The text of each token; joined they are the passage.
    pub words: Vec<String>,
}

/// Cuts a text that comes in pieces, so that it need not fit in memory.
pub trait Cutter {
    /// Takes the next piece of the text, which ends with white space unless it is the last.
    fn push(&mut self, text: &str) -> Result<()>;

    /// The next passage if there is enough text for it, or, with `rest`, whatever is left.
    fn next(&mut self, rest: bool) -> Result<Option<Passage>>;

    /// Refuses a text, once all of it was pushed, in which there is nothing to read.
    fn check(&self) -> Result<()>;

    /// Tokens of a passage, special ones included.
    fn passage_tokens(&self) -> usize;

    /// The fewest that it can have.
    fn fewest_tokens(&self) -> usize;

    /// Those that are not of the text.
    fn special_tokens(&self) -> usize;

    /// About how many bytes of text wait to become passages.
    fn waiting_bytes(&self) -> u64;

    /// Tokens so far that no passage holds.
    fn lost(&self) -> u64;
}
