//! The forward pass of a BERT encoder beside candle-transformers' on the same weights, in turns
//! within one run.
//!
//! `cargo bench -p benches --bench bert` prints the median time of this crate's encoder with int8 and with
//! fp32 attention, with linear layers in int16 and in int8, and of candle-transformers' `BertModel`, how many
//! times as long that one takes, and how far the results are apart. With `-- --serve` it answers the driver of
//! `benches/peers/encoders.py`.

mod serve;

use anyhow::{Context, Result};
use benches::options::Options;
use benches::turns::{Timing, in_turns};
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::models::{BertModel, ModelFiles};
use candle_int8_attention::nn::Precision;
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// `[B, N]`: sequences, tokens of each.
type Shape = [usize; 2];

const SHAPES: [Shape; 5] = [[1, 16], [1, 128], [8, 128], [32, 32], [1, 512]];

/// Time the forward pass of a BERT encoder beside candle-transformers', in turns.
#[derive(Parser)]
struct Args {
    /// Shape B,N; can be given several times. Default: 1,16 1,128 8,128 32,32 1,512.
    #[arg(long, value_parser = parse_shape)]
    shape: Vec<Shape>,
    /// Folder with the weights (safetensors), config.json and tokenizer.json of a BERT model
    /// [default: models/paraphrase-MiniLM-L3-v2 of this project].
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Only this contender (for a profiler).
    #[arg(long, value_name = "NAME", value_parser = OURS.into_iter().chain([CANDLE]).collect::<Vec<_>>())]
    only: Option<String>,
    /// Also write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Answer commands on stdin, for benches/peers/encoders.py.
    #[arg(long)]
    serve: bool,
    #[command(flatten)]
    options: Options,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let numbers: Option<Vec<usize>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| format!("{text:?}, expected two positive numbers B,N"))
}

/// This crate's encoders: the precision of the attention, and of linear layers if it is not f32.
const OURS: [&str; 4] = ["int8", "fp32", "fp32+int16", "int8+int8"];
const CANDLE: &str = "candle";

/// Computes once.
type Run<'a> = Box<dyn FnMut() -> Result<()> + 'a>;

/// The encoders, on the same weights.
struct Encoders {
    /// As in [`OURS`].
    ours: Vec<BertModel>,
    candle: bert::BertModel,
}

impl Encoders {
    fn load(files: &ModelFiles) -> Result<Self> {
        let load = || BertModel::load(files, &Device::Cpu);
        let mut ours = vec![load()?, load()?, load()?, load()?];
        ours[0].set_attention(&AttentionConfig::int8());
        ours[2].set_linear(Precision::Int16)?;
        ours[3].set_attention(&AttentionConfig::int8());
        ours[3].set_linear(Precision::Int8)?;
        Ok(Self { ours, candle: load_candle(files)? })
    }

    /// This crate's, by name.
    fn ours(&self) -> impl Iterator<Item = (&'static str, &BertModel)> {
        OURS.into_iter().zip(&self.ours)
    }

    /// The hidden states of candle-transformers.
    fn candle(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.candle.forward(ids, &ids.zeros_like()?, None)?)
    }

    /// Those whose name is wanted, to be timed on the same ids.
    fn contenders<'a>(
        &'a self,
        ids: &'a Tensor,
        only: Option<&str>,
    ) -> Vec<(&'static str, Run<'a>)> {
        let ours = self.ours().map(|(name, model)| -> (_, Run<'a>) {
            (name, Box::new(move || Ok(model.forward(ids, None).map(drop)?)))
        });
        let candle: Run<'a> = Box::new(|| self.candle(ids).map(drop));
        let wanted = |name: &str| only.is_none_or(|only| only == name);
        ours.chain([(CANDLE, candle)]).filter(|(name, _)| wanted(name)).collect()
    }
}

/// The encoder of candle-transformers.
fn load_candle(files: &ModelFiles) -> Result<bert::BertModel> {
    let config = serde_json::from_str(&std::fs::read_to_string(&files.config)?)
        .with_context(|| files.config.display().to_string())?;
    let weights = std::fs::read(&files.weights)?;
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
    Ok(bert::BertModel::load(weights, &config)?)
}

