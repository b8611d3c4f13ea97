//! The forward pass of a BERT encoder beside candle-transformers' on the same weights, in turns
//! within one run.
//!
//! `cargo bench --bench bert` prints the median time of this crate's encoder with int8 and with
//! fp32 attention and of candle-transformers' `BertModel`, how many times as long that one takes,
//! and how far the results are apart.

#[path = "../common/turns.rs"]
mod turns;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::models::{BertModel, ModelFiles};
use candle_nn::VarBuilder;
use candle_transformers::models::bert;
use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;
use turns::{Contender, Timing, in_turns};

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
    /// Threads; default: as rayon chooses (RAYON_NUM_THREADS or all cores).
    #[arg(long)]
    threads: Option<usize>,
    /// Small shapes and few rounds: shows that everything runs, not how fast.
    #[arg(long)]
    short: bool,
    /// Only this contender: int8, fp32 or candle (for a profiler).
    #[arg(long, value_name = "NAME", value_parser = ["int8", "fp32", "candle"])]
    only: Option<String>,
    /// Also write the results to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Seconds of measuring for each shape.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// What cargo adds when it runs a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn parse_shape(text: &str) -> Result<Shape, String> {
    let numbers: Option<Vec<usize>> =
        text.split(',').map(|n| n.trim().parse().ok().filter(|&n| n > 0)).collect();
    numbers
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| format!("{text:?}, expected two positive numbers B,N"))
}

/// The three encoders, on the same weights.
struct Encoders {
    int8: BertModel,
    fp32: BertModel,
    candle: bert::BertModel,
}

impl Encoders {
    fn load(folder: &Path) -> Result<Self> {
        let files = ModelFiles::from_dir(folder)?;
        let mut int8 = BertModel::load(&files, &Device::Cpu)?;
        int8.set_attention(&AttentionConfig::int8());
        let config = serde_json::from_str(&std::fs::read_to_string(&files.config)?)
            .with_context(|| files.config.display().to_string())?;
        let weights = std::fs::read(&files.weights)?;
        let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu)?;
        Ok(Self {
            int8,
            fp32: BertModel::load(&files, &Device::Cpu)?,
            candle: bert::BertModel::load(weights, &config)?,
        })
    }

    /// The encoders by name, as functions of the ids.
    #[expect(clippy::type_complexity, reason = "a table of closures")]
    fn by_name(&self) -> [(&'static str, Box<dyn Fn(&Tensor) -> Result<Tensor> + '_>); 3] {
        [
            ("int8", Box::new(|ids| Ok(self.int8.forward(ids, None)?))),
            ("fp32", Box::new(|ids| Ok(self.fp32.forward(ids, None)?))),
            ("candle", Box::new(|ids| Ok(self.candle.forward(ids, &ids.zeros_like()?, None)?))),
        ]
    }
}

/// One shape.
#[derive(Serialize)]
struct Outcome {
    shape: Shape,
    timings: Vec<Timing>,
    /// Largest differences from candle-transformers' result: int8, fp32.
    differences: [f32; 2],
}

impl Outcome {
    fn measure(encoders: &Encoders, shape: Shape, args: &Args) -> Result<Self> {
        let [b, n] = shape;
        let vocabulary = encoders.fp32.config().vocab_size as u64;
        // Any words: what they are changes nothing in the time.
        let ids: Vec<u32> = (0..(b * n) as u64).map(|i| (i * 7919 % vocabulary) as u32).collect();
        let ids = Tensor::from_vec(ids, (b, n), &Device::Cpu)?;
        let expected = encoders.candle.forward(&ids, &ids.zeros_like()?, None)?;
        let difference = |model: &BertModel| -> Result<f32> {
            let found = model.forward(&ids, None)?;
            Ok((found - &expected)?.abs()?.max_all()?.to_scalar()?)
        };
        let wanted = |name: &str| args.only.as_ref().is_none_or(|only| only == name);
        let (by_name, ids) = (encoders.by_name(), &ids);
        let contenders = by_name.iter().filter(|(name, _)| wanted(name)).map(|(name, forward)| {
            Contender { name, run: Box::new(move || forward(ids).map(drop)) }
        });
        let budget = if args.short { 0.0 } else { args.seconds };
        let timings =
            in_turns(&mut contenders.collect::<Vec<_>>(), Duration::from_secs_f64(budget))?;
        let differences = [difference(&encoders.int8)?, difference(&encoders.fp32)?];
        Ok(Self { shape, timings, differences })
    }

    /// Median milliseconds; for candle also how many times as long as the others.
    fn row(&self) -> Vec<String> {
        let seconds = |name: &str| self.timings.iter().find(|t| t.name == name).map(|t| t.seconds);
        let ms = |name: &str| seconds(name).map_or("-".into(), |s| format!("{:.2}", s * 1e3));
        let ratio = |name: &str| match seconds("candle").zip(seconds(name)) {
            Some((candle, ours)) => format!("{:.2}x", candle / ours),
            None => "-".into(),
        };
        let [int8, fp32] = self.differences.map(|difference| format!("{difference:.1e}"));
        let [b, n] = self.shape;
        let shape = format!("[{b}, {n}]");
        vec![shape, ms("int8"), ms("fp32"), ms("candle"), ratio("int8"), ratio("fp32"), int8, fp32]
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paraphrase-MiniLM-L3-v2");
    let folder = args.model.clone().unwrap_or(shipped);
    let encoders = Encoders::load(&folder).context("the encoder to measure (--model DIR)")?;
    let shapes = match (args.shape.is_empty(), args.short) {
        (false, _) => args.shape.clone(),
        (true, true) => vec![[1, 5], [2, 17]],
        (true, false) => SHAPES.to_vec(),
    };
    let (threads, kernel) =
        (rayon::current_num_threads(), candle_int8_attention::gemm::active_kernel()?);
    println!("BERT forward, {threads} threads, int8 kernel {kernel}: median ms");
    let outcomes: Vec<Outcome> = shapes
        .into_iter()
        .map(|shape| Outcome::measure(&encoders, shape, &args))
        .collect::<Result<_>>()?;
    print(&outcomes);
    if let Some(path) = &args.json {
        let report =
            serde_json::json!({ "threads": threads, "kernel": kernel, "outcomes": outcomes });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn print(outcomes: &[Outcome]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "[B, N]",
        "int8 attention",
        "fp32 attention",
        "candle-transformers",
        "int8 ratio",
        "fp32 ratio",
        "int8 difference",
        "fp32 difference",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.add_rows(outcomes.iter().map(Outcome::row));
    println!("{table}");
}
