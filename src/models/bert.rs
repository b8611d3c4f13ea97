//! A BERT encoder (Devlin et al. 2018, arXiv:1810.04805) with a switchable attention per layer.

use super::encoder::{self, Encoder, EncoderConfig, Opened, count_positions};
use super::files::unused_head;
use super::layered::{Attend, LayeredModel, NamedLinear, named};
use super::loader::{Loader, TableRows};
use super::pooling::mean_pool;
use super::{BertConfig, HiddenAct, ModelFiles, Weights};
use crate::Result;
use crate::attention::{AttentionCall, AttentionConfig, QuantizedAttention};
use crate::nn::{Activation, Embeddings, LayerNorm, Linear, Precision};
use candle_core::{DType, Device, Tensor};
use candle_nn::attention::AttnMask;
use std::path::Path;

/// Embeddings and layers; see [`mean_pool`] for what makes a sentence embedding of its output.
pub struct BertModel {
    config: BertConfig,
    family: BertFamily,
    warnings: Vec<String>,
}

impl BertModel {
    /// Loads weights and configuration; all layers start with fp32 attention. Tensors may have a
    /// `bert.` prefix, and a pooler is ignored.
    ///
    /// # Errors
    /// Those of [`Weights::open`], [`Weights::get`] and [`BertConfig::load`].
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self> {
        let config = BertConfig::load(&files.config)?;
        Self::new(Weights::open(&files.weights)?, config, device)
    }

    /// [`BertModel::load`] from parts.
    ///
    /// # Errors
    /// Those of [`Weights::get`] and [`BertConfig::check`].
    pub fn new(weights: Weights, config: BertConfig, device: &Device) -> Result<Self> {
        config.check()?;
        let (family, weights) = load(weights, &config, device)?;
        let warnings = weights.unused_head().map(unused_head).into_iter().collect();
        Ok(Self { config, family, warnings })
    }

    /// What of the files is not computed with, and changes what the model is: in sentences, for
    /// people.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &BertConfig {
        &self.config
    }

    /// The raw word embedding table, `[vocab_size, hidden_size]`.
    pub fn word_embeddings(&self) -> &Tensor {
        self.family.embeddings.words()
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[BertLayer] {
        &self.family.layers
    }

    /// The layers, to switch the attention of one.
    pub fn layers_mut(&mut self) -> &mut [BertLayer] {
        &mut self.family.layers
    }

    /// Switches the attention of all layers.
    pub fn set_attention(&mut self, config: &AttentionConfig) {
        self.family.set_attention(config);
    }

    /// Packs the weights of all linear layers in this precision, from what they are now: from int8 there is no
    /// way back to the weights of the file. Embeddings, norms and the attention stay as they are.
    ///
    /// In int8 weights are rounded to suit what they meet when the model, as it is, reads 1024 words
    /// ([`LayeredModel::sample`], [`Linear::to_int8_for`]); with all-MiniLM-L6 that takes less than a second. Its last
    /// bits are those of the level in use, and with them now and then a code: who needs the same codes on
    /// other processors saves the layers.
    ///
    /// # Errors
    /// Those of [`Linear::to_precision`] and [`BertModel::forward`].
    pub fn set_linear(&mut self, precision: Precision) -> Result<()> {
        encoder::set_linear(self, precision)
    }

    /// Word, position and token type embeddings, normalized: `input_ids` `[B, N]` U32 to
    /// `[B, N, hidden_size]`. Token types default to 0.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if `N` exceeds `max_position_embeddings`, the shapes do not fit or
    /// the batch is larger than memory has addresses, [`Error::DType`](crate::Error::DType) unless ids are U32,
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an id outside of its table.
    pub fn embed(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>) -> Result<Tensor> {
        encoder::embed(&self.family, input_ids, token_type_ids)
    }

    /// The last hidden states: `input_ids` `[B, N]` U32 to `[B, N, hidden_size]`, all of token type
    /// 0. `attention_mask` `[B, N]` is 1 for tokens and 0 for padding; without it all are tokens.
    ///
    /// # Errors
    /// Those of [`BertModel::embed`], [`padding_mask`](super::padding_mask) and [`attention`](crate::attention()).
    pub fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        encoder::run(&self.family, input_ids, None, attention_mask)
    }
}

