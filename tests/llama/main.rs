//! The Llama decoder: against candle-transformers, between formats, its cache, its drift, its
//! tokenizers, and files that are wrong.

mod agreement;
mod cache;
#[cfg(feature = "drift")]
mod drift;
mod errors;
mod examples;
mod tiny;
mod tokenizers;

use candle_core::{Device, Result, Tensor};

/// Token ids as a batch of one.
fn batch(ids: &[u32]) -> Result<Tensor> {
    Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)
}

/// The largest difference, relative to the largest of `expected`.
fn relative_difference(found: &Tensor, expected: &Tensor) -> Result<f32> {
    let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
    Ok(difference / expected.abs()?.max_all()?.to_scalar::<f32>()?)
}
