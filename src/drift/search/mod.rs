//! The cheapest attention of each layer, and the cheapest precision of each linear layer, that keep a drift
//! budget.
//!
//! Every candidate setting is measured in every layer: how long its attention takes, and how far
//! its output is from fp32. A setting that is neither faster nor more accurate than another is
//! dropped. What is left is chosen from:
//!
//! * [`Budget::AttentionOutput`]: each layer by itself gets the fastest setting that keeps it.
//! * [`Budget::Embedding`]: all layers start with their fastest setting; while the embedding of the
//!   whole model is too far off, the layer where a step up buys the most accuracy for its time goes
//!   one step up, and the model is measured again. A last pass takes back steps that turned out to
//!   be needless.
//!
//! Linear layers, where [`SearchConfig::linear`] names precisions for them, are chosen with the second
//! budget, each product as if it were a layer: what it saves against what the embedding loses.
//!
//! A layer that no candidate can hold stays in fp32. At the end the choice is measured on passages
//! that it has not seen.

mod choose;
mod linear;
mod speed;

use super::layers::{LayerErrors, attention_errors, embedding_error, embeddings, fp32};
use super::metrics::lowest;
use crate::attention::{AttentionConfig, Backend, Int8Config, PvPrecision, ScoreConfig};
use crate::models::{LayerSettings, LayeredModel, LinearSetting};
use crate::nn::Precision;
use crate::quant::{Granularity, Scheme};
use crate::{Error, Result};
use choose::{Choice, Menu};
use linear::LinearOptions;
use serde::Serialize;

/// The drift that is accepted, as a signal-to-noise ratio in dB.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// Of the attention output of every layer, mean over heads, with fp32 input to the layer.
    AttentionOutput(f64),
    /// Of the [embedding](LayeredModel::embedding) of a passage, all layers switched.
    Embedding(f64),
}

impl Budget {
    /// The ratio itself.
    pub fn decibel(self) -> f64 {
        match self {
            Budget::AttentionOutput(db) | Budget::Embedding(db) => db,
        }
    }
}

/// What is searched, and for what.
///
/// More fields may be added: end an expression in `..SearchConfig::new(budget)`.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchConfig {
    /// The drift that is accepted.
    pub budget: Budget,
    /// The search aims this many dB above the budget, because other text drifts a little more.
    pub margin_db: f64,
    /// The configurations to choose from; fp32 is always one of them.
    pub candidates: Vec<Int8Config>,
    /// The precisions to choose from for linear layers, beside the model's own, which is one of them; without
    /// any, linear layers stay as they are. With a budget for the embedding.
    pub linear: Vec<Precision>,
    /// How often every attention and every linear layer is timed; the fastest counts.
    pub rounds: usize,
}

impl SearchConfig {
    /// A margin of 1 dB, [`candidates`], linear layers as they are, 5 rounds.
    pub fn new(budget: Budget) -> Self {
        let (candidates, linear) = (candidates(), Vec::new());
        Self { budget, margin_db: 1.0, candidates, linear, rounds: 5 }
    }

    fn check(&self) -> Result<()> {
        for (what, x) in [("budget", self.budget.decibel()), ("margin", self.margin_db)] {
            if !x.is_finite() {
                return Err(Error::InvalidArgument(format!(
                    "{what} {x} dB, expected a finite number"
                )));
            }
        }
        if matches!(self.budget, Budget::AttentionOutput(_)) && !self.linear.is_empty() {
            return Err(Error::InvalidArgument(
                "linear layers are chosen by a budget for the embedding, and this one is for the \
                 attention output"
                    .into(),
            ));
        }
        if self.rounds == 0 {
            return Err(Error::InvalidArgument("0 rounds, expected at least 1".into()));
        }
        Ok(())
    }
}

