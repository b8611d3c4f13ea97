//! A linear layer, and what follows it in the same op.
//!
//! ```text
//! layer     the layer, and which of its forms computes
//! weights   packed once: f32, int16, or int8 codes of rotated rows          float, int16, int8
//! rounding  which codes: the nearest, or those that suit what enters the layer
//! file      packed weights in safetensors, and back
//! op        shapes, then the result: product and epilogue, task by task                  op, product
//! tasks     how the result is divided among threads: whole rows first, then outputs
//! ```

mod file;
mod float;
mod int16;
mod int8;
mod layer;
mod op;
mod product;
mod rounding;
mod tasks;
#[cfg(test)]
mod tests;
mod weights;

pub use file::{load_linear, save_linear};
pub use layer::Linear;
pub use weights::Precision;
