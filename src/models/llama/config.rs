//! What a Llama model computes, read from a `config.json`.

use crate::files::{corrupt, read_text};
use crate::models::files::refuse_quantized;
use crate::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// The shape of a Llama-family decoder (Touvron et al. 2023, arXiv:2302.13971).
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// Rows of the token embedding table, and logits of a token.
    pub vocab_size: usize,
    /// Width of a token's vector.
    pub hidden_size: usize,
    /// Width between the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; they divide the query heads.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// The longest sequence the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square by RMSNorm.
    pub rms_norm_eps: f64,
    /// How positions enter.
    pub rope: RopeConfig,
    /// Whether the token embeddings are the output matrix, too.
    pub tie_word_embeddings: bool,
}

/// Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): elements of queries and keys are
/// rotated in pairs, pair `i` by the angle `position * theta^(-2i / head_dim)`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f32,
    /// Which elements make a pair.
    pub pairs: RopePairs,
    /// How frequencies are stretched for a longer context.
    pub scaling: RopeScaling,
}

/// Which elements of a head are rotated together. The files of a format have the rows of their
/// query and key weights in the order that fits, so this is not a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RopePairs {
    /// `(2i, 2i + 1)`: GGUF files of the `llama` architecture.
    Interleaved,
    /// `(i, i + head_dim / 2)`: safetensors of Hugging Face.
    HalfSplit,
}

/// How the frequencies of rotary embeddings differ from `theta^(-2i / head_dim)`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All are divided by `factor` (position interpolation, arXiv:2306.15595).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: waves longer than `original_context / low_freq_factor` are divided by `factor`,
    /// those shorter than `original_context / high_freq_factor` are kept, with a smooth way between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f32,
        /// Waves at least `original_context / low_freq_factor` long are low.
        low_freq_factor: f32,
        /// Waves at most `original_context / high_freq_factor` long are high.
        high_freq_factor: f32,
        /// The context before scaling.
        original_context: usize,
    },
    /// A divisor for each frequency, as GGUF files of Llama 3.1 have them.
    Divisors(Vec<f32>),
}

impl LlamaConfig {
    /// Reads and checks a `config.json` of a `LlamaForCausalLM`.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], [`Error::Corrupt`] for JSON that is not such a
    /// configuration, [`Error::Unsupported`] for a `quantization_config`, and those of its `check`.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text("config", path)?;
        refuse_quantized(path, &text)?;
        let json: Json = serde_json::from_str(&text)
            .map_err(|e| corrupt(path, format!("not a Llama configuration: {e}")))?;
        let config = json.into_config()?;
        config.check()?;
        Ok(config)
    }

    /// # Errors
    /// [`Error::InvalidArgument`], [`Error::Contradiction`] or [`Error::Unsupported`], naming the first
    /// value that cannot work.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocabulary size", self.vocab_size),
            ("hidden size", self.hidden_size),
            ("intermediate size", self.intermediate_size),
            ("number of layers", self.num_hidden_layers),
            ("number of heads", self.num_attention_heads),
            ("number of key and value heads", self.num_key_value_heads),
            ("head dim", self.head_dim),
            ("context length", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::InvalidArgument(format!("{name} 0, expected at least 1")));
        }
        // The elements of the largest matrices: what the weights are compared with.
        let heads = self.num_attention_heads.max(self.num_key_value_heads);
        let widest = heads.checked_mul(self.head_dim);
        let rows = widest.map(|width| width.max(self.vocab_size).max(self.intermediate_size));
        let elements = rows.and_then(|rows| rows.checked_mul(self.hidden_size));
        if elements.is_none_or(|elements| elements > isize::MAX as usize / size_of::<f64>()) {
            return Err(Error::InvalidArgument(format!(
                "{heads} heads of {} elements, vocabulary size {}, intermediate size {} and hidden size \
                 {}, expected matrices that fit into memory",
                self.head_dim, self.vocab_size, self.intermediate_size, self.hidden_size
            )));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::Contradiction(format!(
                "{} query heads for {} key and value heads, expected a multiple",
                self.num_attention_heads, self.num_key_value_heads
            )));
        }
        if !self.head_dim.is_multiple_of(2) {
            let found = self.head_dim;
            return Err(Error::InvalidArgument(format!(
                "head dim {found}, expected an even number"
            )));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            let found = self.rms_norm_eps;
            return Err(Error::InvalidArgument(format!(
                "RMSNorm epsilon {found}, expected a small positive number"
            )));
        }
        self.rope.check(self.head_dim)
    }
}

