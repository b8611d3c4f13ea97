//! What int8 attention does to a language model's predictions over a text.
//!
//! ```text
//! cargo run --release --example perplexity -- --model MODEL.gguf --file TEXT.txt --context 2048
//! ```
//!
//! The text is cut into windows. Both kinds of attention see each window, with the same weights, and
//! their predictions for the tokens of its second half are compared: those have at least half of the
//! window before them.

mod args;
#[path = "../common/mod.rs"]
mod common;
mod report;
mod windows;

use anyhow::{Context, Result, bail};
use args::Args;
use candle_int8_attention::drift::tokens::TextDrift;
use common::llama::Decoder;
use common::print::{finish, parse, tell};
use report::Report;
use std::process::ExitCode;
use std::time::Duration;
use windows::Windows;

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    let (text, text_name) = args.text()?;
    let decoder = args.model.load()?;
    let windows = Windows::of(&decoder, &text, args)
        .with_context(|| format!("cannot use the text {text_name}"))?;
    let report = compare(args, &decoder, &windows, text_name)?;
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render() })
}

/// Refuses figures that are NaN.
fn check_numbers(drift: &TextDrift) -> Result<()> {
    for (name, figure) in [
        ("perplexity of fp32", drift.perplexity_reference),
        ("perplexity of int8", drift.perplexity_candidate),
        ("mean KL divergence", drift.mean_kl),
    ] {
        if figure.value.is_nan() {
            bail!("the {name} is NaN, expected a number: the model's predictions are none");
        }
    }
    Ok(())
}

fn compare(args: &Args, fp32: &Decoder, windows: &Windows, text: String) -> Result<Report> {
    let mut int8 = fp32.model.clone();
    args.to_int8(&mut int8)?;
    let (mut tokens, mut times) = (Vec::new(), [Duration::ZERO; 2]);
    for (number, ids) in windows.iter().enumerate() {
        tokens.extend(windows::compare([&fp32.model, &int8], ids, args, &mut times)?);
        let so_far = TextDrift::of(&tokens);
        check_numbers(&so_far)
            .with_context(|| format!("window {} of {}", number + 1, windows.len()))?;
        tell(&format!(
            "[{}/{}] perplexity fp32 {:.4}, int8 {:.4}; mean KL {:.2e}, same top {:.2} %",
            number + 1,
            windows.len(),
            so_far.perplexity_reference.value,
            so_far.perplexity_candidate.value,
            so_far.mean_kl.value,
            100.0 * so_far.same_top.value,
        ));
    }
    if tokens.is_empty() {
        bail!("--chunks is 0, expected at least 1");
    }
    Ok(Report {
        model: fp32.name.clone(),
        text,
        config: args.describe_int8(),
        context: windows.context(),
        windows: windows.len(),
        seconds_fp32: times[0].as_secs_f64(),
        seconds_int8: times[1].as_secs_f64(),
        drift: TextDrift::of(&tokens),
    })
}
