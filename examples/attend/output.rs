//! The output file: complete, or not there.

use crate::common::output::NewFile;
use anyhow::Result;
use candle_core::Tensor;
use std::collections::HashMap;

/// Writes the tensors as safetensors.
pub fn write(file: NewFile, out: &Tensor, scores: Option<&Tensor>) -> Result<()> {
    let mut tensors = HashMap::from([("out", out.clone())]);
    tensors.extend(scores.map(|scores| ("scores", scores.clone())));
    file.write(|file| {
        let permissions = file.as_file().metadata()?.permissions();
        // It puts a file of its own, for the owner alone, in the place of ours.
        candle_core::safetensors::save(&tensors, file.path())?;
        Ok(std::fs::set_permissions(file.path(), permissions)?)
    })
}
