//! Runs a model in fp32 and in int8 on the same passages, and gathers what differs.

pub(crate) mod call;
mod check;
mod measure;
pub(crate) mod state;
mod words;

pub use words::{MovedSentence, MovedWord, Target};

use super::explain::HeadShape;
use super::layers::flat;
use super::linear::{LinearSums, Substitutes};
use super::merge::Merge;
use super::subject::Subject;
use super::{Candidate, Distribution, ErrorSums};
use crate::attention::AttentionConfig;
use crate::models::LayeredModel;
use crate::{Error, Result};
use call::{Path, Ran, Reference};
use candle_core::Tensor;
use measure::{Compared, Input};
use rayon::prelude::*;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use state::{CandidateState, LayerState};
use words::{Passage, Worst};

/// Runs a model's fp32 and int8 paths on the same passages; what it holds does not grow with the
/// number of passages.
///
/// Each configuration is measured twice on every layer: *alone*, where both paths get the fp32
/// path's input, so that the layer's own error is seen; and *accumulated*, where each path goes on
/// with its own. Per head it compares Q and K as their codes have them, scores, probabilities and
/// the attention output; per layer what leaves it; and at the end the model's embedding.
///
/// Recorders that saw different passages can be merged, also after a way through JSON: the figures
/// are those of one recorder that saw all, whatever the order. What is read back is checked: parts
/// that cannot be of one recorder are an error.
///
/// A passage of `N` tokens takes memory for a few `[H, N, N]` matrices while it is measured.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::drift::{Candidate, Recorder};
/// use candle_int8_attention::models::{BertModel, ModelFiles};
///
/// let files = ModelFiles::from_dir("models/paraphrase-MiniLM-L3-v2")?;
/// let model = BertModel::load(&files, &Device::Cpu)?; // or a model of your own
/// let mut recorder = Recorder::new(vec![Candidate::default()])?;
/// let (ids, words) = (Tensor::new(&[[101u32, 7592, 102]], &Device::Cpu)?, ["", "hello", ""]);
/// recorder.record(&model, &ids, &words.map(String::from), 0)?;
/// println!("{}", recorder.report().to_text());
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct Recorder {
    #[serde(skip)]
    configs: Vec<Candidate>,
    pub(super) subject: Subject,
    pub(super) candidates: Vec<CandidateState>,
    /// `[layer][head]`.
    pub(super) shapes: Vec<Vec<HeadShape>>,
    pub(super) worst: Worst,
    /// Seconds of one layer's attention in fp32.
    pub(super) fp32_seconds: Distribution,
    pub(super) passages: u64,
    pub(super) tokens: u64,
    /// Of the same passages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) linear: Option<LinearSums>,
}

// With `remote`, what is derived are functions of the type itself, which these call.
impl Serialize for Recorder {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        Self::serialize(self, to)
    }
}

impl<'de> Deserialize<'de> for Recorder {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
        let read = Self::deserialize(from)?;
        read.check().map_err(D::Error::custom)?;
        Ok(read)
    }
}

/// Embeddings of one passage, flat.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Embeddings {
    /// Of the fp32 path.
    pub fp32: Vec<f32>,
    /// Of each configuration, with int8 in every layer.
    pub int8: Vec<Vec<f32>>,
}

impl Recorder {
    /// A recorder that compares these configurations with fp32. The first one is the one that is
    /// explained and whose words are shown.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no configuration at all.
    pub fn new(configs: Vec<Candidate>) -> Result<Self> {
        if configs.is_empty() {
            return Err(Error::InvalidArgument(
                "no configuration to measure, expected one or more".into(),
            ));
        }
        let state = |candidate: &Candidate| CandidateState {
            name: candidate.name.clone(),
            description: candidate.description(),
            ..CandidateState::default()
        };
        Ok(Self {
            subject: Subject::default(),
            candidates: configs.iter().map(state).collect(),
            shapes: Vec::new(),
            worst: Worst::default(),
            fp32_seconds: Distribution::default(),
            passages: 0,
            tokens: 0,
            linear: None,
            configs,
        })
    }

    /// Says what is measured: the model, the texts.
    pub fn set_subject(&mut self, subject: Subject) {
        self.subject = subject;
    }

