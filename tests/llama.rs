//! The Llama decoder: against candle-transformers, between formats, its cache, its drift, its
//! tokenizers, the examples that take it, and files that are wrong.

mod agreement;
mod cache;
// The examples' part that cuts passages, whose tests run here.
#[path = "../../examples/common/mod.rs"]
mod common;
#[cfg(feature = "drift")]
mod drift;
mod errors;
mod examples;
mod passages;
#[path = "../common/mod.rs"]
mod testing;
mod tiny;
mod tokenizers;
mod tools;

use candle_core::{Device, Result, Tensor};

/// Token ids as a batch of one.
fn batch(ids: &[u32]) -> Result<Tensor> {
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// The largest difference, relative to the largest of `expected`.
fn relative_difference(found: &Tensor, expected: &Tensor) -> Result<f32> {
    let difference = testing::largest_difference(found, expected);
    Ok((difference / testing::largest(expected)) as f32)
}
