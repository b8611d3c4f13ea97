//! The command line.

use crate::common::cache::CacheArgs;
use crate::common::llama::LlamaArgs;
use crate::sampler::Sampler;
use anyhow::{Result, bail};
use candle_int8_attention::AttentionConfig;
use clap::builder::RangedU64ValueParser;

/// Text from a Llama-family decoder, with attention in fp32 or in int8.
///
/// Text goes to stdout while it is made; tokens per second and memory go to stderr. Without
/// --prompt, some built-in prompts are continued.
#[derive(Debug, clap::Parser)]
#[command(name = "generate")]
pub struct Args {
    /// What the text begins with; with --chat, what the user says
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// The prompt is a message in a chat, written as the model's template says
    #[arg(long)]
    pub chat: bool,

    /// A message before the user's that tells the model how to answer
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Stop after this number of tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,

    /// Go on after a token that ends the text
    #[arg(long)]
    pub ignore_stop: bool,

    /// Who computes attention
    #[arg(long, value_enum, default_value_t = Attention::Int8)]
    pub attention: Attention,

    /// The most tokens of prompt and text together [default: what the model was trained for]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,

    /// 0 always takes the likeliest token; 1 takes tokens as likely as the model says
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,

    /// Choose among the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,

    /// Seed of the choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Print figures each time this number of tokens was made
    #[arg(long, value_name = "N", default_value_t = 1024,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub figures_every: usize,

    /// Run fp32 and int8 side by side, always with the likeliest token, and say where they part
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "seed", "attention"])]
    pub compare: bool,

    /// Print JSON, with --compare
    #[arg(long, requires = "compare")]
    pub json: bool,

    #[command(flatten)]
    pub model: LlamaArgs,

    #[command(flatten)]
    pub cache: CacheArgs,
}

/// The value of `--attention`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attention {
    Fp32,
    Int8,
}

/// What is continued without `--prompt`.
const PROMPTS: [&str; 5] = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "The water cycle describes how water moves through the environment. It begins when",
    "Once upon a time, in a village by the sea, there lived a clockmaker who",
    "The three primary colors are",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
];

/// What the user asks without `--prompt`, with `--chat`.
const QUESTIONS: [&str; 5] = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for sleeping better.",
    "Write a short poem about the sea.",
    "What is the difference between a list and a tuple in Python?",
];

impl Args {
    /// The prompt, or the built-in ones.
    pub fn prompts(&self) -> Vec<String> {
        match (&self.prompt, self.chat) {
            (Some(prompt), _) => vec![prompt.clone()],
            (None, false) => PROMPTS.map(String::from).to_vec(),
            (None, true) => QUESTIONS.map(String::from).to_vec(),
        }
    }

    /// Attention with the default configuration.
    pub fn attention(&self) -> AttentionConfig {
        match self.attention {
            Attention::Fp32 => AttentionConfig::fp32(),
            Attention::Int8 => AttentionConfig::int8(),
        }
    }

    /// How the next token is chosen.
    pub fn sampler(&self) -> Result<Sampler> {
        let temperature = self.temperature;
        if !(temperature.is_finite() && temperature >= 0.0) {
            bail!("--temperature is {temperature}, expected 0 or more");
        }
        // Probabilities are summed in f32, in which the smallest numbers are 0.
        if let Some(p) = self.top_p.filter(|p| !(*p as f32 > 0.0 && *p <= 1.0)) {
            bail!("--top-p is {p:?}, expected more than 0 (in f32) and at most 1");
        }
        Ok(Sampler::new(self.seed, temperature, self.top_p))
    }
}
