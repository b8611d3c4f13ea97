//! A head that classifies sequences, behind an encoder: texts or pairs of texts in, scores out.

use super::encoder_model::EncoderModel;
use super::files::read_config;
use super::loader::Loader;
use super::pooling::Pooling;
use super::text_tokenizer::TextTokenizer;
use super::{EncoderConfig, ModelFiles, TokenBatch, Weights};
use crate::nn::{Activation, LayerNorm, Linear};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::collections::BTreeMap;

/// An encoder with the head of a Hugging Face `..ForSequenceClassification`: a classifier of texts,
/// or a cross-encoder, which reads a query and a passage as one sequence and says how well they fit.
///
/// ```no_run
/// use candle_core::Device;
/// use candle_int8_attention::models::{ModelFiles, SequenceClassifier};
///
/// let files = ModelFiles::from_dir("ms-marco-MiniLM-L6-v2")?;
/// let reranker = SequenceClassifier::load(&files, &Device::Cpu)?;
/// let query = "How many people live in Berlin?";
/// let pairs = [
///     (query, "Berlin is well known for its museums."),
///     (query, "Berlin had a population of 3,520,031 registered inhabitants."),
/// ];
/// let scores = reranker.scores(&reranker.tokenize_pairs(&pairs)?)?; // [2, 1]
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
pub struct SequenceClassifier {
    /// The encoder; switch its attention here.
    pub model: EncoderModel,
    tokenizer: TextTokenizer,
    head: Head,
    labels: Vec<String>,
    activation: ScoreActivation,
}

/// What `config.json` says of the head.
#[derive(Deserialize)]
struct Config {
    /// Names by number, which are text in JSON.
    id2label: Option<BTreeMap<u32, String>>,
    num_labels: Option<usize>,
    /// Of a cross-encoder; the other is its older place.
    sentence_transformers: Option<CrossEncoder>,
    sbert_ce_default_activation_function: Option<String>,
    // Of ModernBERT:
    classifier_pooling: Option<String>,
    classifier_activation: Option<String>,
    #[serde(default)]
    classifier_bias: bool,
    norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
}

#[derive(Deserialize)]
struct CrossEncoder {
    activation_fn: Option<String>,
}

/// What makes scores of logits.
type ScoreActivation = fn(&Tensor) -> candle_core::Result<Tensor>;

const IDENTITY: ScoreActivation = |logits| Ok(logits.clone());
const SIGMOID: ScoreActivation = candle_nn::ops::sigmoid;

/// `out(norm(act(dense(state))))`, of one state for each text.
struct Head {
    pooling: Pooling,
    dense: Linear,
    act: HeadActivation,
    /// In ModernBERT alone.
    norm: Option<LayerNorm>,
    out: Linear,
}

enum HeadActivation {
    Tanh,
    Fused(Activation),
}

impl SequenceClassifier {
    /// Loads encoder, head and tokenizer.
    ///
    /// # Errors
    /// Those of [`EncoderModel::load`] and [`TextEncoder::load`](super::TextEncoder::load);
    /// [`Error::MissingTensor`] for weights without the head of their family, [`Error::ModelShape`]
    /// for another number of labels than `id2label` has, [`Error::Unsupported`] for an activation
    /// that is not implemented.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let (model, weights) = EncoderModel::open(files, device)?;
        let encoder = model.config();
        let config: Config = read_config(&files.config, "a classifier")?;
        let labels = config.label_count();
        Ok(Self {
            tokenizer: TextTokenizer::load(files, &encoder, None, false, device)?,
            head: Head::load(&weights, &encoder, &config, labels, device)?,
            activation: config.score_activation(labels)?,
            // After the head, whose weights have as many rows.
            labels: config.labels(),
            model,
        })
    }

    /// The names of the labels, in the order of the scores.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// Texts to ids, as [`TextEncoder::tokenize`](super::TextEncoder::tokenize).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no text at all or if the tokenizer fails.
    pub fn tokenize(&self, texts: &[impl AsRef<str>]) -> Result<TokenBatch> {
        self.tokenizer.tokenize(texts, "")
    }

    /// Pairs of texts to ids, each pair as one sequence with the special tokens of the model between
    /// them. Of a pair that is too long, the end of the longer text is cut off until both are equally
    /// long, then those of both.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no pair at all or if the tokenizer fails.
    pub fn tokenize_pairs(
        &self,
        pairs: &[(impl AsRef<str>, impl AsRef<str>)],
    ) -> Result<TokenBatch> {
        self.tokenizer.tokenize_pairs(pairs)
    }

    /// What the head gives, `[B, labels]`.
    ///
    /// # Errors
    /// Those of [`EncoderModel::forward`].
    pub fn logits(&self, batch: &TokenBatch) -> Result<Tensor> {
        // Other families have no use for what their tokenizer says of types.
        let has_types = self.model.config().type_vocab_size > 1;
        let types = has_types.then_some(&batch.token_type_ids);
        let mask = &batch.attention_mask;
        let hidden = self.model.forward(&batch.input_ids, types, Some(mask))?;
        self.head.forward(&hidden, mask)
    }

    /// Logits as the configuration wants them shown, `[B, labels]`: through a sigmoid if there is one
    /// label and nothing else is said, as sentence-transformers has it, otherwise as they are.
    ///
    /// # Errors
    /// Those of [`SequenceClassifier::logits`].
    pub fn scores(&self, batch: &TokenBatch) -> Result<Tensor> {
        Ok((self.activation)(&self.logits(batch)?)?)
    }
}