    /// What was said to be measured.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The names of the configurations, in the order of [`Recorder::new`].
    pub fn configs(&self) -> impl Iterator<Item = &str> {
        self.candidates.iter().map(|candidate| candidate.name.as_str())
    }

    /// How many passages were recorded.
    pub fn passages(&self) -> u64 {
        self.passages
    }

    /// Runs one passage. `words` holds the text of each token, with the space before it where a
    /// word starts, so that all of them joined are the passage; `index` is the passage's number in
    /// the whole text, the same however the text is spread over recorders.
    ///
    /// # Errors
    /// Those of the model and of [`attention`](crate::attention()); [`Error::NonFinite`] for NaN
    /// or infinity in queries or keys; [`Error::Mismatch`] for a layer that does not call attention
    /// exactly once, or with other shapes in int8 than in fp32, or other layers or heads than before;
    /// [`Error::Unsupported`] for a model of no layers, or a recorder that came from JSON;
    /// [`Error::Shape`] for several sequences at once, or a number of words that is not the number of
    /// tokens. Nothing of the passage is counted then.
    pub fn record<M: LayeredModel>(
        &mut self,
        model: &M,
        input: &M::Input,
        words: &[String],
        index: u64,
    ) -> Result<Embeddings> {
        if self.configs.len() != self.candidates.len() {
            return Err(Error::Unsupported("a recorder that was read back cannot go on".into()));
        }
        // On its own, so that an error in a late layer leaves nothing of the first ones behind.
        let mut passage = Self::new(self.configs.clone())?;
        let embeddings = passage.record_alone(model, input, words, index)?;
        self.check_heads(&passage)?;
        self.add(&passage);
        Ok(embeddings)
    }

    /// Runs a passage that was given to [`Recorder::record`] once more, with each linear layer substituted;
    /// see [`LinearSums::record`]. A report over passages of which some were not is none of linear layers.
    ///
    /// # Errors
    /// Those of [`LinearSums::record`]. Nothing of the passage is counted then.
    pub fn record_linear<M: LayeredModel>(
        &mut self,
        model: &mut M,
        substitutes: &mut Substitutes,
        input: &M::Input,
    ) -> Result<()> {
        let sums = self.linear.get_or_insert_with(|| LinearSums::new(substitutes));
        sums.record(model, substitutes, input)
    }

    /// [`Recorder::record`] of the first passage.
    fn record_alone<M: LayeredModel>(
        &mut self,
        model: &M,
        input: &M::Input,
        words: &[String],
        index: u64,
    ) -> Result<Embeddings> {
        if model.attention().is_empty() {
            return Err(Error::Unsupported("a model of no layers, expected at least one".into()));
        }
        let hidden = model.embed(input)?;
        if *hidden.dims() != [1, words.len(), hidden.elem_count() / words.len().max(1)] {
            return Err(Error::Shape {
                op: "Recorder::record",
                tensor: "what the model embeds",
                shape: hidden.dims().to_vec(),
                expected: format!("[1, {}, hidden], one row a word", words.len()),
            });
        }
        let mut passage = Passage::new(index, words);
        let mut fp32 = hidden.clone();
        let mut own = vec![hidden; self.configs.len()];
        for layer in 0..model.attention().len() {
            fp32 = self.record_layer(model, layer, &fp32, &mut own, &mut passage)?;
        }
        passage.finish(&mut self.worst);
        self.passages += 1;
        self.tokens += words.len() as u64;

        let fp32 = flat(&model.embedding(&fp32)?)?;
        let int8 = own.iter().map(|hidden| flat(&model.embedding(hidden)?));
        let int8 = int8.collect::<Result<Vec<_>>>()?;
        for (state, int8) in self.candidates.iter_mut().zip(&int8) {
            state.embedding.push(&ErrorSums::of(&fp32, int8)?);
        }
        Ok(Embeddings { fp32, int8 })
    }

    /// One layer of all paths; gives the fp32 path's output, and leaves that of each
    /// configuration in `own`.
    fn record_layer<M: LayeredModel>(
        &mut self,
        model: &M,
        layer: usize,
        hidden: &Tensor,
        own: &mut [Tensor],
        passage: &mut Passage<'_>,
    ) -> Result<Tensor> {
        let config: AttentionConfig = model.attention()[layer].config().clone();
        let run = |path: Path<'_>, hidden: &Tensor| {
            call::run(layer, path, &config, &mut |attend| model.layer(layer, hidden, attend))
        };
        let fp32 = run(None, hidden)?;
        self.fp32_seconds.push(fp32.seconds);
        let reference = Reference::of(&fp32.call)?;
        self.make_room(reference.dims.heads);
        let shapes = self.shapes[layer].par_iter_mut().enumerate();
        shapes.for_each(|(head, shape)| shape.push(&reference, head, passage.words, passage.index));

