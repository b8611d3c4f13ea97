//! An encoder of the family that its configuration names.

use super::encoder::{self, Encoder, EncoderConfig};
use super::files::{parse, unused_head};
use super::layered::{Attend, LayeredModel, NamedLinear};
use super::modernbert::ModernBertModel;
use super::pooling::mean_pool;
use super::{ModelFiles, Weights, bert, distilbert, roberta};
use crate::attention::{AttentionConfig, QuantizedAttention};
use crate::files::read_text;
use crate::nn::{Linear, Precision, load_linear, save_linear};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// An encoder with a switchable attention per layer: BERT, RoBERTa and XLM-RoBERTa, DistilBERT,
/// ModernBERT.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::AttentionConfig;
/// use candle_int8_attention::models::{EncoderModel, ModelFiles};
///
/// let files = ModelFiles::from_dir("all-distilroberta-v1")?;
/// let mut model = EncoderModel::load(&files, &Device::Cpu)?;
/// model.set_attention(&AttentionConfig::int8());
/// let ids = Tensor::new(&[[0u32, 31414, 232, 2]], &Device::Cpu)?;
/// assert_eq!(model.forward(&ids, None, None)?.dims(), [1, 4, model.config().hidden_size]);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
pub struct EncoderModel {
    family: Box<dyn Encoder>,
    warnings: Vec<String>,
}

impl EncoderModel {
    /// What `model_type` may be.
    pub const FAMILIES: [&str; 6] =
        ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert"];

    /// Loads the family that `model_type` in the configuration names (`bert` where it names none);
    /// all layers start with fp32 attention. Names of tensors may stand behind a prefix
    /// (`bert.`, `roberta.`, `distilbert.`, `model.`, and `0.auto_model.` before it); poolers and the
    /// heads that masked words were predicted with are not used.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another family, those of [`Weights::open`] and [`Weights::get`],
    /// and for a configuration those of [`BertConfig::load`](super::BertConfig::load).
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let (mut model, weights) = Self::open(files, device)?;
        model.warnings = weights.unused_head().map(unused_head).into_iter().collect();
        Ok(model)
    }

    /// The model, and the weights it was loaded from, for whoever reads a head of them.
    pub(super) fn open(files: &ModelFiles, device: &Device) -> Result<(Self, Weights)> {
        #[derive(Deserialize)]
        struct Type {
            model_type: Option<String>,
        }
        let path = &files.config;
        let Type { model_type } = parse(path, &read_text("config", path)?, "an encoder")?;
        let open = match model_type.as_deref() {
            None | Some("bert") => bert::open,
            Some("roberta" | "xlm-roberta" | "camembert") => roberta::open,
            Some("distilbert") => distilbert::open,
            Some("modernbert") => ModernBertModel::open,
            Some(other) => {
                return Err(Error::Unsupported(format!(
                    "{}: model_type {other:?}, expected one of {:?}",
                    path.display(),
                    Self::FAMILIES
                )));
            }
        };
        let weights = Weights::open(&files.weights)?.with_prefix_if_present("0.auto_model.");
        let (family, weights) = open(weights, path, device)?;
        Ok((Self { family, warnings: Vec::new() }, weights))
    }

    /// What of the files is not computed with, and changes what the model is: in sentences, for
    /// people.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What all families have.
    pub fn config(&self) -> EncoderConfig {
        self.family.config()
    }

    /// The raw word embedding table, `[vocab_size, hidden_size]`.
    pub fn word_embeddings(&self) -> &Tensor {
        self.family.embeddings().words()
    }

    /// Switches the attention of all layers. Windows stay as the model has them.
    pub fn set_attention(&mut self, config: &AttentionConfig) {
        self.family.set_attention(config);
    }

    /// Packs the weights of the linear layers of all layers in this precision; see
    /// [`BertModel::set_linear`](super::BertModel::set_linear).
    ///
    /// # Errors
    /// Those of [`BertModel::set_linear`](super::BertModel::set_linear).
    pub fn set_linear(&mut self, precision: Precision) -> Result<()> {
        encoder::set_linear(self, precision)
    }

    /// Writes the linear layers as they are packed, by layer and product (`0.qkv`), for
    /// [`EncoderModel::load_linear`].
    ///
    /// # Errors
    /// Those of [`save_linear`].
    pub fn save_linear(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let layers: Vec<_> = self.family.linear_mut().into_iter().map(named).collect();
        save_linear(path, layers.iter().map(|(name, linear)| (name.as_str(), &**linear)))
    }

    /// Takes the linear layers that [`EncoderModel::save_linear`] wrote for a model with these weights: the
    /// same bits, without rotating and rounding again. Attention, embeddings and norms stay as they are.
    ///
    /// # Errors
    /// Those of [`load_linear`]; [`Error::Mismatch`] naming the first layer that is missing, has another shape,
    /// or is not one of the model. The model is then as it was.
    pub fn load_linear(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut found = load_linear(path)?;
        let layers: Vec<_> = self.family.linear_mut().into_iter().map(named).collect();
        check_packed(&layers, &found).map_err(|problem| {
            Error::Mismatch(format!("the packed layers in {}: {problem}", path.display()))
        })?;
        for (name, linear) in layers {
            *linear = found.remove(&name).expect("checked to be there");
        }
        Ok(())
    }

    /// [`EncoderModel::forward`] for sequences of ids of any lengths, without padding: the last hidden states
    /// of each, `[N_i, hidden_size]`, with the bits that the sequence alone gives. Linear layers and norms
    /// work on all tokens at once; ModernBERT, whose positions turn queries and keys, on each sequence by
    /// itself.
    ///
    /// # Errors
    /// [`Error::Shape`] for a sequence longer than [`max_tokens`](EncoderConfig::max_tokens),
    /// [`Error::InvalidArgument`] for an id outside of the table, and those of
    /// [`attention`](crate::attention()).
    pub fn forward_sequences(&self, sequences: &[impl AsRef<[u32]>]) -> Result<Vec<Tensor>> {
        encoder::forward_sequences(&*self.family, sequences)
    }

    /// The last hidden states: `ids` `[B, N]` U32 to `[B, N, hidden_size]`. `types` `[B, N]` U32
    /// default to 0. `mask` `[B, N]` is 1 for tokens and 0 for padding; without it all are tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] if `N` exceeds [`max_tokens`](EncoderConfig::max_tokens) or the shapes do
    /// not fit, [`Error::DType`] unless ids are U32, [`Error::InvalidArgument`] for an id outside of
    /// its table, and those of [`attention`](crate::attention()).
    pub fn forward(
        &self,
        ids: &Tensor,
        types: Option<&Tensor>,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        encoder::run(&*self.family, ids, types, mask)
    }

    /// What follows the last layer: a norm in ModernBERT, nothing in the other families.
    ///
    /// # Errors
    /// Candle's own, for a tensor of another shape.
    pub fn finish(&self, hidden: &Tensor) -> Result<Tensor> {
        self.family.finish(hidden.clone())
    }
}

