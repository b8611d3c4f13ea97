//! A bench that runs contenders one at a time, for a driver that takes turns with other programs.

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

/// Reads a command a line from stdin, answers each with a line of JSON on stdout: what was asked for, or
/// `{"error": ".."}`. Ends when stdin ends.
///
/// # Errors
/// If stdin or stdout fail; not those of a command.
pub fn commands(mut answer: impl FnMut(&str) -> Result<Value>) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read a command from stdin")?;
        if line.trim().is_empty() {
            continue;
        }
        let answer =
            answer(line.trim()).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}").and_then(|()| out.flush()).context("cannot answer on stdout")?;
    }
    Ok(())
}

/// Words of a command. The last word of `compute` is a path, which may have spaces.
pub fn words(line: &str) -> Vec<&str> {
    if line.starts_with("compute ") {
        line.splitn(4, ' ').collect()
    } else {
        line.split_whitespace().collect()
    }
}

/// The number of calls of a command.
///
/// # Errors
/// If it is not a number above 0.
pub fn calls(text: &str) -> Result<usize> {
    text.parse().ok().filter(|&calls| calls > 0).context("CALLS is not a number above 0")
}

/// Queries, keys or values of `compute`, of four dimensions, in f32.
///
/// # Errors
/// If they cannot be read or have another rank.
pub fn read(folder: &str, name: &str) -> Result<Tensor> {
    let path = Path::new(folder).join(format!("{name}.npy"));
    let tensor =
        Tensor::read_npy(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let dims = tensor.dims();
    ensure!(dims.len() == 4, "{}: shape {dims:?}, expected [B, H, N, D]", path.display());
    Ok(tensor)
}

/// Writes a result of `compute`; returns where.
///
/// # Errors
/// If it cannot be written.
pub fn write(folder: &str, contender: &str, output: &Tensor) -> Result<PathBuf> {
    let path = Path::new(folder).join(format!("{contender}.npy"));
    let output = output.to_dtype(DType::F32)?;
    output.write_npy(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}