impl Config {
    fn label_count(&self) -> usize {
        match &self.id2label {
            Some(names) if !names.is_empty() => names.len(),
            // As many as Hugging Face takes where nothing is said.
            _ => self.num_labels.unwrap_or(2),
        }
    }

    fn labels(&self) -> Vec<String> {
        match &self.id2label {
            Some(names) if !names.is_empty() => names.values().cloned().collect(),
            _ => (0..self.label_count()).map(|i| format!("LABEL_{i}")).collect(),
        }
    }

    fn score_activation(&self, labels: usize) -> Result<ScoreActivation> {
        let new = self.sentence_transformers.as_ref().and_then(|new| new.activation_fn.as_ref());
        let Some(class) = new.or(self.sbert_ce_default_activation_function.as_ref()) else {
            return Ok(if labels == 1 { SIGMOID } else { IDENTITY });
        };
        match class.rsplit('.').next() {
            Some("Identity") => Ok(IDENTITY),
            Some("Sigmoid") => Ok(SIGMOID),
            _ => Err(Error::Unsupported(format!(
                "activation_fn {class:?}, expected Identity or Sigmoid"
            ))),
        }
    }

    /// Which state ModernBERT's head reads.
    fn pooling(&self) -> Result<Pooling> {
        match self.classifier_pooling.as_deref() {
            None | Some("cls") => Ok(Pooling::Cls),
            Some("mean") => Ok(Pooling::Mean),
            Some(other) => Err(Error::Unsupported(format!(
                "classifier_pooling {other:?}, expected \"cls\" or \"mean\""
            ))),
        }
    }
}

impl Head {
    fn load(
        weights: &Weights,
        encoder: &EncoderConfig,
        config: &Config,
        labels: usize,
        device: &Device,
    ) -> Result<Self> {
        let hidden = encoder.hidden_size;
        let eps = config.norm_eps.or(config.layer_norm_eps).unwrap_or(1e-5);
        let (inside, outside) =
            (Loader::new(weights, eps, device), Loader::outside(weights, eps, device));
        let square =
            |from: &Loader<'_>, name: &str| from.linear(&[name.to_string()], hidden, hidden);
        let out = |name: &str| outside.linear(&[name.to_string()], labels, hidden);
        let (pooling, norm) = (Pooling::Cls, None);
        Ok(match encoder.family {
            "bert" => Self {
                pooling,
                dense: square(&inside, "pooler.dense")?,
                act: HeadActivation::Tanh,
                norm,
                out: out("classifier")?,
            },
            "roberta" => Self {
                pooling,
                dense: square(&outside, "classifier.dense")?,
                act: HeadActivation::Tanh,
                norm,
                out: out("classifier.out_proj")?,
            },
            "distilbert" => Self {
                pooling,
                dense: square(&outside, "pre_classifier")?,
                act: HeadActivation::Fused(Activation::Relu),
                norm,
                out: out("classifier")?,
            },
            _ => {
                if let Some(other) = config.classifier_activation.as_ref().filter(|a| *a != "gelu")
                {
                    let problem = format!("classifier_activation {other:?}, expected \"gelu\"");
                    return Err(Error::Unsupported(problem));
                }
                Self {
                    pooling: config.pooling()?,
                    dense: match config.classifier_bias {
                        true => square(&outside, "head.dense")?,
                        false => outside.unbiased("head.dense", [hidden; 2], 0..hidden)?,
                    },
                    act: HeadActivation::Fused(Activation::Gelu),
                    norm: Some(outside.unbiased_norm("head.norm", hidden)?),
                    out: out("classifier")?,
                }
            }
        })
    }

    /// `[B, N, hidden]` to `[B, labels]`.
    fn forward(&self, hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let state = self.pooling.forward(hidden, &mask.to_dtype(DType::U32)?)?;
        let x = match self.act {
            HeadActivation::Tanh => self.dense.forward(&state)?.tanh()?,
            HeadActivation::Fused(act) => self.dense.forward_activated(&state, act)?,
        };
        let x = match &self.norm {
            Some(norm) => norm.forward(&x)?,
            None => x,
        };
        self.out.forward(&x)
    }
}
