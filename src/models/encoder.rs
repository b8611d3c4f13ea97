//! An encoder of any family: token ids in, hidden states out.
//!
//! ```text
//! ids, token types -> embed -> layer 0 .. layer L-1 -> finish -> [B, N, hidden_size]
//! ```
//!
//! A family is a file beside this one; it fulfils [`Encoder`], and everything that is not particular
//! to it is here.

use super::bert::{BertModel, padding_call};
use super::distilbert::DistilBertModel;
use super::files::{refuse_quantized, unused_head};
use super::layered::{Attend, NamedLinear};
use super::modernbert::ModernBertModel;
use super::packed::Sequences;
use super::roberta::RobertaModel;
use super::{BertConfig, LayeredModel, ModelFiles, Weights, mean_pool};
use crate::attention::{AttentionCall, AttentionConfig, QuantizedAttention};
use crate::files::{corrupt, read_text};
use crate::memory::check_size;
use crate::nn::{Linear, Precision, load_linear, save_linear};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::path::Path;

/// What all families have, as their `config.json` says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EncoderConfig {
    /// The `model_type`: `bert`, `roberta`, ...
    pub family: &'static str,
    /// Rows of the word embedding table.
    pub vocab_size: usize,
    /// Width of a token's vector.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Heads; their dim is `hidden_size / num_attention_heads`.
    pub num_attention_heads: usize,
    /// The most tokens of an input, special ones included.
    pub max_tokens: usize,
    /// Number of token types; 1 where the model does not tell them apart.
    pub type_vocab_size: usize,
    /// The id that fills up shorter sequences of a batch.
    pub pad_token_id: u32,
}

impl EncoderConfig {
    /// `hidden_size / num_attention_heads`; 0 without any head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size.checked_div(self.num_attention_heads).unwrap_or(0)
    }

    /// That of a family with BERT's configuration; the positions are BERT's.
    pub(super) fn of(family: &'static str, config: &BertConfig) -> Self {
        Self {
            family,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            max_tokens: config.max_position_embeddings,
            type_vocab_size: config.type_vocab_size,
            pad_token_id: config.pad_token_id.unwrap_or(0),
        }
    }
}

/// What a family is made of.
pub(super) trait Encoder: Send + Sync {
    fn config(&self) -> EncoderConfig;

    /// The word embedding table, `[vocab_size, hidden_size]`.
    fn words(&self) -> &Tensor;

    /// What enters the first layer, of ids and types that were checked.
    fn embed(&self, ids: &Tensor, types: Option<&Tensor>) -> Result<Tensor>;

    /// One layer, with attention by `attend`.
    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor>;

    /// What follows the last layer.
    fn finish(&self, hidden: Tensor) -> Result<Tensor> {
        Ok(hidden)
    }

    fn attention(&self) -> Vec<&QuantizedAttention>;

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention>;

    /// Switches the attention of all layers. What the family itself asks for stays.
    fn set_attention(&mut self, config: &AttentionConfig) {
        for attention in self.attention_mut() {
            attention.set_config(config.clone());
        }
    }

    /// The linear layers, in the order in which they are multiplied.
    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>>;

    /// Whether a layer may be handed the tokens of several sequences, one after the other, where
    /// `attend` keeps them apart.
    fn packs(&self) -> bool {
        true
    }
}

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
        let weights = || -> Result<Weights> {
            Ok(Weights::open(&files.weights)?.with_prefix_if_present("0.auto_model."))
        };
        let (family, weights): (Box<dyn Encoder>, Weights) = match model_type.as_deref() {
            None | Some("bert") => {
                let (model, weights) = BertModel::open(weights()?, path, device)?;
                (Box::new(model), weights)
            }
            Some("roberta" | "xlm-roberta" | "camembert") => {
                let (model, weights) = RobertaModel::open(weights()?, path, device)?;
                (Box::new(model), weights)
            }
            Some("distilbert") => {
                let (model, weights) = DistilBertModel::open(weights()?, path, device)?;
                (Box::new(model), weights)
            }
            Some("modernbert") => {
                let (model, weights) = ModernBertModel::open(weights()?, path, device)?;
                (Box::new(model), weights)
            }
            Some(other) => {
                return Err(Error::Unsupported(format!(
                    "{}: model_type {other:?}, expected one of {:?}",
                    path.display(),
                    Self::FAMILIES
                )));
            }
        };
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
        self.family.words()
    }

    /// Switches the attention of all layers. Windows stay as the model has them.
    pub fn set_attention(&mut self, config: &AttentionConfig) {
        self.family.set_attention(config);
    }

    /// Packs the weights of the linear layers of all layers in this precision; see
    /// [`BertModel::set_linear`].
    ///
    /// # Errors
    /// Those of [`Linear::to_precision`](crate::nn::Linear::to_precision).
    pub fn set_linear(&mut self, precision: Precision) -> Result<()> {
        set_linear(&mut *self.family, precision)
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
        forward_sequences(&*self.family, sequences)
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
        run(&*self.family, ids, types, mask)
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
        embed(&*self.family, input_ids, None)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        layer(&*self.family, index, hidden, attend)
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

/// A configuration, out of the text of the file at `path`.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, text: &str, of: &str) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|e| corrupt(path, format!("not the configuration of {of}: {e}")))
}

/// Reads the configuration of a family, whose weights are not quantized.
pub(super) fn read_config<T: DeserializeOwned>(path: &Path, of: &str) -> Result<T> {
    let text = read_text("config", path)?;
    refuse_quantized(path, &text)?;
    parse(path, &text, of)
}