/// Any words: what they are changes nothing in the time.
fn any_ids([b, n]: Shape, vocabulary: usize) -> Result<Tensor> {
    let id = |i: usize| (i as u64 * 7919 % vocabulary as u64) as u32;
    Ok(Tensor::from_iter((0..b * n).map(id), &Device::Cpu)?.reshape((b, n))?)
}

/// One shape.
#[derive(Serialize)]
struct Outcome {
    shape: Shape,
    timings: Vec<(&'static str, Timing)>,
    /// Largest difference from candle-transformers' result, for each of this crate's.
    differences: Vec<f32>,
}

impl Outcome {
    fn measure(encoders: &Encoders, shape: Shape, args: &Args) -> Result<Self> {
        let ids = any_ids(shape, encoders.ours[0].config().vocab_size)?;
        let (names, mut runs): (Vec<_>, Vec<_>) =
            encoders.contenders(&ids, args.only.as_deref()).into_iter().unzip();
        let timings = in_turns(&mut runs, args.options.pace());
        let timings = names.into_iter().zip(timings).map(|(name, timing)| Ok((name, timing?)));
        let timings = timings.collect::<Result<_>>()?;
        let expected = encoders.candle(&ids)?;
        let difference = |(_, model): (_, &BertModel)| -> Result<f32> {
            let found = model.forward(&ids, None)?;
            Ok((found - &expected)?.abs()?.max_all()?.to_scalar()?)
        };
        let differences = encoders.ours().map(difference).collect::<Result<_>>()?;
        Ok(Self { shape, timings, differences })
    }

    /// Of each encoder the median milliseconds; of this crate's also how many times as long
    /// candle-transformers takes, and the difference.
    fn row(&self) -> Vec<String> {
        let seconds = |name: &str| self.timings.iter().find(|t| t.0 == name).map(|t| t.1.median);
        let or_dash = |cell: Option<String>| cell.unwrap_or("-".into());
        let ms = |name: &str| or_dash(seconds(name).map(|s| format!("{:.2}", s * 1e3)));
        let ratio = |name: &str| {
            let times = seconds(CANDLE).zip(seconds(name));
            or_dash(times.map(|(candle, ours)| format!("{:.2}x", candle / ours)))
        };
        let [b, n] = self.shape;
        let mut cells = vec![format!("[{b}, {n}]"), ms(CANDLE)];
        for (i, name) in OURS.into_iter().enumerate() {
            let difference = self.differences.get(i).map(|difference| format!("{difference:.1e}"));
            cells.extend([ms(name), ratio(name), or_dash(difference)]);
        }
        cells
    }
}

fn main() -> ExitCode {
    benches::end(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let machine = args.options.start()?;
    let shipped = benches::project().join("models/paraphrase-MiniLM-L3-v2");
    let folder = args.model.clone().unwrap_or(shipped);
    let to_measure = "the encoder to measure (--model DIR)";
    let files = ModelFiles::from_dir(&folder).context(to_measure)?;
    if args.serve {
        return serve::run(&files, load_candle(&files).context(to_measure)?);
    }
    let encoders = Encoders::load(&files).context(to_measure)?;
    let shapes = match (args.shape.is_empty(), args.options.short) {
        (false, _) => args.shape.clone(),
        (true, true) => vec![[1, 5], [2, 17]],
        (true, false) => SHAPES.to_vec(),
    };
    println!("{machine}\nBERT forward, {}: median ms", args.options.pace());
    let outcomes: Vec<Outcome> = shapes
        .into_iter()
        .map(|shape| Outcome::measure(&encoders, shape, args))
        .collect::<Result<_>>()?;
    print(&outcomes);
    if let Some(path) = &args.json {
        let report = serde_json::json!({ "machine": machine, "outcomes": outcomes });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new();
    let mut header = vec!["[B, N]".to_string(), "candle-transformers".into()];
    for name in OURS {
        header.extend([name.to_string(), "ratio".into(), "difference".into()]);
    }
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.add_rows(outcomes.iter().map(Outcome::row));
    println!("{table}");
}