impl RopeConfig {
    fn check(&self, head_dim: usize) -> Result<()> {
        let positive = |name: &str, value: f32| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => {
                Err(Error::InvalidArgument(format!("{name} {value}, expected a positive number")))
            }
        };
        positive("rope theta", self.theta)?;
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive("rope scaling factor", *factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                positive("rope scaling factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor > low_freq_factor {
                    return Ok(());
                }
                Err(Error::Contradiction(format!(
                    "high_freq_factor {high_freq_factor}, expected more than low_freq_factor \
                     {low_freq_factor}"
                )))
            }
            RopeScaling::Divisors(divisors) if divisors.len() != head_dim / 2 => {
                let (found, expected) = (divisors.len(), head_dim / 2);
                Err(Error::Mismatch(format!("{found} rope divisors, expected {expected}")))
            }
            RopeScaling::Divisors(divisors) => {
                divisors.iter().try_for_each(|divisor| positive("rope divisor", *divisor))
            }
        }
    }
}

/// The fields of `config.json` that decide something.
#[derive(Deserialize)]
struct Json {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<JsonRope>,
    /// Newer files hold both of the above in here.
    rope_parameters: Option<JsonRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
}

#[derive(Deserialize)]
struct JsonRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

impl Json {
    fn into_config(self) -> Result<LlamaConfig> {
        if self.model_type != "llama" {
            return Err(Error::Unsupported(format!(
                "model_type {:?}, expected \"llama\"",
                self.model_type
            )));
        }
        if let Some(act) = self.hidden_act.filter(|act| act != "silu") {
            return Err(Error::Unsupported(format!("hidden_act {act:?}, expected \"silu\"")));
        }
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None if self.hidden_size.is_multiple_of(self.num_attention_heads.max(1)) => {
                self.hidden_size / self.num_attention_heads.max(1)
            }
            None => {
                return Err(Error::Contradiction(format!(
                    "hidden_size {} with num_attention_heads {}, expected a multiple of it",
                    self.hidden_size, self.num_attention_heads
                )));
            }
        };
        let rope = self.rope_parameters.or(self.rope_scaling);
        let part = rope.as_ref().and_then(|rope| rope.partial_rotary_factor);
        if let Some(part) = part.or(self.partial_rotary_factor).filter(|part| *part != 1.0) {
            let problem = format!("partial_rotary_factor {part}, expected 1: whole heads rotate");
            return Err(Error::Unsupported(problem));
        }
        let theta = self.rope_theta.or(rope.as_ref().and_then(|rope| rope.rope_theta));
        Ok(LlamaConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(self.num_attention_heads),
            head_dim,
            max_position_embeddings: self.max_position_embeddings,
            rms_norm_eps: self.rms_norm_eps,
            rope: RopeConfig {
                theta: theta.unwrap_or(10_000.0),
                pairs: RopePairs::HalfSplit,
                scaling: rope.map_or(Ok(RopeScaling::None), JsonRope::into_scaling)?,
            },
            tie_word_embeddings: self.tie_word_embeddings,
        })
    }
}

impl JsonRope {
    fn into_scaling(self) -> Result<RopeScaling> {
        let kind = self.rope_type.as_deref().unwrap_or("default");
        fn need<T>(value: Option<T>, kind: &str, name: &str) -> Result<T> {
            value
                .ok_or_else(|| Error::InvalidArgument(format!("rope type {kind:?} without {name}")))
        }
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: need(self.factor, kind, "factor")? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: need(self.factor, kind, "factor")?,
                low_freq_factor: need(self.low_freq_factor, kind, "low_freq_factor")?,
                high_freq_factor: need(self.high_freq_factor, kind, "high_freq_factor")?,
                original_context: need(
                    self.original_max_position_embeddings,
                    kind,
                    "original_max_position_embeddings",
                )?,
            }),
            other => Err(Error::Unsupported(format!(
                "rope type {other:?}, expected \"default\", \"linear\" or \"llama3\""
            ))),
        }
    }
}
