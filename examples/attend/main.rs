//! Attention on tensors that any framework has dumped: what int8 makes of them, and how far that
//! is from fp32.
//!
//! ```text
//! cargo run --release --example attend -- --input qkv.safetensors
//! cargo run --release --example attend -- --input qkv.safetensors --causal --output out.safetensors
//! cargo run --release --example attend -- --input qkv.safetensors --backend fp32 --json
//! ```
//!
//! # The input
//! A safetensors file. Floats are F32, F16, BF16 or F64; all are computed as f32.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `q` | `[B, H, M, D]` | queries |
//! | `k` | `[B, H_kv, N, D]` | keys; `H_kv` divides `H` |
//! | `v` | `[B, H_kv, N, Dv]` | values |
//! | `past_k`, `past_v` | `[B, H_kv, P, ..]` | optional; go before `k` and `v`, and `N` below counts them |
//! | `mask` | broadcasts to `[B, H, M, N]` as in NumPy | optional; BOOL or U8 (non-zero = attend), or floats that are added to the scaled scores |
//! | `kv_lens` | `[B]`, integers | optional; how many of the `N` keys of each sequence are real |
//!
//! A mask may stop short of `N` where `kv_lens` hides the rest. Everything applies at once: a key
//! is seen if the mask, the causal rule, the window and the length all let it through. A query that
//! sees no key gives zeros. NaN and infinity are errors, except in keys and values that no query
//! sees.
//!
//! # Which keys a query sees by its position
//! `--causal` is aligned to the first key: query `i` sees keys `j <= i`, counted from the first key
//! of `past_k` if there is one. `--causal-offset N` is `j <= i + N`: the length of the past, as a
//! rule. `--causal-offset end` aligns the last query to the last real key of each sequence. Windows
//! are around the same position; without a causal flag the queries are the last `M` of the `N`
//! keys.
//!
//! # The output
//! `out` `[B, H, M, Dv]`, f32; with `--save-scores` also `scores` `[B, H, M, N]`, f32: the scaled
//! scores `scale * q·k^T` of the backend, before softcap, masks and softmax. The file is complete
//! or not there.
//!
//! # Q, K and V of a PyTorch model
//! Most models call `scaled_dot_product_attention`; wrapped, it shows what it is given:
//!
//! ```python
//! import torch
//! from safetensors.torch import save_file
//!
//! calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention
//!
//! def recording(query, key, value, attn_mask=None, **options):
//!     tensors = {"q": query, "k": key, "v": value}
//!     if attn_mask is not None:
//!         tensors["mask"] = attn_mask
//!     whole = torch.contiguous_format
//!     calls.append({name: x.detach().cpu().clone(memory_format=whole) for name, x in tensors.items()})
//!     return sdpa(query, key, value, attn_mask=attn_mask, **options)
//!
//! torch.nn.functional.scaled_dot_product_attention = recording
//! model(**inputs)  # your model, on your text
//! for layer, tensors in enumerate(calls):
//!     save_file(tensors, f"layer-{layer}.safetensors")
//! ```
//!
//! `options` may hold `is_causal=True` (give `--causal`) and `scale` (give `--scale`).

mod args;
#[path = "../common/mod.rs"]
mod common;
mod exact;
mod input;
mod masking;
mod measure;
mod output;
mod report;

use anyhow::Result;
use args::Args;
use common::output::NewFile;
use common::print::{finish, parse};
use std::process::ExitCode;

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    args.check()?;
    let output = args.output.as_deref().map(|path| NewFile::create(path, [&args.input]));
    let output = output.transpose()?;
    let mut inputs = input::Inputs::read(&args.input)?;
    let masking = masking::Masking::new(&mut inputs, args)?;
    inputs.check_finite(&masking)?;
    let results = measure::Results::of(args, &inputs, &masking)?;
    if let Some(output) = output {
        output::write(output, &results.out, results.scores.as_ref())?;
    }
    let report = report::Report::new(args, &inputs, &masking, &results)?;
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render() })
}
