//! One prompt continued, with the text on stdout and figures on stderr.

use crate::args::{Args, Attention};
use crate::chat;
use crate::common::llama::Decoder;
use crate::common::print::{for_terminal, tell};
use crate::figures::{Pace, megabytes, resident_bytes};
use anyhow::{Result, anyhow, bail};
use candle_core::Tensor;
use candle_int8_attention::models::llama::LlamaCache;
use std::io::{ErrorKind, Write};

/// The ids that a prompt becomes.
pub fn encode(decoder: &Decoder, prompt: &str, args: &Args) -> Result<Vec<u32>> {
    let tokenizer = &decoder.tokenizer;
    let ids = match args.chat {
        true => {
            tokenizer.encode(&chat::render(tokenizer, args.system.as_deref(), prompt)?, false)?
        }
        false => tokenizer.encode(prompt, true)?,
    };
    if ids.is_empty() {
        bail!("the prompt is empty, expected at least one token");
    }
    Ok(ids)
}

/// An empty cache as `--context` asks for.
pub fn new_cache(decoder: &Decoder, args: &Args) -> Result<LlamaCache> {
    let context = args.context.unwrap_or(decoder.model.config().max_position_embeddings);
    args.cache.new_cache(&decoder.model, context)
}

/// Token ids as a batch of one.
pub fn batch(decoder: &Decoder, ids: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(ids, decoder.model.device())?.unsqueeze(0)?)
}

/// The logits of the token that follows `input`. NaN is an error.
pub fn next_logits(decoder: &Decoder, input: &Tensor, cache: &mut LlamaCache) -> Result<Vec<f32>> {
    let logits = decoder.model.forward(input, cache)?.flatten_all()?.to_vec1::<f32>()?;
    if logits.iter().any(|x| x.is_nan()) {
        bail!("the model's logits are NaN after {} tokens, expected numbers", cache.len());
    }
    Ok(logits)
}

/// Continues `prompt`, which is printed too, except one that was given for a chat.
pub fn run(decoder: &Decoder, prompt: &str, args: &Args) -> Result<()> {
    let tokenizer = &decoder.tokenizer;
    let ids = encode(decoder, prompt, args)?;
    let mut cache = new_cache(decoder, args)?;
    let mut sampler = args.sampler()?;
    let mut stream = tokenizer.tokenizer().decode_stream(true);
    let (mut prefill, mut decode, mut stretch) =
        (Pace::default(), Pace::default(), Pace::default());

    let input = batch(decoder, &ids)?;
    let mut logits = prefill.measure(ids.len(), || next_logits(decoder, &input, &mut cache))?;
    print(&match (args.chat, &args.prompt) {
        (false, _) => prompt.to_string(),
        (true, None) => format!("> {prompt}\n"),
        (true, Some(_)) => String::new(),
    })?;
    let mut end = "--max-tokens";
    let mut made = 0;
    while made < args.max_tokens {
        let next = sampler.sample(&logits)?;
        if tokenizer.stops_at(next) && !args.ignore_stop {
            end = "a stop token";
            break;
        }
        let text = stream.step(next).map_err(|e| anyhow!("cannot decode token {next}: {e}"))?;
        print(&text.unwrap_or_default())?;
        made += 1;
        if cache.len() == cache.context() {
            end = "a full context";
            break;
        }
        if made < args.max_tokens {
            let input = batch(decoder, &[next])?;
            let before = decode;
            logits = decode.measure(1, || next_logits(decoder, &input, &mut cache))?;
            stretch.tokens += decode.tokens - before.tokens;
            stretch.time += decode.time - before.time;
        }
        if stretch.tokens == args.figures_every {
            tell(&format!("\n[{}, {}]", stretch.describe(), memory(&cache)));
            stretch = Pace::default();
        }
    }
    print("\n")?;
    let (prefill, decode) = (prefill.describe(), decode.describe_text(made));
    tell(&format!("[prompt: {prefill}; text: {decode}, ended by {end}]"));
    if args.attention == Attention::Int8 {
        tell(&format!("[int8, cache with {}]", args.cache.describe()));
    }
    tell(&format!("[{}]", memory(&cache)));
    Ok(())
}

/// What the cache holds, and what the process has in RAM.
fn memory(cache: &LlamaCache) -> String {
    let (len, context) = (cache.len(), cache.context());
    let cache = format!("cache {} for {len} of {context} tokens", megabytes(cache.memory_bytes()));
    match resident_bytes() {
        Some(bytes) => format!("{cache}, process {}", megabytes(bytes)),
        None => cache,
    }
}

/// Writes to stdout at once; on a terminal without what it would obey.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(for_terminal(text, &out).as_bytes())?;
    Ok(out.flush()?)
}

/// Whether the reader of stdout went away, which is no error.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe)
}
