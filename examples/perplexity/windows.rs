//! A text in windows, and the predictions of two models for one of them.

use crate::args::Args;
use crate::common::llama::Decoder;
use anyhow::{Result, bail};
use candle_core::Tensor;
use candle_int8_attention::drift::tokens::TokenDrift;
use candle_int8_attention::models::llama::LlamaModel;
use rayon::prelude::*;
use std::time::{Duration, Instant};

/// Tokens of a window without `--context`.
const USUAL_CONTEXT: usize = 512;

/// Tokens whose logits are in memory at once: 50 MB of them for a vocabulary of 49152, twice.
const SLICE: usize = 256;

/// Windows that follow each other without overlap; what is left at the end is not used.
pub struct Windows {
    /// Each begins with the token that the model expects at the beginning, if it expects one.
    windows: Vec<Vec<u32>>,
    context: usize,
}

impl Windows {
    pub fn of(decoder: &Decoder, text: &str, args: &Args) -> Result<Self> {
        let ids = decoder.tokenizer.encode(text, false)?;
        let start = decoder.tokenizer.encode("", true)?;
        let whole = ids.len() + start.len();
        if whole < 3 {
            bail!("it has {whole} tokens, expected at least 3");
        }
        let longest = decoder.model.config().max_position_embeddings;
        let context = args.context.unwrap_or(USUAL_CONTEXT.min(longest).min(whole));
        if context < 3 || context > longest {
            bail!("a context of {context} tokens, expected 3 to {longest}, which the model takes");
        }
        let front = start.len();
        if context <= front {
            bail!(
                "a context of {context} tokens, {front} of which the tokenizer puts in front of any text"
            );
        }
        if whole < context {
            bail!("it has {whole} tokens, expected at least --context {context}");
        }
        let windows = ids
            .chunks_exact(context - front)
            .take(args.chunks.unwrap_or(usize::MAX))
            .map(|chunk| [&start[..], chunk].concat())
            .collect();
        Ok(Self { windows, context })
    }

    pub fn len(&self) -> usize {
        self.windows.len()
    }

    pub fn context(&self) -> usize {
        self.context
    }

    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.windows.iter().map(Vec::as_slice)
    }
}

/// What becomes of the predictions for the second half of a window. The time of each model's
/// layers is added to `times`.
pub fn compare(
    models: [&LlamaModel; 2],
    ids: &[u32],
    args: &Args,
    times: &mut [Duration; 2],
) -> Result<Vec<TokenDrift>> {
    let mut hidden = Vec::with_capacity(2);
    for (model, time) in models.iter().zip(times) {
        let start = Instant::now();
        hidden.push(hidden_states(model, ids, args)?);
        *time += start.elapsed();
    }
    let first = ids.len() / 2;
    let mut tokens = Vec::with_capacity(ids.len() - first);
    // The last token predicts one that is not in the window.
    for start in (first..ids.len() - 1).step_by(SLICE) {
        let len = SLICE.min(ids.len() - 1 - start);
        let logits = |model: usize| -> Result<Vec<f32>> {
            let hidden = hidden[model].narrow(0, start, len)?;
            Ok(models[model].logits(&hidden)?.flatten_all()?.to_vec1()?)
        };
        let (fp32, int8) = (logits(0)?, logits(1)?);
        let vocabulary = fp32.len() / len;
        let rows = fp32.par_chunks_exact(vocabulary).zip(int8.par_chunks_exact(vocabulary));
        let came = ids[start + 1..][..len].par_iter();
        let drift = |((a, b), &token): ((&[f32], &[f32]), &u32)| {
            TokenDrift::of_logits(a, b, token as usize)
        };
        let found: Result<Vec<_>, _> = rows.zip(came).map(drift).collect();
        tokens.extend(found?);
    }
    Ok(tokens)
}

/// `[N, hidden_size]`.
fn hidden_states(model: &LlamaModel, ids: &[u32], args: &Args) -> Result<Tensor> {
    let mut cache = args.cache.new_cache(model, ids.len())?;
    let ids = Tensor::new(ids, model.device())?.unsqueeze(0)?;
    Ok(model.hidden_states(&ids, &mut cache)?.squeeze(0)?)
}
