//! Linear layers in every precision that may be chosen: what each costs, and switching them.

use super::choose::{Choice, Menu};
use crate::Result;
use crate::drift::layers::{Energy, embedding_error, embeddings};
use crate::drift::linear::Substitutes;
use crate::models::{LayeredModel, LinearSetting};
use crate::nn::Precision;
use candle_core::Tensor;
use std::time::Instant;

/// The linear layers of a model: its own, and those packed in the other precisions.
pub(super) struct LinearOptions {
    /// What the model came with, which is exact by definition.
    own: Vec<Precision>,
    substitutes: Vec<Substitutes>,
    /// Of each product the one that is in the model, an index into `substitutes`; none for its own.
    chosen: Vec<Option<usize>>,
}

impl LinearOptions {
    /// Packs every product in every precision; nothing without any.
    pub(super) fn new<M: LayeredModel>(model: &mut M, precisions: &[Precision]) -> Result<Self> {
        let own = match precisions {
            [] => Vec::new(),
            _ => model.linear_mut().iter().map(|product| product.linear.precision()).collect(),
        };
        let substitutes = precisions.iter().map(|&precision| Substitutes::new(model, precision));
        let substitutes = substitutes.collect::<Result<_>>()?;
        Ok(Self { chosen: vec![None; own.len()], own, substitutes })
    }

    /// How many products there are to choose for.
    pub(super) fn products(&self) -> usize {
        self.own.len()
    }

    /// An option of a menu as a setting of a product.
    pub(super) fn setting(&self, product: usize, option: usize) -> LinearSetting {
        let (layer, name) = self.substitutes[0].products()[product];
        let precision = self.substitutes.get(option).map(Substitutes::precision);
        let precision = precision.unwrap_or(self.own[product]);
        LinearSetting { layer, product: name.to_string(), precision }
    }

    /// Puts an option of each product into the model; beyond the last one is its own.
    pub(super) fn choose<M: LayeredModel>(&mut self, model: &mut M, options: &[usize]) {
        for (product, &option) in options.iter().enumerate() {
            let wanted = (option < self.substitutes.len()).then_some(option);
            if self.chosen[product] != wanted {
                // Out with what is there, in with what is wanted.
                for index in [self.chosen[product], wanted].into_iter().flatten() {
                    self.substitutes[index].swap(model, product);
                }
                self.chosen[product] = wanted;
            }
        }
    }

    /// The model has its own linear layers again.
    pub(super) fn restore<M: LayeredModel>(&mut self, model: &mut M) {
        self.choose(model, &vec![self.substitutes.len(); self.own.len()]);
    }

    /// What every option of each product costs: time by itself, and the error of the embedding.
    pub(super) fn menus<M: LayeredModel<Input: Sized>>(
        &mut self,
        model: &mut M,
        passages: &[M::Input],
        rounds: usize,
    ) -> Result<Vec<Menu>> {
        if self.own.is_empty() {
            return Ok(Vec::new());
        }
        let seconds = self.seconds(model, passages, rounds)?;
        let reference = embeddings(model, passages)?;
        let exact = self.substitutes.len();
        let mut menus = Vec::with_capacity(self.own.len());
        for (product, seconds) in seconds.into_iter().enumerate() {
            let mut alone = vec![exact; self.own.len()];
            let mut options = Vec::with_capacity(exact + 1);
            for (candidate, seconds) in seconds.into_iter().enumerate() {
                alone[product] = candidate;
                self.choose(model, &alone);
                let energy = match candidate == exact {
                    true => Energy::default(),
                    false => embedding_error(&reference, &embeddings(model, passages)?)?,
                };
                let (noise, sqnr_db) = (energy.noise, energy.sqnr_db());
                options.push(Choice { candidate, seconds, noise, sqnr_db });
            }
            menus.push(Menu::new(options));
        }
        self.restore(model);
        Ok(menus)
    }

    /// Seconds of each product for a passage, `[product][option]`, the model's own last. Options take turns,
    /// and products of one shape share what was measured of them all; the fastest of the rounds counts.
    fn seconds<M: LayeredModel<Input: Sized>>(
        &mut self,
        model: &mut M,
        passages: &[M::Input],
        rounds: usize,
    ) -> Result<Vec<Vec<f64>>> {
        let hidden = model.embed(&passages[0])?;
        let (_, tokens, _) = hidden.dims3()?;
        let shapes: Vec<_> = model.linear_mut().iter().map(|of| of.linear.shape()).collect();
        let options = self.substitutes.len() + 1;
        let mut seconds = vec![Vec::new(); shapes.len()];
        for (first, &shape) in shapes.iter().enumerate() {
            if shapes[..first].contains(&shape) {
                continue;
            }
            let same: Vec<usize> =
                (first..shapes.len()).filter(|&of| shapes[of] == shape).collect();
            // Time depends on shapes, not on numbers.
            let x = Tensor::ones((1, tokens, shape.1), hidden.dtype(), hidden.device())?;
            let mut fastest = vec![f64::INFINITY; options];
            for _ in 0..rounds {
                for (option, fastest) in fastest.iter_mut().enumerate() {
                    self.choose(model, &vec![option; shapes.len()]);
                    let layers = model.linear_mut();
                    let start = Instant::now();
                    for &product in &same {
                        layers[product].linear.forward(&x)?;
                    }
                    *fastest = fastest.min(start.elapsed().as_secs_f64() / same.len() as f64);
                }
            }
            same.into_iter().for_each(|product| seconds[product].clone_from(&fastest));
        }
        self.restore(model);
        Ok(seconds)
    }
}
