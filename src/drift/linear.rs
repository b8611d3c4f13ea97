//! What the precision of linear layers costs, product by product, and the cheapest that keeps a budget.

use super::layers::{embedding_error, embeddings};
use super::metrics::{cosine, lowest};
use crate::Result;
use crate::models::{LayeredModel, NamedLinear};
use crate::nn::{Linear, Precision};
use serde::Serialize;

/// How far the embeddings of passages are from those that a model gave before.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct EmbeddingErrors {
    /// Signal-to-noise ratio over all of them, in dB.
    pub sqnr_db: f64,
    /// The lowest cosine of a passage.
    pub min_cosine: f64,
}

impl EmbeddingErrors {
    fn of(reference: &[Vec<f32>], candidate: &[Vec<f32>]) -> Result<Self> {
        let energy = embedding_error(reference, candidate)?;
        let cosines = reference.iter().zip(candidate).map(|(a, b)| cosine(a, b));
        let min_cosine = lowest(cosines.collect::<Result<Vec<_>>>()?);
        Ok(Self { sqnr_db: energy.sqnr_db(), min_cosine })
    }
}

/// What a product costs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LinearErrors {
    /// The layer of the model, counted from 0.
    pub layer: usize,
    /// Which of its products.
    pub product: &'static str,
    /// Of the model's embeddings, with this product alone in the precision.
    pub alone: EmbeddingErrors,
    /// The same with this product and all before it.
    pub accumulated: EmbeddingErrors,
}

/// What each product of a model costs in a precision, alone and accumulated, against the model as it is.
/// Afterwards the model is as it was.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::drift::linear::linear_errors;
/// use candle_int8_attention::models::{BertModel, ModelFiles};
/// use candle_int8_attention::nn::Precision;
///
/// let files = ModelFiles::from_dir("all-MiniLM-L6-v2")?;
/// let mut model = BertModel::load(&files, &Device::Cpu)?;
/// let passage = Tensor::new(&[[101u32, 7592, 2088, 102]], &Device::Cpu)?;
/// for product in linear_errors(&mut model, &[passage], Precision::Int8)? {
///     println!("{} {}: {:.1} dB", product.layer, product.product, product.alone.sqnr_db);
/// }
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
///
/// # Errors
/// Those of the model and of [`Linear::to_precision`].
pub fn linear_errors<M: LayeredModel<Input: Sized>>(
    model: &mut M,
    passages: &[M::Input],
    precision: Precision,
) -> Result<Vec<LinearErrors>> {
    let reference = embeddings(model, passages)?;
    let names = products(model);
    let mut alone = Vec::with_capacity(names.len());
    for index in 0..names.len() {
        alone.push(errors_of(model, passages, &reference, &[(index, precision)])?);
    }
    let all: Vec<_> = (0..names.len()).map(|index| (index, precision)).collect();
    let mut found = Vec::with_capacity(names.len());
    for (index, ((layer, product), alone)) in names.into_iter().zip(alone).enumerate() {
        let accumulated = errors_of(model, passages, &reference, &all[..=index])?;
        found.push(LinearErrors { layer, product, alone, accumulated });
    }
    Ok(found)
}

/// The precision of every product, and what all of them cost together.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LinearChoice {
    /// In the order of [`LayeredModel::linear_mut`].
    pub precisions: Vec<Precision>,
    /// Against the model as it was.
    pub errors: EmbeddingErrors,
}

/// The cheapest precisions whose embeddings keep a cosine of `min_cosine`: all products begin in the first
/// of `candidates`, which is the cheapest; while the lowest cosine is below, the product that costs most by
/// itself goes to the next. The model stays in what was chosen; products that no candidate can hold stay as
/// they were.
///
/// # Errors
/// Those of [`linear_errors`].
pub fn choose_linear<M: LayeredModel<Input: Sized>>(
    model: &mut M,
    passages: &[M::Input],
    candidates: &[Precision],
    min_cosine: f64,
) -> Result<LinearChoice> {
    let reference = embeddings(model, passages)?;
    let before: Vec<Precision> = model.linear_mut().iter().map(|x| x.linear.precision()).collect();
    // The step of each product: beyond the last candidate it is as it was.
    let mut steps = vec![0; before.len()];
    let mut costs = Vec::with_capacity(candidates.len());
    for &precision in candidates {
        let mut cost = Vec::with_capacity(before.len());
        for index in 0..before.len() {
            let errors = errors_of(model, passages, &reference, &[(index, precision)])?;
            cost.push(1.0 - errors.min_cosine);
        }
        costs.push(cost);
    }
    loop {
        let chosen: Vec<_> = (steps.iter().enumerate())
            .filter_map(|(index, &step)| Some((index, *candidates.get(step)?)))
            .collect();
        let errors = errors_of(model, passages, &reference, &chosen)?;
        let worst = (0..steps.len())
            .filter_map(|index| Some((costs.get(steps[index])?[index], index)))
            .max_by(|a, b| a.0.total_cmp(&b.0));
        // Not of NaN.
        let keeps = errors.min_cosine >= min_cosine;
        match worst {
            Some((_, worst)) if !keeps => steps[worst] += 1,
            _ => {
                drop(replace(model, &chosen)?);
                let precisions = model.linear_mut().iter().map(|x| x.linear.precision()).collect();
                return Ok(LinearChoice { precisions, errors });
            }
        }
    }
}

/// Layer and name of every product.
fn products<M: LayeredModel>(model: &mut M) -> Vec<(usize, &'static str)> {
    model.linear_mut().iter().map(|NamedLinear { layer, name, .. }| (*layer, *name)).collect()
}

/// The errors with some products in other precisions, which go back afterwards.
fn errors_of<M: LayeredModel<Input: Sized>>(
    model: &mut M,
    passages: &[M::Input],
    reference: &[Vec<f32>],
    changes: &[(usize, Precision)],
) -> Result<EmbeddingErrors> {
    let before = replace(model, changes)?;
    let found = embeddings(model, passages);
    let mut all = model.linear_mut();
    before.into_iter().for_each(|(index, linear)| *all[index].linear = linear);
    EmbeddingErrors::of(reference, &found?)
}

/// Packs products in other precisions; returns what was there.
fn replace<M: LayeredModel>(
    model: &mut M,
    changes: &[(usize, Precision)],
) -> Result<Vec<(usize, Linear)>> {
    let mut all = model.linear_mut();
    let packed: Vec<(usize, Linear)> = (changes.iter())
        .map(|&(index, precision)| Ok((index, all[index].linear.to_precision(precision)?)))
        .collect::<Result<_>>()?;
    let swap = |(index, linear): (usize, Linear)| {
        (index, std::mem::replace(&mut *all[index].linear, linear))
    };
    Ok(packed.into_iter().map(swap).collect())
}