/// Per tensor, head and token as they are, with both sides smoothed by blocks, and with all that the default
/// does, symmetric; per token with all of it, affine; each with P·V in every precision: f32, the default of
/// this machine, int8.
pub fn candidates() -> Vec<Int8Config> {
    use Granularity::{PerHead, PerTensor, PerToken};
    let of = |scheme, granularity| {
        let plain = ScoreConfig::plain(scheme, granularity);
        let (q, k) = (plain.q.clone(), plain.k.clone());
        let whole = ScoreConfig { q, k, ..ScoreConfig::default() };
        [plain, ScoreConfig { rotate: false, outliers: false, ..whole.clone() }, whole]
    };
    let symmetric = [PerTensor, PerHead, PerToken];
    let symmetric =
        symmetric.into_iter().flat_map(|granularity| of(Scheme::Symmetric, granularity));
    let [.., affine] = of(Scheme::Affine, PerToken);
    let precisions = [PvPrecision::Int8, PvPrecision::Auto, PvPrecision::F32];
    let all = symmetric.chain([affine]);
    all.flat_map(|scores| precisions.map(|pv| Int8Config { scores: scores.clone(), pv })).collect()
}

/// What the search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Found {
    /// The budget that was asked for.
    pub budget: Budget,
    /// How far above it the search aimed.
    pub margin_db: f64,
    /// The layers, first to last.
    pub layers: Vec<FoundLayer>,
    /// The linear layers, in the order of [`LayeredModel::linear_mut`]; none if they were not searched.
    pub linear: Vec<FoundLinear>,
    /// Time of all attention layers for a passage, in seconds.
    pub seconds: f64,
    /// The same in fp32 by [`attention`](crate::attention()), which is slower than the BERT encoder's
    /// own fp32 attention.
    pub fp32_seconds: f64,
    /// On the passages that were searched.
    pub promised: Figures,
    /// On passages that were not.
    pub verified: Figures,
}

/// The choice for one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FoundLayer {
    /// What was chosen.
    pub setting: Backend,
    /// Time of its attention for a passage, in seconds.
    pub seconds: f64,
    /// The same in fp32.
    pub fp32_seconds: f64,
}

/// The choice for one linear layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FoundLinear {
    /// What was chosen, and for which layer.
    #[serde(flatten)]
    pub setting: LinearSetting,
    /// Time for a passage, in seconds.
    pub seconds: f64,
    /// The same in the precision that the model came with.
    pub own_seconds: f64,
    /// Signal-to-noise ratio of the embedding with this one alone switched, in dB; in JSON `null` if there is
    /// no difference.
    pub alone_sqnr_db: f64,
}

/// The drift of a choice.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Figures {
    /// Signal-to-noise ratio of the embedding, in dB; in JSON `null` if there is no difference.
    pub embedding_sqnr_db: f64,
    /// Mean over heads of the ratio of each layer's attention output.
    pub layer_sqnr_db: Vec<f64>,
    /// The lowest ratio of any head of each layer.
    pub worst_head_db: Vec<f64>,
}

impl Figures {
    /// The ratio that the budget is about.
    pub fn of(&self, budget: Budget) -> f64 {
        match budget {
            Budget::AttentionOutput(_) => lowest(self.layer_sqnr_db.iter().copied()),
            Budget::Embedding(_) => self.embedding_sqnr_db,
        }
    }
}

impl Found {
    /// Whether the budget was kept on the passages that were not searched.
    pub fn holds(&self) -> bool {
        self.verified.of(self.budget) >= self.budget.decibel()
    }

    /// The choice as a file for models, with what was measured in `about`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the figures cannot be written as JSON, which they have no reason for.
    pub fn settings(&self) -> Result<LayerSettings> {
        let layers = self.layers.iter().map(|layer| layer.setting.clone()).collect();
        let linear = self.linear.iter().map(|product| product.setting.clone()).collect();
        LayerSettings::new(layers).with_linear(linear).with_about(self)
    }
}