/// The input is token ids, U32 `[B, N]` without padding, all of type 0. The embedding is the mean
/// over tokens of what follows the last layer.
impl LayeredModel for EncoderModel {
    type Input = Tensor;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.family.attention()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.family.attention_mut()
    }

    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        self.family.linear_mut()
    }

    fn embed(&self, input_ids: &Tensor) -> Result<Tensor> {
        encoder::embed(&*self.family, input_ids, None)
    }

    fn sample(&self) -> Result<Option<Tensor>> {
        encoder::sample(&*self.family)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        encoder::layer(&*self.family, index, hidden, attend)
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, n, _) = hidden.dims3()?;
        let hidden = self.finish(hidden)?;
        mean_pool(&hidden, &Tensor::ones((b, n), DType::U32, hidden.device())?)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        Some([self.config().num_attention_heads; 2])
    }
}

/// A layer by the name it has in a file.
fn named(NamedLinear { layer, name, linear }: NamedLinear<'_>) -> (String, &mut Linear) {
    (format!("{layer}.{name}"), linear)
}

/// Says where packed layers are not those of a model.
fn check_packed(
    layers: &[(String, &mut Linear)],
    packed: &BTreeMap<String, Linear>,
) -> std::result::Result<(), String> {
    for (name, linear) in layers {
        let packed = packed.get(name).ok_or(format!("no layer {name:?}, which the model has"))?;
        let (found, expected) = (packed.shape(), linear.shape());
        if found != expected {
            return Err(format!("layer {name:?} has shape {found:?}, expected {expected:?}"));
        }
    }
    let known = |name: &str| layers.iter().any(|(of_model, _)| of_model == name);
    match packed.keys().find(|name| !known(name)) {
        Some(name) => Err(format!("a layer {name:?}, which the model does not have")),
        None => Ok(()),
    }
}
