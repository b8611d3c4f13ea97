//! Encoders one at a time, for a driver that takes turns with other programs.
//!
//! Reads a command a line from stdin, answers each with a line of JSON on stdout: what was asked
//! for, or `{"error": ".."}`. Ends when stdin ends.

use crate::{Shape, any_ids, parse_shape};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_int8_attention::models::{ModelFiles, TextEncoder, mean_pool};
use candle_int8_attention::nn::Precision;
use candle_transformers::models::bert;
use serde_json::{Value, json};
use std::fs::read_to_string;
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

const COMMANDS: &str = "\
about -> threads and level; \
run NAME B,N CALLS -> the seconds of each forward pass; \
compute NAME FOLDER -> reads ids.npy (U32 [B, N]), writes the hidden states to NAME.npy; \
embed NAME FOLDER -> the seconds that the lines of texts.txt take; writes their embeddings to NAME.npy. \
NAME is f32, int16, int8 or candle";

/// Texts of a padded batch, for a model that packs nothing.
const BATCH: usize = 32;

/// Answers until there are no more commands.
pub fn run(files: &ModelFiles, candle: bert::BertModel) -> Result<()> {
    let load = |precision| -> Result<TextEncoder> {
        Ok(TextEncoder::load_in(files, &Device::Cpu, precision)?)
    };
    let server = Server {
        ours: [load(Precision::F32)?, load(Precision::Int16)?, load(Precision::Int8)?],
        candle,
    };
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read a command from stdin")?;
        let answer =
            server.answer(&line).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}").and_then(|()| out.flush()).context("cannot answer on stdout")?;
    }
    Ok(())
}

struct Server {
    /// In f32, int16 and int8.
    ours: [TextEncoder; 3],
    candle: bert::BertModel,
}

impl Server {
    fn answer(&self, line: &str) -> Result<Value> {
        // The last word may be a path, which may have spaces.
        match line.trim().splitn(3, ' ').collect::<Vec<_>>()[..] {
            ["about"] => Ok(json!({
                "threads": rayon::current_num_threads(),
                "level": candle_int8_attention::cpu::active_level()?,
            })),
            ["run", name, rest] => {
                let (shape, calls) = rest.split_once(' ').context("expected B,N CALLS")?;
                let shape = parse_shape(shape).map_err(anyhow::Error::msg)?;
                self.run(name, shape, calls.parse().context("CALLS is not a number")?)
            }
            ["compute", name, folder] => {
                let ids = Tensor::read_npy(Path::new(folder).join("ids.npy"))?;
                write(name, folder, &self.hidden(name, &ids.to_dtype(DType::U32)?)?)
            }
            ["embed", name, folder] => self.embed(name, folder),
            _ => bail!("{line:?} is no command. {COMMANDS}"),
        }
    }

    /// This crate's encoder of this name; none for candle-transformers'.
    fn ours(&self, name: &str) -> Result<Option<&TextEncoder>> {
        Ok(match name {
            "f32" => Some(&self.ours[0]),
            "int16" => Some(&self.ours[1]),
            "int8" => Some(&self.ours[2]),
            "candle" => None,
            _ => bail!("{name:?}, expected f32, int16, int8 or candle"),
        })
    }

    fn hidden(&self, name: &str, ids: &Tensor) -> Result<Tensor> {
        Ok(match self.ours(name)? {
            Some(encoder) => encoder.model.forward(ids, None, None)?,
            None => self.candle.forward(ids, &ids.zeros_like()?, None)?,
        })
    }

    fn run(&self, name: &str, shape: Shape, calls: usize) -> Result<Value> {
        let ids = any_ids(shape, self.ours[0].model.config().vocab_size)?;
        let call = |_| -> Result<f64> {
            let start = Instant::now();
            self.hidden(name, &ids)?;
            Ok(start.elapsed().as_secs_f64())
        };
        Ok(json!({ "seconds": (0..calls).map(call).collect::<Result<Vec<_>>>()? }))
    }

    fn embed(&self, name: &str, folder: &str) -> Result<Value> {
        let texts = read_to_string(Path::new(folder).join("texts.txt")).context("texts.txt")?;
        let texts: Vec<&str> = texts.lines().collect();
        let start = Instant::now();
        let embeddings = match self.ours(name)? {
            Some(encoder) => encoder.embed_sentences(&texts)?,
            None => self.embed_padded(&texts)?,
        };
        let seconds = start.elapsed().as_secs_f64();
        write(name, folder, &embeddings)?;
        Ok(json!({ "seconds": seconds }))
    }

    /// With candle-transformers: sorted by length, batches filled up with padding.
    fn embed_padded(&self, texts: &[&str]) -> Result<Tensor> {
        let tokenizer = &self.ours[0];
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&text| std::cmp::Reverse(texts[text].len()));
        let mut embeddings = Vec::with_capacity(texts.len().div_ceil(BATCH));
        for batch in order.chunks(BATCH) {
            let batch: Vec<&str> = batch.iter().map(|&text| texts[text]).collect();
            let batch = tokenizer.tokenize(&batch)?;
            let (ids, mask) = (&batch.input_ids, &batch.attention_mask);
            let hidden = self.candle.forward(ids, &ids.zeros_like()?, Some(mask))?;
            embeddings.push(mean_pool(&hidden, mask)?);
        }
        let mut places = vec![0u32; order.len()];
        order.iter().zip(0..).for_each(|(&text, place)| places[text] = place);
        let places = Tensor::new(places, &Device::Cpu)?;
        Ok(Tensor::cat(&embeddings, 0)?.index_select(&places, 0)?)
    }
}

fn write(name: &str, folder: &str, result: &Tensor) -> Result<Value> {
    let path = Path::new(folder).join(format!("{name}.npy"));
    result.write_npy(&path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(json!({ "written": path }))
}
