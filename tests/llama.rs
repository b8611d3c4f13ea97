//! The Llama decoder: between formats, its cache, its drift, its tokenizers, and files that are wrong.

mod common;

// Named, so that the files are in a folder of their own.
mod llama {
    mod agreement;
    mod cache;
    #[cfg(feature = "drift")]
    mod drift;
    mod errors;
    mod tokenizers;

    use super::*;
    use common::tiny;
}

use candle_core::{Device, Result, Tensor};

/// Token ids as a batch of one.
fn batch(ids: &[u32]) -> Result<Tensor> {
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// The largest difference, relative to the largest of `expected`.
fn relative_difference(found: &Tensor, expected: &Tensor) -> Result<f32> {
    let difference = common::largest_difference(found, expected);
    Ok((difference / common::largest(expected)) as f32)
}
