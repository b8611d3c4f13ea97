//! Both kinds of attention, each continuing the same prompts with its likeliest tokens.

use crate::args::Args;
use crate::common::llama::Decoder;
use crate::common::print::table;
use crate::generation::{batch, encode, new_cache, next_logits};
use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use candle_int8_attention::AttentionConfig;
use serde::Serialize;
use std::fmt::Write;

/// What became of one prompt.
#[derive(Debug, Serialize)]
struct Comparison {
    prompt: String,
    /// Tokens that were made by fp32, a stop token included.
    tokens: usize,
    /// How many of them int8 made too, before the first other one.
    equal: usize,
    parting: Option<Parting>,
    text_fp32: String,
    text_int8: String,
}

/// Where both part: the tokens that each prefers there, and by how much. A margin is the logit of
/// the own token minus that of the other's.
#[derive(Debug, Serialize)]
struct Parting {
    token_fp32: String,
    token_int8: String,
    margin_fp32: f32,
    margin_int8: f32,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    /// The cache of int8 attention.
    cache: String,
    max_tokens: usize,
    prompts: Vec<Comparison>,
}

/// The report of `--compare`.
pub fn run(args: &Args) -> Result<String> {
    let mut fp32 = args.model.load()?;
    fp32.model.set_attention(&AttentionConfig::fp32());
    let mut int8 = fp32.clone();
    int8.model.set_attention(&AttentionConfig::int8());
    args.cache.apply(&mut int8.model, None)?;
    let prompts = args.prompts();
    let prompts = prompts.iter().map(|prompt| compare(&fp32, &int8, prompt, args));
    let prompts = prompts.collect::<Result<_>>()?;
    let report = Report {
        model: fp32.name,
        cache: args.cache.describe(),
        max_tokens: args.max_tokens,
        prompts,
    };
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render()? })
}

/// Tokens made by always taking the likeliest, and the logits each was taken from.
struct Greedy {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn greedy(decoder: &Decoder, prompt: &[u32], args: &Args) -> Result<Greedy> {
    let mut cache = new_cache(decoder, args)?;
    let mut made = Greedy { tokens: Vec::new(), logits: Vec::new() };
    let mut input = prompt.to_vec();
    while made.tokens.len() < args.max_tokens && cache.len() < cache.context() {
        let logits = next_logits(decoder, &batch(decoder, &input)?, &mut cache)?;
        let next = Tensor::new(logits.as_slice(), &Device::Cpu)?.argmax(0)?.to_scalar()?;
        made.tokens.push(next);
        made.logits.push(logits);
        if decoder.tokenizer.stops_at(next) && !args.ignore_stop {
            break;
        }
        input = vec![next];
    }
    Ok(made)
}

fn compare(fp32: &Decoder, int8: &Decoder, prompt: &str, args: &Args) -> Result<Comparison> {
    let ids = encode(fp32, prompt, args)?;
    let (a, b) = (greedy(fp32, &ids, args)?, greedy(int8, &ids, args)?);
    let equal = a.tokens.iter().zip(&b.tokens).take_while(|(a, b)| a == b).count();
    let parting = match (a.tokens.get(equal), b.tokens.get(equal)) {
        (Some(&own), Some(&other)) => {
            let margin = |made: &Greedy, own: u32, other: u32| {
                made.logits[equal][own as usize] - made.logits[equal][other as usize]
            };
            let name = |id| fp32.tokenizer.tokenizer().decode(&[id], false);
            let failed = |e| anyhow!("cannot decode a token: {e}");
            Some(Parting {
                token_fp32: name(own).map_err(failed)?,
                token_int8: name(other).map_err(failed)?,
                margin_fp32: margin(&a, own, other),
                margin_int8: margin(&b, other, own),
            })
        }
        _ => None,
    };
    Ok(Comparison {
        prompt: prompt.to_string(),
        tokens: a.tokens.len(),
        equal,
        parting,
        text_fp32: fp32.tokenizer.decode(&a.tokens)?,
        text_int8: int8.tokenizer.decode(&b.tokens)?,
    })
}

impl Report {
    fn render(&self) -> Result<String> {
        let mut out = String::new();
        writeln!(
            out,
            "{}: the likeliest token each time, at most {}.",
            self.model, self.max_tokens
        )?;
        writeln!(out, "Cache of int8: {}.", self.cache)?;
        let header = ["prompt", "equal tokens", "fp32 goes on", "margin", "int8 goes on", "margin"];
        let mut table = table(&header);
        for (number, prompt) in self.prompts.iter().enumerate() {
            let mut row =
                vec![(number + 1).to_string(), format!("{} of {}", prompt.equal, prompt.tokens)];
            match &prompt.parting {
                None => row.extend(["-", "-", "-", "-"].map(String::from)),
                Some(parting) => row.extend([
                    format!("{:?}", parting.token_fp32),
                    format!("{:.3}", parting.margin_fp32),
                    format!("{:?}", parting.token_int8),
                    format!("{:.3}", parting.margin_int8),
                ]),
            }
            table.add_row(row);
        }
        writeln!(out, "\n{table}\n")?;
        writeln!(
            out,
            "A margin is how much higher the logit of the own token is than the other's."
        )?;
        for (number, prompt) in self.prompts.iter().enumerate() {
            writeln!(out, "\n{}. {}", number + 1, prompt.prompt)?;
            match prompt.text_fp32 == prompt.text_int8 {
                true => writeln!(out, "fp32 and int8: {}", prompt.text_fp32)?,
                false => {
                    writeln!(out, "fp32: {}\nint8: {}", prompt.text_fp32, prompt.text_int8)?;
                }
            }
        }
        Ok(out)
    }
}