/// Searches on `passages` and verifies on `unseen` ones. `progress` is
/// told what goes on. The model has its own attention and linear layers again afterwards; what it says
/// about scale, softcap and windows is kept in every setting.
///
/// # Errors
/// [`Error::InvalidArgument`] for a budget that is not a number, without passages, or for precisions of linear
/// layers with a budget for the attention output; [`Error::Unsupported`] for precisions of linear layers of a
/// model that has none to choose for, as decoders; those of the model.
pub fn search<M: LayeredModel<Input: Sized>>(
    model: &mut M,
    (passages, unseen): (&[M::Input], &[M::Input]),
    config: &SearchConfig,
    progress: &mut dyn FnMut(&str),
) -> Result<Found> {
    config.check()?;
    for (what, count) in [("to search", passages.len()), ("to verify", unseen.len())] {
        if count == 0 {
            return Err(Error::InvalidArgument(format!(
                "no passage {what}, expected at least one"
            )));
        }
    }
    let bases: Vec<AttentionConfig> =
        model.attention().into_iter().map(|layer| layer.config().clone()).collect();
    let linear = LinearOptions::new(model, &config.linear)?;
    let mut searcher =
        Searcher { model: &mut *model, bases: &bases, linear, passages, config, progress };
    let found = searcher.run(unseen);
    searcher.set_own();
    set(model, &bases);
    found
}

fn set(model: &mut impl LayeredModel, configs: &[AttentionConfig]) {
    for (layer, config) in model.attention_mut().into_iter().zip(configs) {
        layer.set_config(config.clone());
    }
}

/// One choice for the whole model.
struct Setting {
    /// First layer first.
    attention: Vec<Backend>,
    /// Of each product, as [`LinearOptions::choose`] takes it.
    linear: Vec<usize>,
}

struct Searcher<'a, M: LayeredModel<Input: Sized>> {
    model: &'a mut M,
    /// What each layer was configured with.
    bases: &'a [AttentionConfig],
    linear: LinearOptions,
    passages: &'a [M::Input],
    config: &'a SearchConfig,
    progress: &'a mut dyn FnMut(&str),
}