/// [`EncoderModel::forward`] of a family.
pub(super) fn run(
    model: &dyn Encoder,
    ids: &Tensor,
    types: Option<&Tensor>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let call: AttentionCall = match mask {
        None => AttentionCall::default(),
        Some(mask) if mask.dims() == ids.dims() => padding_call(mask)?,
        Some(mask) => {
            return Err(Error::Shape {
                op: "encoder",
                tensor: "attention_mask",
                shape: mask.dims().to_vec(),
                expected: format!("{:?} like input_ids", ids.dims()),
            });
        }
    };
    let mut hidden = embed(model, ids, types)?;
    for (index, attention) in model.attention().into_iter().enumerate() {
        hidden =
            model.layer(index, &hidden, &mut |q, k, v, _| attention.forward(q, k, v, &call))?;
    }
    model.finish(hidden)
}

/// Checks ids and types before they are looked up.
pub(super) fn embed(model: &dyn Encoder, ids: &Tensor, types: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "encoder";
    let config = model.config();
    let longest = config.max_tokens;
    if !matches!(*ids.dims(), [_, n] if n <= longest) {
        let (shape, expected) = (ids.dims().to_vec(), format!("[B, N] with N <= {longest}"));
        return Err(Error::Shape { op: OP, tensor: "input_ids", shape, expected });
    }
    // The widest of what comes of them at once: q, k and v.
    check_size(OP, "what comes of input_ids", &[ids.elem_count(), 4 * config.hidden_size])?;
    check_ids(OP, "input_ids", ids, config.vocab_size)?;
    if let Some(types) = types {
        if types.dims() != ids.dims() {
            let (shape, expected) = (types.dims().to_vec(), format!("{:?}", ids.dims()));
            return Err(Error::Shape { op: OP, tensor: "token_type_ids", shape, expected });
        }
        check_ids(OP, "token_type_ids", types, config.type_vocab_size)?;
    }
    model.embed(ids, types)
}

/// Refuses an index that is not that of a layer.
pub(super) fn layer(
    model: &dyn Encoder,
    index: usize,
    hidden: &Tensor,
    attend: &mut Attend<'_>,
) -> Result<Tensor> {
    let layers = model.config().num_hidden_layers;
    if index >= layers {
        return Err(Error::InvalidArgument(format!("layer {index}, expected less than {layers}")));
    }
    model.layer(index, hidden, attend)
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

/// [`EncoderModel::set_linear`] of a family.
pub(super) fn set_linear(model: &mut dyn Encoder, precision: Precision) -> Result<()> {
    for NamedLinear { linear, .. } in model.linear_mut() {
        *linear = linear.to_precision(precision)?;
    }
    Ok(())
}

/// [`EncoderModel::forward_sequences`] of a family.
pub(super) fn forward_sequences(
    model: &dyn Encoder,
    sequences: &[impl AsRef<[u32]>],
) -> Result<Vec<Tensor>> {
    let (device, width) = (model.words().device(), model.config().hidden_size);
    let row = |ids: &[u32]| Tensor::from_slice(ids, (1, ids.len()), device);
    let nothing = || Tensor::zeros((1, 0, width), DType::F32, device);
    if !model.packs() {
        let alone = |ids: &[u32]| match ids {
            [] => Ok(nothing()?.squeeze(0)?),
            _ => Ok(run(model, &row(ids)?, None, None)?.squeeze(0)?),
        };
        return sequences.iter().map(|ids| alone(ids.as_ref())).collect();
    }
    let packed = Sequences::new(sequences.iter().map(|ids| ids.as_ref().len()));
    // Of each by itself, because positions are those in its sequence.
    let mut embedded = Vec::with_capacity(sequences.len());
    for ids in sequences.iter().map(AsRef::as_ref).filter(|ids| !ids.is_empty()) {
        embedded.push(embed(model, &row(ids)?, None)?);
    }
    if embedded.is_empty() {
        return packed.split(&nothing()?);
    }
    let mut hidden = Tensor::cat(&embedded, 1)?;
    for (index, attention) in model.attention().into_iter().enumerate() {
        hidden =
            model.layer(index, &hidden, &mut |q, k, v, _| packed.attend(attention, q, k, v))?;
    }
    packed.split(&model.finish(hidden)?)
}

/// # Errors
/// [`Error::Mismatch`] if the weights hold more layers than the configuration.
pub(super) fn check_layers(weights: &Weights, layers: usize, before: &str) -> Result<()> {
    let beyond = format!("{before}.{layers}.");
    if weights.has_any(&beyond) {
        return Err(Error::Mismatch(format!(
            "num_hidden_layers {layers}, but the weights hold more: {beyond}*"
        )));
    }
    Ok(())
}

/// # Errors
/// [`Error::DType`] unless `ids` are U32, [`Error::InvalidArgument`] for one that is not below
/// `rows`.
fn check_ids(op: &'static str, tensor: &'static str, ids: &Tensor, rows: usize) -> Result<()> {
    if ids.dtype() != DType::U32 {
        return Err(Error::DType { op, tensor, dtype: ids.dtype(), expected: "U32" });
    }
    let flat = ids.flatten_all()?.to_vec1::<u32>()?;
    match flat.into_iter().find(|&id| id as usize >= rows) {
        Some(id) => {
            Err(Error::InvalidArgument(format!("{tensor} holds {id}, expected less than {rows}")))
        }
        None => Ok(()),
    }
}

/// Rows of a table by id, `[B, N]` to `[B, N, hidden]`, of ids that were checked.
pub(super) fn look_up(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    Ok(table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)?)
}