impl BertModel {
    /// [`BertModel::forward`] for sequences of ids of any lengths: see
    /// [`EncoderModel::forward_sequences`](super::EncoderModel::forward_sequences).
    ///
    /// # Errors
    /// Those of [`EncoderModel::forward_sequences`](super::EncoderModel::forward_sequences).
    pub fn forward_sequences(&self, sequences: &[impl AsRef<[u32]>]) -> Result<Vec<Tensor>> {
        encoder::forward_sequences(&self.family, sequences)
    }
}

/// The encoder, and its weights for whoever reads a head of them.
pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<Opened> {
    let (family, weights) = load(weights, &BertConfig::load(path)?, device)?;
    Ok((Box::new(family), weights))
}

fn load(weights: Weights, config: &BertConfig, device: &Device) -> Result<(BertFamily, Weights)> {
    let weights = weights.with_prefix_if_present("bert.");
    let from = Loader::new(&weights, config.layer_norm_eps, device);
    let (rows, shape) = (TableRows::of(config), LayerShape::of(config));
    let family = BertFamily::load(EncoderConfig::of("bert", config), &from, &BERT, rows, shape)?;
    Ok((family, weights))
}

/// BERT's layers behind the embeddings of a family.
pub(super) struct BertFamily {
    config: EncoderConfig,
    embeddings: Embeddings,
    layers: Vec<BertLayer>,
    /// The padding token, where positions begin behind its number.
    positions_behind: Option<u32>,
}

impl BertFamily {
    /// Positions are counted from 0.
    pub(super) fn load(
        config: EncoderConfig,
        from: &Loader<'_>,
        names: &LayerNames,
        rows: TableRows,
        shape: LayerShape,
    ) -> Result<Self> {
        from.check_layers(config.num_hidden_layers, names.layers)?;
        let layer = |index| BertLayer::load(from, names, index, shape);
        Ok(Self {
            embeddings: from.embeddings(rows, config.hidden_size)?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            positions_behind: None,
            config,
        })
    }

    /// The same with positions `pad + 1, pad + 2, ..` for the tokens, and `pad` for padding.
    pub(super) fn with_positions_behind(mut self, pad: u32) -> Self {
        self.positions_behind = Some(pad);
        self
    }
}

impl Encoder for BertFamily {
    fn config(&self) -> EncoderConfig {
        self.config.clone()
    }

    fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    fn positions(&self, ids: &[u32], rows: &mut Vec<u32>) {
        let Some(pad) = self.positions_behind else { return count_positions(ids, rows) };
        let mut last = pad;
        rows.extend(ids.iter().map(|&id| {
            last += u32::from(id != pad);
            if id == pad { pad } else { last }
        }));
    }

    /// Queries see all keys of their sequence.
    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let all = AttentionCall::default();
        self.layers[index].forward_with(hidden, |q, k, v| attend(q, k, v, &all))
    }

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers.iter().map(|layer| &layer.attention).collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers.iter_mut().map(|layer| &mut layer.attention).collect()
    }

    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        named(self.layers.iter_mut().map(BertLayer::linear_mut))
    }
}

/// One layer: attention block, then feed-forward block, each with a residual and a layer norm.
pub struct BertLayer {
    /// The attention in use; switch it with
    /// [`set_config`](crate::QuantizedAttention::set_config).
    pub attention: QuantizedAttention,
    heads: usize,
    /// Query, key and value as one.
    qkv: Linear,
    output: Linear,
    output_norm: LayerNorm,
    up: Linear,
    act: Activation,
    down: Linear,
    down_norm: LayerNorm,
}

/// The names of a layer's parts in a file.
pub(super) struct LayerNames {
    /// What stands before the number of the layer.
    pub(super) layers: &'static str,
    pub(super) qkv: [&'static str; 3],
    pub(super) output: &'static str,
    pub(super) output_norm: &'static str,
    pub(super) up: &'static str,
    pub(super) down: &'static str,
    pub(super) down_norm: &'static str,
}

/// Those of BERT and RoBERTa.
pub(super) const BERT: LayerNames = LayerNames {
    layers: "encoder.layer",
    qkv: ["attention.self.query", "attention.self.key", "attention.self.value"],
    output: "attention.output.dense",
    output_norm: "attention.output.LayerNorm",
    up: "intermediate.dense",
    down: "output.dense",
    down_norm: "output.LayerNorm",
};

/// What decides the shape of a layer.
#[derive(Clone, Copy)]
pub(super) struct LayerShape {
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) heads: usize,
    pub(super) act: HiddenAct,
}

