//! A BERT encoder (Devlin et al. 2018, arXiv:1810.04805) with a switchable attention per layer.

use super::files::{ModelFiles, Weights, unused_head};
use super::packed::Sequences;
use super::{BertConfig, HiddenAct};
use crate::attention::{AttentionConfig, QuantizedAttention};
use crate::memory::check_size;
use crate::nn::{Activation, LayerNorm, Linear, Precision};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::attention::AttnMask;

/// Embeddings and layers; see [`mean_pool`] for what makes a sentence embedding of its output.
pub struct BertModel {
    config: BertConfig,
    words: Tensor,
    positions: Tensor,
    token_types: Tensor,
    norm: LayerNorm,
    layers: Vec<BertLayer>,
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
        let weights = weights.with_prefix_if_present("bert.");
        let beyond = format!("encoder.layer.{}.", config.num_hidden_layers);
        if weights.has_any(&beyond) {
            return Err(Error::Mismatch(format!(
                "num_hidden_layers {}, but the weights hold more: {beyond}*",
                config.num_hidden_layers
            )));
        }
        let from = Loader { weights: &weights, eps: config.layer_norm_eps, device };
        let hidden = config.hidden_size;
        let table = |name: &str, rows: usize| {
            from.get(&format!("embeddings.{name}_embeddings.weight"), &[rows, hidden])
        };
        Ok(Self {
            words: table("word", config.vocab_size)?,
            positions: table("position", config.max_position_embeddings)?,
            token_types: table("token_type", config.type_vocab_size)?,
            norm: from.norm("embeddings.LayerNorm", hidden)?,
            layers: (0..config.num_hidden_layers)
                .map(|index| BertLayer::load(&from, index, &config))
                .collect::<Result<_>>()?,
            warnings: weights.unused_head().map(unused_head).into_iter().collect(),
            config,
        })
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
        &self.words
    }

    /// The layers, first to last.
    pub fn layers(&self) -> &[BertLayer] {
        &self.layers
    }

    /// The layers, to switch the attention of one.
    pub fn layers_mut(&mut self) -> &mut [BertLayer] {
        &mut self.layers
    }

    /// Switches the attention of all layers.
    pub fn set_attention(&mut self, config: &AttentionConfig) {
        for layer in &mut self.layers {
            layer.attention.set_config(config.clone());
        }
    }

    /// Packs the weights of all linear layers in this precision, from what they are now: from int8 there is no
    /// way back to the weights of the file. Embeddings, norms and the attention stay as they are.
    ///
    /// # Errors
    /// Those of [`Linear::to_precision`].
    pub fn set_linear(&mut self, precision: Precision) -> Result<()> {
        for layer in &mut self.layers {
            for (_, linear) in layer.linear_mut() {
                *linear = linear.to_precision(precision)?;
            }
        }
        Ok(())
    }

    /// Word, position and token type embeddings, normalized: `input_ids` `[B, N]` U32 to
    /// `[B, N, hidden_size]`. Token types default to 0.
    ///
    /// # Errors
    /// [`Error::Shape`] if `N` exceeds `max_position_embeddings`, the shapes do not fit or the batch is larger
    /// than memory has addresses,
    /// [`Error::DType`] unless ids are U32, [`Error::InvalidArgument`] for an id outside of its table.
    pub fn embed(&self, input_ids: &Tensor, token_type_ids: Option<&Tensor>) -> Result<Tensor> {
        const OP: &str = "BertModel::embed";
        let longest = self.config.max_position_embeddings;
        let (b, n) = match *input_ids.dims() {
            [b, n] if n <= longest => (b, n),
            ref shape => {
                let expected = format!("[B, N] with N <= {longest} (max_position_embeddings)");
                let shape = shape.to_vec();
                return Err(Error::Shape { op: OP, tensor: "input_ids", shape, expected });
            }
        };
        // The widest tensors of a forward pass: of a feed-forward block, and of q, k and v as one.
        let width = self.config.intermediate_size.max(3 * self.config.hidden_size);
        check_size(OP, "what comes of input_ids", &[b, n, width])?;
        let words = look_up(OP, "input_ids", &self.words, input_ids)?;
        let types = match token_type_ids {
            Some(ids) if ids.dims() == input_ids.dims() => {
                look_up(OP, "token_type_ids", &self.token_types, ids)?
            }
            Some(ids) => {
                let (shape, expected) = (ids.dims().to_vec(), format!("[{b}, {n}]"));
                return Err(Error::Shape { op: OP, tensor: "token_type_ids", shape, expected });
            }
            None => self.token_types.narrow(0, 0, 1)?,
        };
        let sum = words.broadcast_add(&types)?.broadcast_add(&self.positions.narrow(0, 0, n)?)?;
        self.norm.forward(&sum)
    }

    /// The last hidden states: `input_ids` `[B, N]` U32 to `[B, N, hidden_size]`.
    /// `attention_mask` `[B, N]` is 1 for tokens and 0 for padding; without it all are tokens.
    ///
    /// # Errors
    /// Those of [`BertModel::embed`], [`padding_mask`] and [`attention`](crate::attention()).
    pub fn forward(&self, input_ids: &Tensor, attention_mask: Option<&Tensor>) -> Result<Tensor> {
        let mask = match attention_mask {
            None => AttnMask::None,
            Some(mask) if mask.dims() == input_ids.dims() => padding_mask(mask)?,
            Some(mask) => {
                return Err(Error::Shape {
                    op: "BertModel::forward",
                    tensor: "attention_mask",
                    shape: mask.dims().to_vec(),
                    expected: format!("{:?} like input_ids", input_ids.dims()),
                });
            }
        };
        let mut hidden = self.embed(input_ids, None)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, &mask)?;
        }
        Ok(hidden)
    }
}

