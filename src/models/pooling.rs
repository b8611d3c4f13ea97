//! One vector a text out of its hidden states, in the ways of sentence-transformers.

use super::padding::dims2;
use crate::files::{corrupt, read_text};
use crate::memory::check_size;
use crate::view::{View, cpu};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// A way to make one vector of the states of all tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pooling {
    /// The state of the first token, `[CLS]`.
    Cls,
    /// The largest of each element over the tokens.
    Max,
    /// The mean over the tokens.
    Mean,
    /// The state of the last token.
    LastToken,
}

/// Their names in files, old and new, in the order in which several are put one after the other.
const MODES: [(Pooling, &str, &str); 4] = [
    (Pooling::Cls, "cls_token", "cls"),
    (Pooling::Max, "max_tokens", "max"),
    (Pooling::Mean, "mean_tokens", "mean"),
    (Pooling::LastToken, "lasttoken", "lasttoken"),
];

impl Pooling {
    /// `[B, N, hidden]` to `[B, hidden]`. `mask` `[B, N]` is 1 for the tokens that take part and 0
    /// for others, such as padding. A text without any gives zeros.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the mask is `[B, N]`.
    pub fn forward(self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, n, _) = hidden.dims3()?;
        check_size("Pooling::forward", "hidden", hidden.dims())?;
        if mask.dims() != [b, n] {
            let (shape, expected) = (mask.dims().to_vec(), format!("[{b}, {n}]"));
            let (op, tensor) = ("Pooling::forward", "attention_mask");
            return Err(Error::Shape { op, tensor, shape, expected });
        }
        if n == 0 || self == Pooling::Mean {
            return mean_pool(hidden, mask);
        }
        let mask = mask.to_dtype(DType::U32)?;
        match self {
            Pooling::Max => {
                let seen = mask.ne(0u32)?.unsqueeze(2)?.broadcast_as(hidden.shape())?;
                let nothing = Tensor::new(f32::NEG_INFINITY, hidden.device())?;
                let nothing = nothing.to_dtype(hidden.dtype())?.broadcast_as(hidden.shape())?;
                let max = seen.where_cond(hidden, &nothing)?.max(1)?;
                zeros_without_tokens(&max, &mask)
            }
            _ => {
                let at = |mask: Vec<u32>| match self {
                    Pooling::LastToken => mask.iter().rposition(|&token| token != 0),
                    // Also where the first token takes no part, as one of a prompt.
                    _ => None,
                };
                let rows = mask.to_vec2::<u32>()?.into_iter().enumerate();
                let rows = rows.map(|(text, mask)| (text * n + at(mask).unwrap_or(0)) as u32);
                let rows = Tensor::from_iter(rows, hidden.device())?;
                let states = hidden.flatten(0, 1)?.index_select(&rows, 0)?;
                zeros_without_tokens(&states, &mask)
            }
        }
    }
}

/// `pooled` `[B, hidden]` with zeros in the rows of texts whose mask is all 0.
fn zeros_without_tokens(pooled: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let some = mask.max_keepdim(1)?.ne(0u32)?.broadcast_as(pooled.shape())?;
    Ok(some.where_cond(pooled, &pooled.zeros_like()?)?)
}

/// The mean of the hidden states `[B, N, hidden]` over tokens, padding (0 in `attention_mask`
/// `[B, N]`) left out: `[B, hidden]`. A sequence of padding alone gives zeros.
///
/// # Errors
/// [`Error::Shape`] unless the mask has rank 2, and for more elements than memory has addresses; Candle's own if
/// the shapes do not fit.
pub fn mean_pool(hidden: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
    let (b, n) = dims2("mean_pool", attention_mask)?;
    check_size("mean_pool", "hidden", hidden.dims())?;
    let weights = attention_mask.to_dtype(hidden.dtype())?.reshape((b, n, 1))?;
    let tokens = weights.sum(1)?.maximum(1.0)?;
    let sums = match plain_sums(hidden, &weights)? {
        Some(sums) => sums,
        None => hidden.broadcast_mul(&weights)?.sum(1)?,
    };
    Ok(sums.broadcast_div(&tokens)?)
}

/// The sums over tokens, `[B, hidden]`, of f32 on the CPU that has no gradient: in one pass, where a sum of Candle over
/// another dimension than the last takes a few ns an element. The same bits.
fn plain_sums(hidden: &Tensor, weights: &Tensor) -> Result<Option<Tensor>> {
    let fits = hidden.dims().len() == 3 && hidden.dims()[..2] == weights.dims()[..2];
    if !hidden.device().is_cpu() || hidden.dtype() != DType::F32 || hidden.track_op() || !fits {
        return Ok(None);
    }
    let (batch, tokens, width) = hidden.dims3()?;
    let weights = weights.flatten_all()?.to_vec1::<f32>()?;
    let (storage, layout) = hidden.storage_and_layout();
    let rows = View::of_rows("mean_pool", "hidden", cpu(&storage)?, layout)?;
    let (mut sums, mut buffer) = (vec![0f32; batch * width], Vec::new());
    for (text, sums) in sums.chunks_exact_mut(width.max(1)).enumerate() {
        let texts = text * tokens..(text + 1) * tokens;
        let rows = rows.merged(texts.clone(), &mut buffer).chunks_exact(width);
        for (row, weight) in rows.zip(&weights[texts]) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * weight);
        }
    }
    Ok(Some(Tensor::from_vec(sums, (batch, width), hidden.device())?))
}