impl LayerShape {
    pub(super) fn of(config: &BertConfig) -> Self {
        Self {
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            heads: config.num_attention_heads,
            act: config.hidden_act,
        }
    }
}

impl BertLayer {
    pub(super) fn load(
        from: &Loader<'_>,
        names: &LayerNames,
        index: usize,
        shape: LayerShape,
    ) -> Result<Self> {
        let LayerShape { hidden, inner, heads, act } = shape;
        let name = |part: &str| format!("{}.{index}.{part}", names.layers);
        let linear =
            |part: &str, rows: usize, columns: usize| from.linear(&[name(part)], rows, columns);
        Ok(Self {
            attention: QuantizedAttention::new(AttentionConfig::fp32()),
            heads,
            qkv: from.linear(&names.qkv.map(name), hidden, hidden)?,
            output: linear(names.output, hidden, hidden)?,
            output_norm: from.norm(&name(names.output_norm), hidden)?,
            up: linear(names.up, inner, hidden)?,
            act: act.activation(),
            down: linear(names.down, hidden, inner)?,
            down_norm: from.norm(&name(names.down_norm), hidden)?,
        })
    }

    /// The linear layers with what they are, in the order in which they are multiplied.
    pub(super) fn linear_mut(&mut self) -> [(&'static str, &mut Linear); 4] {
        let Self { qkv, output, up, down, .. } = self;
        [("qkv", qkv), ("output", output), ("up", up), ("down", down)]
    }

    /// Queries, keys and values of `hidden` `[B, N, hidden_size]`, each `[B, H, N, head_dim]`;
    /// views of `[B, N, H, head_dim]`, not copies.
    ///
    /// # Errors
    /// Candle's own, for a tensor of another shape or dtype.
    pub fn qkv(&self, hidden: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let x = self.qkv.forward(hidden)?;
        let (b, n, width) = x.dims3()?;
        let x = x.reshape((b, n, 3, self.heads, width / (3 * self.heads)))?;
        let part = |index| x.get_on_dim(2, index)?.transpose(1, 2);
        Ok((part(0)?, part(1)?, part(2)?))
    }

    /// `norm(hidden + projection(attention))`, `[B, N, hidden_size]`.
    fn attention_block(
        &self,
        hidden: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (q, k, v) = self.qkv(hidden)?;
        let context = attend(&q, &k, &v)?;
        // `[B, N, H, head_dim]`: the projection merges the heads as it reads them.
        self.output.forward_add_norm(&context.transpose(1, 2)?, hidden, &self.output_norm)
    }

    /// The whole layer, `[B, N, hidden_size]` to the same.
    ///
    /// # Errors
    /// Those of [`attention`](crate::attention()).
    pub fn forward(&self, hidden: &Tensor, mask: &AttnMask) -> Result<Tensor> {
        self.forward_with(hidden, |q, k, v| self.attention.forward(q, k, v, mask))
    }

    /// [`BertLayer::forward`] with attention by someone else: `attend` gets what
    /// [`BertLayer::qkv`] makes and returns `[B, H, N, head_dim]`.
    ///
    /// # Errors
    /// Those of `attend`; Candle's own.
    pub fn forward_with(
        &self,
        hidden: &Tensor,
        attend: impl FnOnce(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let hidden = self.attention_block(hidden, attend)?;
        self.up.forward_block(&hidden, self.act, &self.down, &hidden, &self.down_norm)
    }
}

/// The input is token ids, U32 `[B, N]` without padding, all of type 0.
impl LayeredModel for BertModel {
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
        encoder::embed(&self.family, input_ids, None)
    }

    fn sample(&self) -> Result<Option<Tensor>> {
        encoder::sample(&self.family)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        encoder::layer(&self.family, index, hidden, attend)
    }

    fn embedding(&self, hidden: &Tensor) -> Result<Tensor> {
        let (b, n, _) = hidden.dims3()?;
        mean_pool(hidden, &Tensor::ones((b, n), DType::U32, hidden.device())?)
    }

    fn head_counts(&self) -> Option<[usize; 2]> {
        Some([self.config().num_attention_heads; 2])
    }
}