        let compared = Compared { reference: &reference, fp32: &fp32 };
        let exact = flat(&fp32.hidden)?;
        for (i, candidate) in self.configs.iter().enumerate() {
            let state = &mut self.candidates[i];
            let LayerState { heads, alone, accumulated } = &mut state.layers[layer];

            let time = |ran: &Ran, seconds: &mut Distribution| {
                if !candidate.in_bf16 {
                    seconds.push(ran.seconds);
                }
            };
            let ran = run(Some(candidate), hidden)?;
            time(&ran, &mut state.seconds);
            let (kl, stages) = compared.add(heads, Input::Same, &ran, candidate)?;
            alone.push(&ErrorSums::of(&exact, &flat(&ran.hidden)?)?);
            if i == 0 {
                passage.add(layer, &kl, &reference, &stages.probabilities)?;
                compared.add_sources(heads, &stages, candidate)?;
            }

            let ran = run(Some(candidate), &own[i])?;
            time(&ran, &mut state.seconds);
            compared.add(heads, Input::Own, &ran, candidate)?;
            accumulated.push(&ErrorSums::of(&exact, &flat(&ran.hidden)?)?);
            own[i] = ran.hidden;
        }
        Ok(fp32.hidden)
    }

    /// Makes the accumulators of a layer.
    fn make_room(&mut self, heads: usize) {
        self.shapes.push(vec![HeadShape::default(); heads]);
        for state in &mut self.candidates {
            state.layers.push(LayerState::new(heads));
        }
    }

    /// Adds what another recorder gathered from other passages.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if it recorded another model or other configurations,
    /// [`Error::Contradiction`] if it recorded passages that this one has too; nothing is changed then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.check_same(other)?;
        let subject = self.subject.merged(&other.subject)?;
        match (&mut self.linear, &other.linear) {
            (Some(linear), Some(other)) => linear.merge(other)?,
            // A part of a text may hold no passage.
            (None, Some(linear)) if self.passages == 0 => self.linear = Some(linear.clone()),
            (Some(_), None) if other.passages > 0 => return Err(half_measured()),
            (None, Some(_)) => return Err(half_measured()),
            (_, None) => {}
        }
        self.subject = subject;
        self.add(other);
        Ok(())
    }

    /// Adds what was gathered with the same configurations from layers with the same heads.
    fn add(&mut self, other: &Self) {
        if self.shapes.is_empty() {
            self.shapes.clone_from(&other.shapes);
            self.candidates.clone_from(&other.candidates);
        } else if !other.shapes.is_empty() {
            self.shapes.merge(&other.shapes);
            self.candidates.merge(&other.candidates);
        }
        self.worst.merge(&other.worst);
        self.fp32_seconds.merge(&other.fp32_seconds);
        self.passages += other.passages;
        self.tokens += other.tokens;
    }

    fn check_same(&self, other: &Self) -> Result<()> {
        let names = |r: &Self| -> Vec<String> {
            r.candidates.iter().map(|c| format!("{} ({})", c.name, c.description)).collect()
        };
        if names(self) != names(other) {
            return Err(Error::Mismatch(format!(
                "results of different configurations: {} and {}",
                names(self).join("; "),
                names(other).join("; ")
            )));
        }
        self.check_heads(other)
    }

    fn check_heads(&self, other: &Self) -> Result<()> {
        let heads = |r: &Self| r.shapes.iter().map(Vec::len).collect::<Vec<_>>();
        if heads(self) != heads(other) && !self.shapes.is_empty() && !other.shapes.is_empty() {
            return Err(Error::Mismatch(format!(
                "results of different models: heads of their layers {:?} and {:?}",
                heads(self),
                heads(other)
            )));
        }
        Ok(())
    }
}

/// Figures over a part of the passages would look like those of all.
fn half_measured() -> Error {
    Error::Mismatch("only one of the results has measured linear layers".into())
}
