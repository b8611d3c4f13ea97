//! The one engine: attention over the keys and values of a head, whoever holds them.
//!
//! ```text
//! for each head of keys, for up to 48 rows of the queries that share it:         a row: one query of one head
//!   prepare the rows                                            quantize and pack, or gather
//!   for each tile of up to 512 keys:
//!     scores      int8 or f32, in units of log2                 KeyValues::score
//!     modifiers   softcap, ALiBi, mask tensor                   modifiers, mask
//!     softmax     running maximum and sum                       softmax, int16_tile, part, of a tile
//!                 (mostly these three run by run, of 64 keys, where probabilities are in int16)
//!     values      sums += probabilities x values                KeyValues::accumulate
//!   see whether all scores were numbers                         doubt
//!   add the sink logit to the running sum                       partial
//!   divide by the running sum                                   output
//! ```
//!
//! Who holds keys and values implements [`KeyValues`]: a head of tensors in int8 or in f32, or of a cache.
//! Nothing as large as `M * N` ever exists. A few rows over many keys are computed in spans of keys that
//! threads share, each with its own maximum, and merged in their order.

mod doubt;
mod int16_tile;
mod key_values;
mod mask;
mod modifiers;
mod output;
mod part;
mod partial;
mod queries;
mod run;
mod softmax;
mod tile;

pub(super) use doubt::Doubt;
pub(super) use key_values::{KeyValues, QueryBlock};
pub(super) use mask::MaskView;
pub(super) use modifiers::{Modifiers, exponent};
pub(super) use output::Element;
pub(super) use queries::{BLOCK, Block, Queries, Rows, TOGETHER, blocks, gather, pieces, together};
pub(super) use run::{Engine, TILE};
pub(super) use tile::{Probs, Running, Tile, Words};
