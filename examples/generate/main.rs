//! Text from a Llama-family decoder, with attention in fp32 or in int8.
//!
//! ```text
//! cargo run --release --example generate -- --model MODEL.gguf --prompt "Once upon a time"
//! cargo run --release --example generate -- --model MODEL.gguf --chat --prompt "Why is the sky blue?"
//! cargo run --release --example generate -- --model MODEL.gguf --compare
//! ```
//!
//! The text goes to stdout as it is made, and how fast it was made to stderr. `--compare` runs both
//! kinds of attention side by side, without chance, and says where they part.

mod args;
mod chat;
#[path = "../common/mod.rs"]
mod common;
mod compare;
mod figures;
mod generation;
mod memory;
mod sampler;

use anyhow::Result;
use args::{Args, Attention};
use common::print::{failure, finish, parse};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Args = parse();
    if args.compare {
        return finish(compare::run(&args));
    }
    match generate(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if generation::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => failure(&format!("{error:#}")),
    }
}

fn generate(args: &Args) -> Result<()> {
    // Wrong values are told before the model is loaded.
    args.sampler()?;
    let mut decoder = args.model.load()?;
    decoder.model.set_attention(&args.attention());
    let without = (args.attention == Attention::Fp32).then_some("--attention is fp32");
    args.cache.apply(&mut decoder.model, without)?;
    let prompts = args.prompts();
    for (number, prompt) in prompts.iter().enumerate() {
        if number > 0 {
            generation::print("\n\n")?;
        }
        generation::run(&decoder, prompt, args)?;
    }
    Ok(())
}
