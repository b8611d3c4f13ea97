//! Static scales: ranges of queries and keys collected from one text, and what they cost on another.
//!
//! ```text
//! cargo run --release --example calibrate
//! cargo run --release --example calibrate -- --file book.txt --observer min-max --output ranges.json
//! cargo run --release --example calibrate -- --file book.txt --ranges ranges.json
//! ```
//!
//! The first prints the drift of static scales from every kind of observer beside that of dynamic
//! ones; the second saves the ranges of one; the third loads them. `--model` takes an encoder or a
//! decoder. A model loads ranges like this; a decoder then needs a cache by `LlamaCache::full`,
//! because an int8 cache has scales of its own:
//!
//! ```no_run
//! use candle_core::Device;
//! use candle_int8_attention::models::{BertModel, Calibration, ModelFiles, StaticScales};
//!
//! let files = ModelFiles::from_dir("models/paraphrase-MiniLM-L3-v2")?;
//! let mut model = BertModel::load(&files, &Device::Cpu)?;
//! Calibration::load("ranges.json")?.apply(&mut model, StaticScales::PerHead)?;
//! # Ok::<(), candle_int8_attention::Error>(())
//! ```

#[path = "../common/mod.rs"]
mod common;
mod measure;
mod report;

use anyhow::Result;
use candle_int8_attention::Backend;
use candle_int8_attention::models::{
    Calibration, CalibrationConfig, LayeredModel, StaticScales, calibrate,
};
use candle_int8_attention::quant::{ObserverKind, Scheme, Smoothing};
use common::output::check_writable;
use common::passages::{PassageArgs, Passages};
use common::print::{finish, parse};
use common::text_model::{Loaded, TextModel, TextModelArgs};
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;

/// Drift of int8 attention with static scales, beside dynamic ones.
#[derive(Debug, clap::Parser)]
#[command(name = "calibrate")]
struct Args {
    /// How ranges are chosen: min-max, moving-average[:WEIGHT], percentile[:PERCENT] or mse
    /// [default: all four, one after the other]
    #[arg(long, value_name = "KIND")]
    observer: Option<ObserverKind>,

    /// Save the ranges to this file (JSON)
    #[arg(long, value_name = "FILE", requires = "observer")]
    output: Option<PathBuf>,

    /// Load ranges from this file, and collect none
    #[arg(long, value_name = "FILE", conflicts_with_all = ["observer", "scheme", "no_smooth_k",
        "no_smooth_q", "no_rotate"])]
    ranges: Option<PathBuf>,

    /// What shares a static scale
    #[arg(long, value_name = "WHAT", value_enum, default_value = "head")]
    scales: Scales,

    /// symmetric or affine codes
    #[arg(long, value_name = "SCHEME", default_value = "symmetric")]
    scheme: Scheme,

    /// Subtract nothing from the keys; else the mean of each block of 64
    #[arg(long)]
    no_smooth_k: bool,

    /// Subtract nothing from the queries; else the mean of each block of 48
    #[arg(long)]
    no_smooth_q: bool,

    /// Quantize queries and keys without rotating them before
    #[arg(long)]
    no_rotate: bool,

    /// Print JSON; an infinite ratio (no difference at all) is null
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    text: PassageArgs,

    #[command(flatten)]
    model: TextModelArgs,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Scales {
    Head,
    Tensor,
}

impl From<Scales> for StaticScales {
    fn from(scales: Scales) -> Self {
        match scales {
            Scales::Head => StaticScales::PerHead,
            Scales::Tensor => StaticScales::PerTensor,
        }
    }
}

fn main() -> ExitCode {
    finish(run(&parse::<Args>()))
}

fn run(args: &Args) -> Result<String> {
    let loaded = args.ranges.as_ref().map(Calibration::load).transpose()?;
    let inputs = args.text.file.iter().chain(&args.text.unseen);
    let target = args.output.as_deref().map(|path| check_writable(path, inputs)).transpose()?;
    let Loaded { mut model, name, .. } = args.model.load()?;
    let passages = args.text.read(&model)?;
    for layer in model.attention_mut() {
        layer.set_config(layer.config().with_backend(Backend::Fp32));
    }
    let calibrations = match loaded {
        Some(calibration) => vec![calibration],
        None => collect(args, &model, &passages)?,
    };
    let rows = measure::rows(&mut model, &passages.unseen, &calibrations, args.scales.into())?;
    if let (Some(path), [calibration]) = (&target, calibrations.as_slice()) {
        calibration.save(path)?;
    }
    let source = match &args.ranges {
        Some(path) => path.display().to_string(),
        None => passages.summary.text.clone(),
    };
    let written = args.output.as_ref().map(|path| path.display().to_string());
    let report = Report { model: name, source, text: passages.summary, rows, written };
    Ok(if args.json { serde_json::to_string_pretty(&report)? } else { report.render() })
}

/// One calibration an observer.
fn collect(args: &Args, model: &TextModel, passages: &Passages) -> Result<Vec<Calibration>> {
    let observers = match args.observer {
        Some(observer) => vec![observer],
        None => vec![
            ObserverKind::MinMax,
            ObserverKind::MOVING_AVERAGE,
            ObserverKind::PERCENTILE,
            ObserverKind::Mse,
        ],
    };
    let of = |observer| {
        let smoothing = |off: bool| if off { Smoothing::None } else { Smoothing::Block };
        let config = CalibrationConfig {
            observer,
            scheme: args.scheme,
            smooth_k: smoothing(args.no_smooth_k),
            smooth_q: smoothing(args.no_smooth_q),
            rotate: !args.no_rotate,
            ..CalibrationConfig::default()
        };
        Ok(calibrate(model, &passages.seen, config)?)
    };
    observers.into_iter().map(of).collect()
}
