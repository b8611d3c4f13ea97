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
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::drift::{Drift, metrics};
use candle_int8_attention::models::{BertLayer, BertModel, TextEncoder, mean_pool};
use candle_int8_attention::{AttentionCall, AttentionConfig, AttnMask};

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
    let block = fp32_run.block(model, args.layer)?;
    let paths = (Path::fp32(&block)?, Path::int8(&block, &candidate)?);

    let (call, config) = (AttentionCall::default(), AttentionConfig::default());
    let in_int8 = |layer: &BertLayer, hidden: &Tensor| {
        layer.forward_with(hidden, |q, k, v| candidate.attention((q, k, v), &call, &config))
    };
    let int8_layer = in_int8(&model.layers()[args.layer], &fp32_run.input)?;
    let embedded = model.embed(&window.ids, None)?;
    let int8_final =
        model.layers().iter().try_fold(embedded, |hidden, layer| in_int8(layer, &hidden))?;

    let mut stages = vec![
        Stage::shared("word embeddings", &fp32_run.words)?,
        Stage::shared(&format!("input of layer {}", args.layer), &fp32_run.input)?,
    ];
    stages.extend(stages::of_attention(&block, &candidate, (&paths.0, &paths.1))?);
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
        encoder: final_drift(&fp32_run.last, &int8_final)?,
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
    /// What enters the chosen layer, and what leaves it.
    input: Tensor,
    output: Tensor,
    last: Tensor,
}

impl Run {
    fn of(model: &BertModel, window: &Window, layer: usize) -> Result<Self> {
        let mut hidden = vec![model.embed(&window.ids, None)?];
        for layer in model.layers() {
            hidden.push(layer.forward(&hidden[hidden.len() - 1], &AttnMask::None)?);
        }
        Ok(Self {
            words: model.word_embeddings().index_select(&window.ids.flatten_all()?, 0)?,
            input: hidden[layer].clone(),
            output: hidden[layer + 1].clone(),
            last: hidden[hidden.len() - 1].clone(),
        })
    }

    fn block(&self, model: &BertModel, layer: usize) -> Result<Qkv> {
        let (q, k, v) = model.layers()[layer].qkv(&self.input)?;
        Ok(Qkv { q, k, v })
    }
}

/// What is left of the int8 error at the end.
fn final_drift(fp32: &Tensor, int8: &Tensor) -> Result<Final> {
    let (_, tokens, hidden) = fp32.dims3()?;
    let everything = Tensor::ones((1, tokens), DType::U32, &Device::Cpu)?;
    let text = |last: &Tensor| -> Result<Vec<f32>> { flat(&mean_pool(last, &everything)?) };
    let (a, b) = (flat(fp32)?, flat(int8)?);
    let cosines = a.chunks(hidden).zip(b.chunks(hidden)).map(|(a, b)| metrics::cosine(a, b));
    Ok(Final {
        worst_token_cosine: metrics::lowest(cosines),
        tokens: Drift::of_outputs(&a, &b),
        text: Drift::of_outputs(&text(fp32)?, &text(int8)?),
    })
}