impl BertModel {
    /// [`BertModel::forward`] for sequences of ids of any lengths, packed one after the other, so that
    /// nothing is spent on padding: the last hidden states of each, `[N_i, hidden_size]`. They have the bits
    /// that the sequence alone gives.
    ///
    /// # Errors
    /// [`Error::Shape`] for a sequence longer than `max_position_embeddings`, [`Error::InvalidArgument`] for
    /// an id outside of the table, and those of [`attention`](crate::attention()).
    pub fn forward_sequences(&self, sequences: &[impl AsRef<[u32]>]) -> Result<Vec<Tensor>> {
        const OP: &str = "BertModel::forward_sequences";
        let longest = self.config.max_position_embeddings;
        let lens = sequences.iter().map(|ids| ids.as_ref().len());
        if let Some(len) = lens.clone().find(|&len| len > longest) {
            let expected = format!("at most [{longest}] (max_position_embeddings)");
            return Err(Error::Shape { op: OP, tensor: "sequence", shape: vec![len], expected });
        }
        let packed = Sequences::new(lens);
        let ids: Vec<u32> = sequences.iter().flat_map(|ids| ids.as_ref()).copied().collect();
        if ids.is_empty() {
            return packed.split(&self.words.narrow(0, 0, 0)?.unsqueeze(0)?);
        }
        let row = |ids: Vec<u32>| {
            let count = ids.len();
            Tensor::from_vec(ids, (1, count), self.words.device())
        };
        let words = look_up(OP, "sequence", &self.words, &row(ids)?)?;
        let positions = look_up(OP, "positions", &self.positions, &row(packed.positions())?)?;
        let sum = (words.broadcast_add(&self.token_types.narrow(0, 0, 1)?)? + positions)?;
        let mut hidden = self.norm.forward(&sum)?;
        for layer in &self.layers {
            hidden =
                layer.forward_with(&hidden, |q, k, v| packed.attend(&layer.attention, q, k, v))?;
        }
        packed.split(&hidden)
    }
}

