//! ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder with rotary positions, norms before
//! its blocks, gated feed-forward layers, no biases, and layers that see their neighbourhood only.
//!
//! ```text
//! x = norm(word)
//! layers: x += W_o · attention(rope(W_q·n), rope(W_k·n), W_v·n)    n = norm(x); n = x in layer 0
//!         x += W_o · (gelu(W_a·n) * W_b·n)                         n = norm(x)
//! norm(x)
//! ```
//!
//! Every few layers one sees all tokens; the others see `local_attention / 2` of them on either side,
//! and rotate with a base of their own.

use super::bert_config::{check_eps, check_heads};
use super::encoder::{Encoder, EncoderConfig, Opened};
use super::files::read_config;
use super::layered::{Attend, NamedLinear, named};
use super::llama::rope::{Rope, Rotation};
use super::llama::{RopeConfig, RopePairs, RopeScaling};
use super::loader::Loader;
use super::{HiddenAct, Weights};
use crate::attention::{AttentionCall, AttentionConfig, QuantizedAttention};
use crate::nn::{Activation, Embeddings, LayerNorm, Linear};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use serde::Deserialize;
use std::path::Path;
use std::sync::Mutex;

/// The part of `config.json` that decides what is computed.
#[derive(Deserialize)]
pub(super) struct Config {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    pad_token_id: Option<u32>,
    /// Both names are in use.
    norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    #[serde(default = "gelu")]
    hidden_activation: HiddenAct,
    local_attention: usize,
    /// Layers 0, n, 2n, .. see all tokens.
    global_attn_every_n_layers: Option<usize>,
    /// The same in newer files: a word for each layer.
    layer_types: Option<Vec<LayerType>>,
    global_rope_theta: Option<f32>,
    local_rope_theta: Option<f32>,
    /// The same in newer files.
    rope_parameters: Option<RopeParameters>,
    rope_scaling: Option<RopeType>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    norm_bias: bool,
}

#[derive(Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    FullAttention,
    SlidingAttention,
}

#[derive(Deserialize)]
struct RopeParameters {
    full_attention: LayerRope,
    sliding_attention: LayerRope,
}

#[derive(Deserialize)]
struct LayerRope {
    rope_theta: f32,
    #[serde(flatten)]
    kind: RopeType,
}

/// How rotations are stretched for longer texts.
#[derive(Deserialize)]
struct RopeType {
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

fn gelu() -> HiddenAct {
    HiddenAct::Gelu
}

impl Config {
    pub(super) fn eps(&self) -> f64 {
        self.norm_eps.or(self.layer_norm_eps).unwrap_or(1e-5)
    }

    /// The kind of a layer.
    fn layer_type(&self, index: usize) -> LayerType {
        match (&self.layer_types, self.global_attn_every_n_layers) {
            (Some(types), _) => types[index],
            (None, Some(every)) if !index.is_multiple_of(every) => LayerType::SlidingAttention,
            _ => LayerType::FullAttention,
        }
    }

    fn check_layer_types(&self) -> Result<()> {
        let layers = self.num_hidden_layers;
        match (&self.layer_types, self.global_attn_every_n_layers) {
            (Some(types), _) if types.len() != layers => Err(Error::Contradiction(format!(
                "{} layer_types for num_hidden_layers {layers}",
                types.len()
            ))),
            (None, None | Some(0)) => Err(Error::InvalidArgument(format!(
                "global_attn_every_n_layers {:?}, expected at least 1, or layer_types",
                self.global_attn_every_n_layers
            ))),
            _ => Ok(()),
        }
    }

    /// The bases of the rotations in global and in local layers.
    fn thetas(&self) -> Result<[f32; 2]> {
        let new = self.rope_parameters.as_ref();
        let global = new.map(|new| new.full_attention.rope_theta).or(self.global_rope_theta);
        // Without one of its own a local layer rotates as a global one.
        let local = new.map(|new| new.sliding_attention.rope_theta);
        let local = local.or(self.local_rope_theta).or(global);
        match (global, local) {
            (Some(global), Some(local))
                if [global, local].iter().all(|theta| theta.is_finite() && *theta > 0.0) =>
            {
                Ok([global, local])
            }
            found => Err(Error::InvalidArgument(format!(
                "global_rope_theta and local_rope_theta {found:?}, expected two positive numbers"
            ))),
        }
    }

