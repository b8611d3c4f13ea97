//! An encoder of any family: token ids in, hidden states out.
//!
//! ```text
//! ids, token types -> embed -> layer 0 .. layer L-1 -> finish -> [B, N, hidden_size]
//! ```
//!
//! A family is a file beside this one; it fulfils [`Encoder`], and everything that is not particular
//! to it is here.

use super::layered::{Attend, LayeredModel, NamedLinear, linear_in};
use super::packed::Sequences;
use super::padding::padding_call;
use super::{BertConfig, Weights};
use crate::attention::{AttentionCall, AttentionConfig, QuantizedAttention};
use crate::memory::check_size;
use crate::nn::{Embeddings, Precision, Tokens};
use crate::{Error, Result};
use candle_core::{DType, Tensor};

/// What errors call it.
const OP: &str = "encoder";

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

    /// The tables that tokens are looked up in before the first layer, and their norm.
    fn embeddings(&self) -> &Embeddings;

    /// Appends the position of each token of a sequence: its row of the table of positions, if there is one.
    fn positions(&self, ids: &[u32], rows: &mut Vec<u32>) {
        count_positions(ids, rows);
    }

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

/// A family that was loaded, and its weights for whoever reads a head of them.
pub(super) type Opened = (Box<dyn Encoder>, Weights);

/// [`EncoderModel::forward`](super::EncoderModel::forward) of a family.
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

/// 0, 1, .. for the tokens of a sequence.
pub(super) fn count_positions(ids: &[u32], rows: &mut Vec<u32>) {
    rows.extend((0..).take(ids.len()));
}

/// Checks ids and types, and looks them up.
pub(super) fn embed(model: &dyn Encoder, ids: &Tensor, types: Option<&Tensor>) -> Result<Tensor> {
    let config = model.config();
    check_shape(&config, ids.dims())?;
    let words = numbers("input_ids", ids)?;
    check_ids("input_ids", &words, config.vocab_size)?;
    let kinds = match types {
        Some(types) if types.dims() != ids.dims() => {
            let (shape, expected) = (types.dims().to_vec(), format!("{:?}", ids.dims()));
            return Err(Error::Shape { op: OP, tensor: "token_type_ids", shape, expected });
        }
        types => types.map(|types| numbers("token_type_ids", types)).transpose()?,
    };
    // Without types all are of type 0, which has to be there too.
    check_ids("token_type_ids", kinds.as_deref().unwrap_or(&[0]), config.type_vocab_size)?;
    let mut positions = Vec::with_capacity(words.len());
    let sequences = words.chunks(ids.dim(1)?.max(1));
    sequences.for_each(|ids| model.positions(ids, &mut positions));
    let tokens = Tokens { words: &words, types: kinds.as_deref(), positions: &positions };
    model.embeddings().forward(tokens, ids.dims())
}