/// A pooling module: what its `config.json` asks for.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PoolingConfig {
    /// One, or several whose results are put one after the other.
    pub(super) modes: Vec<Pooling>,
    /// Whether the tokens of a prompt take part.
    pub(super) include_prompt: bool,
}

impl Default for PoolingConfig {
    fn default() -> Self {
        Self { modes: vec![Pooling::Mean], include_prompt: true }
    }
}

impl PoolingConfig {
    /// Reads the file at `path`, for states of `hidden` elements.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for what is no such file, [`Error::Unsupported`] for a pooling that is not
    /// implemented, [`Error::Mismatch`] for one of states of another width.
    pub(super) fn load(path: &Path, hidden: usize) -> Result<Self> {
        let text = read_text("pooling", path)?;
        let config: BTreeMap<String, Value> =
            serde_json::from_str(&text).map_err(|e| corrupt(path, e))?;
        for name in ["word_embedding_dimension", "embedding_dimension"] {
            if let Some(width) = config.get(name).filter(|width| **width != hidden) {
                return Err(Error::Mismatch(format!(
                    "{}: {name} {width}, but the model's hidden states have {hidden} elements",
                    path.display()
                )));
            }
        }
        let modes = Self::modes(&config, path)?;
        let include_prompt = config.get("include_prompt") != Some(&Value::Bool(false));
        Ok(Self { modes, include_prompt })
    }

    fn modes(config: &BTreeMap<String, Value>, path: &Path) -> Result<Vec<Pooling>> {
        let of_switch = |(name, on): (&String, &Value)| {
            let name = name.strip_prefix("pooling_mode_")?;
            (on == &Value::Bool(true)).then(|| name.to_string())
        };
        let mut names: Vec<String> = config.iter().filter_map(of_switch).collect();
        match config.get("pooling_mode") {
            Some(Value::String(name)) => names.push(name.clone()),
            Some(Value::Array(all)) => {
                names.extend(all.iter().filter_map(Value::as_str).map(str::to_string));
            }
            _ => {}
        }
        let is = |name: &str, mode: &(Pooling, &str, &str)| [mode.1, mode.2].contains(&name);
        if let Some(other) = names.iter().find(|name| !MODES.iter().any(|mode| is(name, mode))) {
            return Err(Error::Unsupported(format!(
                "{}: pooling by {other:?}, expected \"cls\", \"max\", \"mean\" or \"lasttoken\"",
                path.display()
            )));
        }
        let named = |mode: &&(Pooling, &str, &str)| names.iter().any(|name| is(name, mode));
        let modes: Vec<Pooling> = MODES.iter().filter(named).map(|mode| mode.0).collect();
        match modes.is_empty() {
            true => Err(corrupt(path, "chooses no pooling")),
            false => Ok(modes),
        }
    }

    /// `[B, N, hidden]` to `[B, hidden * modes]`.
    pub(super) fn forward(&self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let pooled = self.modes.iter().map(|mode| mode.forward(hidden, mask));
        Ok(Tensor::cat(&pooled.collect::<Result<Vec<_>>>()?, 1)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{largest_difference, randn};
    use candle_core::{Device, Var};

    /// Strided states, masks with holes, and nothing at all, against Candle's operations, which states with a
    /// gradient take.
    #[test]
    fn the_mean_is_that_of_candle_with_or_without_a_gradient() {
        for (batch, tokens, width) in [(1, 14, 384), (3, 5, 7), (2, 1, 1), (2, 0, 4), (0, 3, 4)] {
            let hidden = randn((tokens, batch, width)).transpose(0, 1).unwrap();
            let weights = (0..batch * tokens).map(|i| u32::from(i % 4 != 1));
            let some = Tensor::from_iter(weights, &Device::Cpu).unwrap();
            let some = some.reshape((batch, tokens)).unwrap();
            for mask in [some.clone(), some.ones_like().unwrap(), some.zeros_like().unwrap()] {
                let plain = mean_pool(&hidden, &mask).unwrap();
                let var = Var::from_tensor(&hidden).unwrap();
                let tracked = mean_pool(&var, &mask).unwrap();
                assert_eq!(plain.dims(), [batch, width]);
                assert!(tracked.track_op() && !plain.track_op());
                assert_eq!(largest_difference(&plain, &tracked), 0.0);
            }
        }
    }
}