impl<M: LayeredModel<Input: Sized>> Searcher<'_, M> {
    fn run(&mut self, unseen: &[M::Input]) -> Result<Found> {
        let int8 = self.config.candidates.iter().cloned().map(Backend::Int8);
        let mut candidates: Vec<Backend> = int8.chain([Backend::Fp32]).collect();
        candidates.dedup();
        let (layers, passages) = (self.bases.len(), self.passages.len());
        (self.progress)(&format!(
            "settings: {}, layers: {layers}, passages: {passages}",
            candidates.len()
        ));
        self.set_own();
        let seconds =
            speed::attention_seconds(&*self.model, self.passages, &candidates, self.config.rounds)?;
        let errors = self.errors(self.passages, &candidates)?;
        let mut menus: Vec<Menu> = (0..layers)
            .map(|layer| {
                let options = (0..candidates.len()).map(|index| Choice {
                    candidate: index,
                    seconds: seconds[layer][index],
                    noise: errors[index][layer].noise(),
                    sqnr_db: errors[index][layer].mean_sqnr_db(),
                });
                Menu::new(options.collect())
            })
            .collect();
        let rounds = self.config.rounds;
        menus.extend(self.linear.menus(&mut *self.model, self.passages, rounds)?);
        let target = self.config.budget.decibel() + self.config.margin_db;
        let chosen = match self.config.budget {
            Budget::AttentionOutput(_) => {
                menus.iter().map(|menu| menu.cheapest_with(target)).collect()
            }
            Budget::Embedding(_) => self.by_embedding(&menus, &candidates, target)?,
        };
        let chosen: Vec<Choice> =
            menus.iter().zip(&chosen).map(|(menu, &index)| menu.get(index)).collect();
        let exact = candidates.len() - 1;
        let found_layers: Vec<FoundLayer> = (chosen[..layers].iter().zip(&seconds))
            .map(|(choice, seconds)| FoundLayer {
                setting: candidates[choice.candidate].clone(),
                seconds: choice.seconds,
                fp32_seconds: seconds[exact],
            })
            .collect();
        let linear = (chosen[layers..].iter().zip(&menus[layers..])).enumerate();
        let linear = linear.map(|(product, (choice, menu))| FoundLinear {
            setting: self.linear.setting(product, choice.candidate),
            seconds: choice.seconds,
            own_seconds: menu.most_accurate().seconds,
            alone_sqnr_db: choice.sqnr_db,
        });
        let linear = linear.collect();
        let setting = self.setting(&chosen, &candidates);
        (self.progress)("verifying on text that was not searched");
        Ok(Found {
            budget: self.config.budget,
            margin_db: self.config.margin_db,
            seconds: found_layers.iter().map(|layer| layer.seconds).sum(),
            fp32_seconds: found_layers.iter().map(|layer| layer.fp32_seconds).sum(),
            promised: self.figures(self.passages, &setting)?,
            verified: self.figures(unseen, &setting)?,
            layers: found_layers,
            linear,
        })
    }

    /// Greedy, from the cheapest choice upwards, by the embedding of the whole model.
    fn by_embedding(
        &mut self,
        menus: &[Menu],
        candidates: &[Backend],
        target: f64,
    ) -> Result<Vec<usize>> {
        let reference = embeddings(&*self.model, self.passages)?;
        let what =
            if self.linear.products() > 0 { "attention and linear layers" } else { "attention" };
        let mut measure = |chosen: &[usize]| {
            let chosen: Vec<Choice> =
                menus.iter().zip(chosen).map(|(menu, &index)| menu.get(index)).collect();
            let setting = self.setting(&chosen, candidates);
            self.set(&setting);
            let found = embeddings(&*self.model, self.passages)?;
            let energy = embedding_error(&reference, &found)?;
            let seconds: f64 = chosen.iter().map(|choice| choice.seconds).sum();
            (self.progress)(&format!(
                "embedding {:.1} dB in {:.2} ms of {what}",
                energy.sqnr_db(),
                1e3 * seconds
            ));
            Ok(energy)
        };
        choose::greedy(menus, target, &mut measure)
    }

    /// `[candidate][layer]`
    fn errors(
        &self,
        passages: &[M::Input],
        candidates: &[Backend],
    ) -> Result<Vec<Vec<LayerErrors>>> {
        let everywhere = |setting: &Backend| self.configs(&vec![setting.clone(); self.bases.len()]);
        let configs: Vec<Vec<AttentionConfig>> = candidates.iter().map(everywhere).collect();
        attention_errors(&*self.model, passages, &configs)
    }

    /// What a choice does to passages.
    fn figures(&mut self, passages: &[M::Input], setting: &Setting) -> Result<Figures> {
        self.set_own();
        let reference = embeddings(&*self.model, passages)?;
        let layers = self.configs(&setting.attention);
        let layers = attention_errors(&*self.model, passages, &[layers])?.remove(0);
        self.set(setting);
        let found = embeddings(&*self.model, passages)?;
        Ok(Figures {
            embedding_sqnr_db: embedding_error(&reference, &found)?.sqnr_db(),
            layer_sqnr_db: layers.iter().map(LayerErrors::mean_sqnr_db).collect(),
            worst_head_db: layers.iter().map(LayerErrors::worst_head_db).collect(),
        })
    }

    /// What all else is compared with: attention in fp32, the model's own linear layers.
    fn set_own(&mut self) {
        let configs: Vec<AttentionConfig> = self.bases.iter().map(fp32).collect();
        set(self.model, &configs);
        self.linear.restore(self.model);
    }

    fn set(&mut self, setting: &Setting) {
        let configs = self.configs(&setting.attention);
        set(self.model, &configs);
        self.linear.choose(self.model, &setting.linear);
    }

    /// Choices of the layers' attention, and behind them of the linear layers.
    fn setting(&self, chosen: &[Choice], candidates: &[Backend]) -> Setting {
        let (attention, linear) = chosen.split_at(self.bases.len());
        Setting {
            attention: attention.iter().map(|of| candidates[of.candidate].clone()).collect(),
            linear: linear.iter().map(|of| of.candidate).collect(),
        }
    }

    /// What each layer was configured with, by these backends.
    fn configs(&self, settings: &[Backend]) -> Vec<AttentionConfig> {
        let of_layer =
            |(base, setting): (&AttentionConfig, &Backend)| base.with_backend(setting.clone());
        self.bases.iter().zip(settings).map(of_layer).collect()
    }
}