/// Rows of a table by id, `[B, N]` to `[B, N, hidden]`.
fn look_up(op: &'static str, tensor: &'static str, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    if ids.dtype() != DType::U32 {
        return Err(Error::DType { op, tensor, dtype: ids.dtype(), expected: "U32" });
    }
    let flat = ids.flatten_all()?;
    let rows = table.dim(0)?;
    if let Some(id) = flat.to_vec1::<u32>()?.into_iter().find(|&id| id as usize >= rows) {
        return Err(Error::InvalidArgument(format!(
            "{tensor} holds {id}, expected less than {rows}"
        )));
    }
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    Ok(table.index_select(&flat, 0)?.reshape(shape)?)
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

impl BertLayer {
    fn load(from: &Loader<'_>, index: usize, config: &BertConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let name = |part: &str| format!("encoder.layer.{index}.{part}");
        let linear =
            |part: &str, rows: usize, columns: usize| from.linear(&[name(part)], rows, columns);
        Ok(Self {
            attention: QuantizedAttention::new(AttentionConfig::fp32()),
            heads: config.num_attention_heads,
            qkv: from.linear(
                &["query", "key", "value"].map(|part| name(&format!("attention.self.{part}"))),
                hidden,
                hidden,
            )?,
            output: linear("attention.output.dense", hidden, hidden)?,
            output_norm: from.norm(&name("attention.output.LayerNorm"), hidden)?,
            up: linear("intermediate.dense", inner, hidden)?,
            act: match config.hidden_act {
                HiddenAct::Gelu => Activation::Gelu,
                HiddenAct::GeluNew => Activation::GeluTanh,
                HiddenAct::Relu => Activation::Relu,
            },
            down: linear("output.dense", hidden, inner)?,
            down_norm: from.norm(&name("output.LayerNorm"), hidden)?,
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

/// `attention_mask` `[B, N]` (1 = token, 0 = padding, any integer or float dtype) as a boolean
/// mask over keys, `[B, 1, 1, N]`.
///
/// # Errors
/// [`Error::Shape`] unless it has rank 2.
pub fn padding_mask(attention_mask: &Tensor) -> Result<AttnMask> {
    let (b, n) = dims2("padding_mask", attention_mask)?;
    let keep = attention_mask.to_dtype(DType::F32)?.ne(0f32)?;
    Ok(AttnMask::Mask(keep.reshape((b, 1, 1, n))?))
}

/// The mean of the hidden states `[B, N, hidden]` over tokens, padding (0 in `attention_mask`
/// `[B, N]`) left out: `[B, hidden]`. A sequence of padding alone gives zeros.
///
/// # Errors
/// [`Error::Shape`] unless the mask has rank 2; Candle's own if the shapes do not fit.
pub fn mean_pool(hidden: &Tensor, attention_mask: &Tensor) -> Result<Tensor> {
    let (b, n) = dims2("mean_pool", attention_mask)?;
    let weights = attention_mask.to_dtype(hidden.dtype())?.reshape((b, n, 1))?;
    let tokens = weights.sum(1)?.maximum(1.0)?;
    Ok(hidden.broadcast_mul(&weights)?.sum(1)?.broadcast_div(&tokens)?)
}

fn dims2(op: &'static str, mask: &Tensor) -> Result<(usize, usize)> {
    match *mask.dims() {
        [b, n] => Ok((b, n)),
        ref shape => {
            let (shape, expected) = (shape.to_vec(), "[B, N]".to_string());
            Err(Error::Shape { op, tensor: "attention_mask", shape, expected })
        }
    }
}

/// Weights with what every layer needs to know.
struct Loader<'a> {
    weights: &'a Weights,
    eps: f64,
    device: &'a Device,
}

impl Loader<'_> {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.get(name, shape, self.device)
    }

    /// Layers with the same input as one, whose outputs are theirs one after the other.
    fn linear(&self, names: &[String], rows: usize, columns: usize) -> Result<Linear> {
        let of_all = |part: &str, shape: &[usize]| -> Result<Tensor> {
            let get = |name: &String| self.get(&format!("{name}.{part}"), shape);
            Ok(Tensor::cat(&names.iter().map(get).collect::<Result<Vec<_>>>()?, 0)?)
        };
        let (weight, bias) = (of_all("weight", &[rows, columns])?, of_all("bias", &[rows])?);
        Linear::new(&weight, Some(&bias), Precision::F32)
    }

    fn norm(&self, name: &str, width: usize) -> Result<LayerNorm> {
        // The oldest files use TensorFlow's names.
        let (weight, bias) = match self.weights.has_any(&format!("{name}.gamma")) {
            true => ("gamma", "beta"),
            false => ("weight", "bias"),
        };
        let weight = self.get(&format!("{name}.{weight}"), &[width])?;
        let bias = self.get(&format!("{name}.{bias}"), &[width])?;
        LayerNorm::new(weight, bias, self.eps)
    }
}