/// The sequences one after the other, `[1, total, hidden]`, with the errors that each by itself has.
fn embed_packed(model: &dyn Encoder, sequences: &[impl AsRef<[u32]>]) -> Result<Tensor> {
    let config = model.config();
    check_ids("token_type_ids", &[0], config.type_vocab_size)?;
    let (mut words, mut positions) = (Vec::new(), Vec::new());
    for ids in sequences.iter().map(AsRef::as_ref) {
        check_shape(&config, &[1, ids.len()])?;
        check_ids("input_ids", ids, config.vocab_size)?;
        words.extend_from_slice(ids);
        model.positions(ids, &mut positions);
    }
    check_tokens(&config, words.len())?;
    let tokens = Tokens { words: &words, types: None, positions: &positions };
    model.embeddings().forward(tokens, &[1, words.len()])
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

/// [`EncoderModel::set_linear`](super::EncoderModel::set_linear) of a model of any family.
pub(super) fn set_linear(model: &mut impl LayeredModel, precision: Precision) -> Result<()> {
    let precisions = vec![precision; model.linear_mut().len()];
    let packed = linear_in(model, &precisions)?;
    model.linear_mut().into_iter().zip(packed).for_each(|(of, packed)| *of.linear = packed);
    Ok(())
}

/// [`LayeredModel::sample`] of a family: 1024 words without meaning. Twice as many serve MiniLM no better, and
/// half of them a few texts worse.
pub(super) fn sample(model: &dyn Encoder) -> Result<Option<Tensor>> {
    let config = model.config();
    let shape = (16, config.max_tokens.min(64));
    let words = config.vocab_size.min(u32::MAX as usize) as u64;
    // Multiples of the golden section, modulo 1, spread over the vocabulary (Knuth, TAOCP 6.4).
    let word = |at: u32| {
        let part = u64::from(at.wrapping_mul(2_654_435_769));
        ((part * words) >> 32) as u32
    };
    if words == 0 || shape.1 == 0 {
        return Ok(None);
    }
    let ids = (0..(shape.0 * shape.1) as u32).map(word);
    let ids = Tensor::from_iter(ids, model.embeddings().words().device())?.reshape(shape)?;
    Ok(Some(embed(model, &ids, None)?))
}

/// [`EncoderModel::forward_sequences`](super::EncoderModel::forward_sequences) of a family.
pub(super) fn forward_sequences(
    model: &dyn Encoder,
    sequences: &[impl AsRef<[u32]>],
) -> Result<Vec<Tensor>> {
    let (device, width) = (model.embeddings().words().device(), model.config().hidden_size);
    let nothing = || Tensor::zeros((1, 0, width), DType::F32, device);
    if !model.packs() {
        let alone = |ids: &[u32]| match ids {
            [] => Ok(nothing()?.squeeze(0)?),
            _ => {
                let ids = Tensor::from_slice(ids, (1, ids.len()), device)?;
                Ok(run(model, &ids, None, None)?.squeeze(0)?)
            }
        };
        return sequences.iter().map(|ids| alone(ids.as_ref())).collect();
    }
    let packed = Sequences::new(sequences.iter().map(|ids| ids.as_ref().len()));
    if sequences.iter().all(|ids| ids.as_ref().is_empty()) {
        return packed.split(&nothing()?);
    }
    let mut hidden = embed_packed(model, sequences)?;
    for (index, attention) in model.attention().into_iter().enumerate() {
        hidden =
            model.layer(index, &hidden, &mut |q, k, v, _| packed.attend(attention, q, k, v))?;
    }
    packed.split(&model.finish(hidden)?)
}

/// # Errors
/// [`Error::Shape`] unless it is `[B, N]` of sequences that are short enough, and as [`check_tokens`].
fn check_shape(config: &EncoderConfig, ids: &[usize]) -> Result<()> {
    let longest = config.max_tokens;
    match *ids {
        // That of the ids may be beyond memory itself.
        [b, n] if n <= longest => check_tokens(config, b.saturating_mul(n)),
        _ => {
            let (shape, expected) = (ids.to_vec(), format!("[B, N] with N <= {longest}"));
            Err(Error::Shape { op: OP, tensor: "input_ids", shape, expected })
        }
    }
}

/// # Errors
/// [`Error::Shape`] where memory has no addresses for the widest of what comes of them at once: q, k and v.
fn check_tokens(config: &EncoderConfig, tokens: usize) -> Result<()> {
    check_size(OP, "what comes of input_ids", &[tokens, 4 * config.hidden_size])
}

/// All of them, row by row.
///
/// # Errors
/// [`Error::DType`] unless they are U32.
fn numbers(tensor: &'static str, ids: &Tensor) -> Result<Vec<u32>> {
    if ids.dtype() != DType::U32 {
        return Err(Error::DType { op: OP, tensor, dtype: ids.dtype(), expected: "U32" });
    }
    Ok(ids.flatten_all()?.to_vec1()?)
}

/// # Errors
/// [`Error::InvalidArgument`] for an id that is not below `rows`.
fn check_ids(tensor: &'static str, ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => {
            Err(Error::InvalidArgument(format!("{tensor} holds {id}, expected less than {rows}")))
        }
        None => Ok(()),
    }
}