    fn check_rope_types(&self) -> Result<()> {
        let new = self.rope_parameters.iter();
        let new = new.flat_map(|new| [&new.full_attention.kind, &new.sliding_attention.kind]);
        let mut types = new.chain(&self.rope_scaling).flat_map(|kind| &kind.rope_type);
        match types.find(|kind| *kind != "default") {
            Some(other) => {
                Err(Error::Unsupported(format!("rope type {other:?}, expected \"default\"")))
            }
            None => Ok(()),
        }
    }

    fn check(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        check_eps(self.eps())?;
        self.check_layer_types()?;
        self.check_rope_types()?;
        let head_dim = self.hidden_size / self.num_attention_heads;
        if !head_dim.is_multiple_of(2) {
            return Err(Error::InvalidArgument(format!(
                "heads of {head_dim} elements, expected an even number, which rotary positions pair"
            )));
        }
        let biases = [
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("norm_bias", self.norm_bias),
        ];
        match biases.iter().find(|(_, on)| *on) {
            Some((name, _)) => Err(Error::Unsupported(format!("{name} true, expected false"))),
            None => Ok(()),
        }
    }
}

pub(super) struct ModernBertModel {
    config: Config,
    /// Of words alone.
    embeddings: Embeddings,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    /// Of global and of local layers.
    rotations: [Rotations; 2],
}

struct Layer {
    attention: QuantizedAttention,
    kind: LayerType,
    heads: usize,
    /// None in the first layer: the embeddings are normalized already.
    attention_norm: Option<LayerNorm>,
    /// Query, key and value as one.
    qkv: Linear,
    output: Linear,
    mlp_norm: LayerNorm,
    act: Activation,
    /// The half of `Wi` that is activated, and the half that it is multiplied with.
    activated: Linear,
    gate: Linear,
    down: Linear,
}

impl ModernBertModel {
    pub(super) fn open(weights: Weights, path: &Path, device: &Device) -> Result<Opened> {
        let config: Config = read_config(path, "ModernBERT")?;
        config.check()?;
        let weights = weights.with_prefix_if_present("model.");
        let from = Loader::new(&weights, config.eps(), device);
        from.check_layers(config.num_hidden_layers, "layers")?;
        let (rows, hidden) = (config.vocab_size, config.hidden_size);
        let words = from.get("embeddings.tok_embeddings.weight", &[rows, hidden])?;
        let norm = from.unbiased_norm("embeddings.norm", hidden)?;
        let layers = (0..config.num_hidden_layers).map(|index| Layer::load(&from, index, &config));
        let head_dim = hidden / config.num_attention_heads;
        let model = Self {
            embeddings: Embeddings::new(words, None, None, norm),
            layers: layers.collect::<Result<_>>()?,
            final_norm: from.unbiased_norm("final_norm", hidden)?,
            rotations: config.thetas()?.map(|theta| Rotations::new(theta, head_dim)),
            config,
        };
        Ok((Box::new(model), weights))
    }
}

impl Encoder for ModernBertModel {
    fn config(&self) -> EncoderConfig {
        EncoderConfig {
            family: "modernbert",
            vocab_size: self.config.vocab_size,
            hidden_size: self.config.hidden_size,
            num_hidden_layers: self.config.num_hidden_layers,
            num_attention_heads: self.config.num_attention_heads,
            max_tokens: self.config.max_position_embeddings,
            type_vocab_size: 1,
            pad_token_id: self.config.pad_token_id.unwrap_or(0),
        }
    }

    fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let layer = &self.layers[index];
        let rotations = match layer.kind {
            LayerType::FullAttention => &self.rotations[0],
            LayerType::SlidingAttention => &self.rotations[1],
        };
        layer.forward(hidden, &rotations.first(hidden.dim(1)?, hidden.device())?, attend)
    }

