//! The two runs of the encoder, and everything that is measured on them.

use crate::args::Args;
use crate::attended::Attended;
use crate::common::config::describe;
use crate::common::windows::Window;
use crate::heads::{Path, Qkv, drift_per_head, flat, worst_head};
use crate::report::{Block, Final, Report, Subject};
use crate::stages::{self, Stage};
use crate::static_words;
use anyhow::{Result, ensure};
use candle_core::Tensor;
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::drift::{Drift, metrics};
use candle_int8_attention::models::{EncoderModel, LayeredModel, TextEncoder};

/// Measures the chosen layer, the whole encoder and the static word embeddings.
pub fn report(
    args: &Args,
    encoder: &mut TextEncoder,
    window: &Window,
    text: &str,
    subject: Subject,
) -> Result<Report> {
    check_range("layer", args.layer, subject.layers)?;
    if let Some(head) = args.head {
        check_range("head", head, subject.heads)?;
    }
    let position = match &args.word {
        Some(word) => window.find(encoder, word)?,
        None => window.longest_word(),
    };
    let candidate = args.candidate();

    let model = &mut encoder.model;
    model.set_attention(&AttentionConfig::fp32());
    let fp32_run = Run::of(model, window, args.layer)?;
    let block = &fp32_run.block;
    let paths = (Path::fp32(block)?, Path::int8(block, &candidate)?);

    let in_int8 = |layer: usize, hidden: &Tensor| {
        let config = model.attention()[layer].config();
        model
            .layer(layer, hidden, &mut |q, k, v, call| candidate.attention((q, k, v), call, config))
    };
    let int8_layer = in_int8(args.layer, &fp32_run.input)?;
    let mut int8_final = model.embed(&window.ids)?;
    for layer in 0..subject.layers {
        int8_final = in_int8(layer, &int8_final)?;
    }

    let mut stages = vec![
        Stage::shared("word embeddings", &fp32_run.words)?,
        Stage::shared(&format!("input of layer {}", args.layer), &fp32_run.input)?,
    ];
    stages.extend(stages::of_attention(block, &candidate, (&paths.0, &paths.1))?);
    stages.push(Stage::compared(
        &format!("output of layer {}", args.layer),
        &fp32_run.output,
        &int8_layer,
    )?);
    stages.push(Stage::compared("output of the encoder", &fp32_run.last, &int8_final)?);

    let heads = drift_per_head(&paths.0, &paths.1)?;
    let head = args.head.unwrap_or_else(|| worst_head(&heads).map_or(0, |worst| worst.head));
    let attended =
        Attended::of((&paths.0, &paths.1), &window.tokens, position, head, args.top.into())?;
    let word = args.word.clone().unwrap_or_else(|| window.tokens[position].clone());
    Ok(Report {
        subject,
        config: describe(&candidate.config.scores, candidate.requant.as_ref()),
        layer: args.layer,
        block: Block { stages, heads, attended: Some(attended) },
        encoder: final_drift(model, &fp32_run.last, &int8_final)?,
        static_words: static_words::measure(args, text, &word)?,
    })
}

fn check_range(what: &str, index: usize, count: usize) -> Result<()> {
    ensure!(index < count, "{what} {index}: the model's {what}s are 0..={}", count - 1);
    Ok(())
}

/// One pass of the fp32 encoder, with what the report needs from it.
struct Run {
    words: Tensor,
    /// What enters the chosen layer, what enters its attention, and what leaves it.
    input: Tensor,
    block: Qkv,
    output: Tensor,
    last: Tensor,
}

impl Run {
    fn of(model: &EncoderModel, window: &Window, layer: usize) -> Result<Self> {
        let mut input = model.embed(&window.ids)?;
        for before in 0..layer {
            input = Qkv::of(model, before, &input)?.1;
        }
        let (block, output) = Qkv::of(model, layer, &input)?;
        let mut last = output.clone();
        for after in layer + 1..model.config().num_hidden_layers {
            last = Qkv::of(model, after, &last)?.1;
        }
        let words = model.word_embeddings().index_select(&window.ids.flatten_all()?, 0)?;
        Ok(Self { words, input, block, output, last })
    }
}

/// What is left of the int8 error at the end.
fn final_drift(model: &EncoderModel, fp32: &Tensor, int8: &Tensor) -> Result<Final> {
    let hidden = model.config().hidden_size;
    let text = |last: &Tensor| -> Result<Vec<f32>> { flat(&model.embedding(last)?) };
    let (a, b) = (flat(fp32)?, flat(int8)?);
    let cosines = a.chunks(hidden).zip(b.chunks(hidden)).map(|(a, b)| Ok(metrics::cosine(a, b)?));
    Ok(Final {
        worst_token_cosine: metrics::lowest(cosines.collect::<Result<Vec<_>>>()?),
        tokens: Drift::of_outputs(&a, &b)?,
        text: Drift::of_outputs(&text(fp32)?, &text(int8)?)?,
    })
}
