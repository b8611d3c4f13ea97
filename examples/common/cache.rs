//! Flags that choose how a decoder's cache holds keys and values.

use anyhow::{Result, bail};
use candle_int8_attention::models::llama::{LlamaCache, LlamaModel};
use candle_int8_attention::{CacheValues, KeySmoothing, KvCacheConfig};
use std::str::FromStr;

/// The cache of layers with int8 attention.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Cache of int8 attention")]
pub struct CacheArgs {
    /// How keys are held: in int8 from the start, or in f32, to be quantized with every call
    #[arg(long, value_enum, default_value_t = Keys::Int8)]
    pub cache: Keys,

    /// How an int8 cache holds values: f16, bf16 or int8
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = Values::F16)]
    pub values: Values,

    /// The first tokens that an int8 cache keeps in f32 (attention sinks)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub sinks: usize,

    /// The last tokens that an int8 cache keeps in f32
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub recent: usize,

    /// What an int8 cache subtracts from keys: from each group of 64 its own mean, nothing, or the mean of
    /// this number of first tokens
    #[arg(long, value_name = "groups|none|N", default_value = "groups")]
    pub key_smoothing: Smoothing,
}

/// The value of `--cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Keys {
    Int8,
    F32,
}

/// The value of `--values`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Values {
    F16,
    Bf16,
    Int8,
}

/// The value of `--key-smoothing`.
#[derive(Debug, Clone)]
pub struct Smoothing(KeySmoothing);

impl FromStr for Smoothing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "none" => Ok(Self(KeySmoothing::None)),
            _ if text == "groups" => Ok(Self(KeySmoothing::Groups)),
            Ok(tokens) if tokens > 0 => Ok(Self(KeySmoothing::FirstTokens(tokens))),
            _ => Err("expected groups, none, or a number of tokens from 1 on".into()),
        }
    }
}

impl CacheArgs {
    /// Sets what new caches of the model will be.
    ///
    /// # Errors
    /// If there are options for an int8 cache, but no such cache: `without` says why.
    pub fn apply(&self, model: &mut LlamaModel, without: Option<&str>) -> Result<()> {
        let config = self.config();
        if let Some(reason) = without.or((self.cache == Keys::F32).then_some("--cache is f32"))
            && config != KvCacheConfig::default()
        {
            bail!(
                "--values, --sinks, --recent and --key-smoothing are for an int8 cache, but {reason}"
            );
        }
        model.set_kv_cache(&config);
        Ok(())
    }

    fn config(&self) -> KvCacheConfig {
        KvCacheConfig {
            values: match self.values {
                Values::F16 => CacheValues::F16,
                Values::Bf16 => CacheValues::Bf16,
                Values::Int8 => CacheValues::Int8,
            },
            sinks: self.sinks,
            recent: self.recent,
            key_smoothing: self.key_smoothing.0.clone(),
            ..KvCacheConfig::default()
        }
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self, model: &LlamaModel, context: usize) -> Result<LlamaCache> {
        Ok(match self.cache {
            Keys::Int8 => model.new_cache(1, context)?,
            Keys::F32 => LlamaCache::full(model.config(), 1, context, model.device())?,
        })
    }

    /// The cache in words: `keys int8 less the mean of their group, values f16`.
    pub fn describe(&self) -> String {
        if self.cache == Keys::F32 {
            return "keys and values f32".into();
        }
        let less = match self.key_smoothing.0 {
            KeySmoothing::FirstTokens(tokens) => format!(" less the mean of the first {tokens}"),
            KeySmoothing::Groups => " less the mean of their group".to_string(),
            _ => String::new(),
        };
        let mut words = format!(
            "keys int8{less}, values {}",
            match self.values {
                Values::F16 => "f16",
                Values::Bf16 => "bf16",
                Values::Int8 => "int8",
            }
        );
        for (tokens, which) in [(self.sinks, "first"), (self.recent, "last")] {
            if tokens > 0 {
                words += &format!(", {which} {tokens} in f32");
            }
        }
        words
    }
}