    fn finish(&self, hidden: Tensor) -> Result<Tensor> {
        self.final_norm.forward(&hidden)
    }

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers.iter().map(|layer| &layer.attention).collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers.iter_mut().map(|layer| &mut layer.attention).collect()
    }

    /// Windows are the layers' own.
    fn set_attention(&mut self, config: &AttentionConfig) {
        for attention in self.attention_mut() {
            let spec = &attention.config().spec;
            let (left, right) = (spec.window_left, spec.window_right);
            attention.set_config(config.clone().window(left, right));
        }
    }

    fn linear_mut(&mut self) -> Vec<NamedLinear<'_>> {
        named(self.layers.iter_mut().map(Layer::linear_mut))
    }

    /// Rotations begin with the tokens that a layer is handed.
    fn packs(&self) -> bool {
        false
    }
}

impl Layer {
    fn load(from: &Loader<'_>, index: usize, config: &Config) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (kind, both) = (config.layer_type(index), inner.saturating_mul(2));
        let name = |part: &str| format!("layers.{index}.{part}");
        let whole = |part: &str, rows: usize, columns: usize| {
            from.unbiased(&name(part), [rows, columns], 0..rows)
        };
        let half = |outputs| from.unbiased(&name("mlp.Wi"), [both, hidden], outputs);
        let window = match kind {
            LayerType::FullAttention => None,
            LayerType::SlidingAttention => Some(config.local_attention / 2),
        };
        Ok(Self {
            attention: QuantizedAttention::new(AttentionConfig::fp32().window(window, window)),
            kind,
            heads: config.num_attention_heads,
            attention_norm: match index {
                0 => None,
                _ => Some(from.unbiased_norm(&name("attn_norm"), hidden)?),
            },
            qkv: whole("attn.Wqkv", 3 * hidden, hidden)?,
            output: whole("attn.Wo", hidden, hidden)?,
            mlp_norm: from.unbiased_norm(&name("mlp_norm"), hidden)?,
            act: config.hidden_activation.activation(),
            activated: half(0..inner)?,
            gate: half(inner..both)?,
            down: whole("mlp.Wo", hidden, inner)?,
        })
    }

    fn linear_mut(&mut self) -> [(&'static str, &mut Linear); 5] {
        let Self { qkv, output, activated, gate, down, .. } = self;
        [("qkv", qkv), ("output", output), ("up", activated), ("gate", gate), ("down", down)]
    }

    /// `[B, N, hidden_size]` to the same.
    fn forward(
        &self,
        hidden: &Tensor,
        rotation: &Rotation,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor> {
        let x = match &self.attention_norm {
            Some(norm) => norm.forward(hidden)?,
            None => hidden.clone(),
        };
        let (b, n, width) = x.dims3()?;
        let x = self.qkv.forward(&x)?.reshape((b, n, 3, self.heads, width / self.heads))?;
        let part = |index| x.get_on_dim(2, index)?.transpose(1, 2);
        let (q, k) = (rotation.apply(&part(0)?)?, rotation.apply(&part(1)?)?);
        let context = attend(&q, &k, &part(2)?, &AttentionCall::default())?;
        let hidden = (self.output.forward(&context.transpose(1, 2)?)? + hidden)?;
        let x = self.mlp_norm.forward(&hidden)?;
        let inner = (self.activated.forward_activated(&x, self.act)? * self.gate.forward(&x)?)?;
        Ok((self.down.forward(&inner)? + hidden)?)
    }
}

/// The rotations of the first positions, as many as were asked for so far.
struct Rotations {
    rope: Rope,
    longest: Mutex<Option<Rotation>>,
}

impl Rotations {
    fn new(theta: f32, head_dim: usize) -> Self {
        let (pairs, scaling) = (RopePairs::HalfSplit, RopeScaling::None);
        let rope = Rope::new(&RopeConfig { theta, pairs, scaling }, head_dim);
        Self { rope, longest: Mutex::new(None) }
    }

    fn first(&self, len: usize, device: &Device) -> Result<Rotation> {
        // What a thread that panicked has left is whole: it is replaced at once.
        let mut longest = self.longest.lock().unwrap_or_else(|poison| poison.into_inner());
        let rotation = match longest.take() {
            Some(known) if known.len() >= len => known,
            _ => self.rope.at(0, len, device)?,
        };
        *longest = Some(rotation.clone());
        rotation.first(len)
    }
}
