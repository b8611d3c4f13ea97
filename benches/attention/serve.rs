//! Contenders one at a time, for a driver that takes turns with other programs.
//!
//! Reads a command a line from stdin, answers each with a line of JSON on stdout: what was asked
//! for, or `{"error": ".."}`. Ends when stdin ends.

use crate::args::{Args, What};
use crate::contenders::{self, Contender, Inputs};
use crate::limit::{Limit, pv_peak};
use crate::machine::Machine;
use crate::peak::Peaks;
use crate::shape::Shape;
use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Tensor};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::path::Path;

const COMMANDS: &str = "\
about -> the machine and this crate's version; \
peaks -> the instruction peaks; \
limit WHAT B,H,N,D -> the seconds that the instructions allow; \
run WHAT CONTENDER B,H,N,D CALLS -> the seconds of each call, on random inputs; \
compute WHAT CONTENDER FOLDER -> reads q.npy, k.npy and v.npy (f32), writes CONTENDER.npy; \
release -> frees the inputs of the last run. \
WHAT is scores or attention; CONTENDER is ours, candle, candle-flash (attention) or rten (scores)";

/// Answers until there are no more commands.
pub fn run(args: &Args, machine: &Machine) -> Result<()> {
    let mut server = Server { args, machine, peaks: None, ready: None };
    for line in std::io::stdin().lock().lines() {
        let line = line.context("cannot read a command from stdin")?;
        if line.trim().is_empty() {
            continue;
        }
        let answer =
            server.answer(&line).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
        let mut out = std::io::stdout().lock();
        writeln!(out, "{answer}").and_then(|()| out.flush()).context("cannot answer on stdout")?;
    }
    Ok(())
}

struct Server<'a> {
    args: &'a Args,
    machine: &'a Machine,
    /// Measured when they are first asked for.
    peaks: Option<Peaks>,
    /// The contenders of the last run, with their inputs.
    ready: Option<(What, Shape, Vec<Contender>)>,
}

impl Server<'_> {
    fn answer(&mut self, line: &str) -> Result<Value> {
        // The last word of `compute` is a path, which may have spaces.
        let words: Vec<&str> = match line.trim().splitn(4, ' ').collect::<Vec<_>>()[..] {
            ["compute", what, contender, folder] => return self.compute(what, contender, folder),
            _ => line.split_whitespace().collect(),
        };
        match words[..] {
            ["about"] => Ok(json!({
                "version": env!("CARGO_PKG_VERSION"),
                "machine": self.machine,
                "dtype": self.args.dtype,
                "pv": self.args.pv,
            })),
            ["peaks"] => Ok(json!({ "peaks": self.peaks() })),
            ["limit", what, shape] => self.limit(parse_what(what)?, parse_shape(shape)?),
            ["run", what, contender, shape, calls] => {
                let calls = calls.parse().ok().filter(|&calls| calls > 0);
                let calls = calls.context("CALLS is not a number above 0")?;
                self.run(parse_what(what)?, contender, parse_shape(shape)?, calls)
            }
            ["release"] => {
                self.ready = None;
                Ok(json!({ "released": true }))
            }
            ["help"] => Ok(json!({ "help": COMMANDS })),
            _ => bail!("{line:?} is no command. {COMMANDS}"),
        }
    }

    fn peaks(&mut self) -> &Peaks {
        self.peaks.get_or_insert_with(Peaks::measure)
    }

    fn limit(&mut self, what: What, shape: Shape) -> Result<Value> {
        let pv = self.args.pv;
        let peaks = self.peaks();
        let limit = match what {
            What::Scores => Limit::scores(shape, peaks),
            What::Attention => Limit::attention(shape, peaks, pv),
        };
        Ok(json!({
            "seconds": limit.map(|limit| limit.seconds()),
            "parts": limit,
            "pv": pv_peak(peaks, pv).0,
        }))
    }

    fn run(&mut self, what: What, contender: &str, shape: Shape, calls: usize) -> Result<Value> {
        let same = |ready: &(What, Shape, _)| (ready.0, ready.1) == (what, shape);
        if !self.ready.as_ref().is_some_and(same) {
            self.ready = None;
            let inputs = Inputs::random(shape, self.args.dtype.candle())?;
            let contenders = contenders::all(what, &inputs, self.args)?;
            self.ready = Some((what, shape, contenders));
        }
        let (_, _, contenders) = self.ready.as_mut().expect("just made");
        let contender = find(contenders, contender)?;
        let seconds: Vec<f64> =
            (0..calls).map(|_| contender.call()).collect::<candle_core::Result<_>>()?;
        Ok(json!({ "seconds": seconds }))
    }

    fn compute(&mut self, what: &str, contender: &str, folder: &str) -> Result<Value> {
        let what = parse_what(what)?;
        let folder = Path::new(folder);
        let read = |name: &str| -> Result<Tensor> {
            let path = folder.join(name);
            let tensor = Tensor::read_npy(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            ensure!(
                tensor.rank() == 4,
                "{}: shape {:?}, expected [B, H, N, D]",
                path.display(),
                tensor.dims()
            );
            Ok(tensor.to_dtype(self.args.dtype.candle())?)
        };
        let inputs = Inputs { q: read("q.npy")?, k: read("k.npy")?, v: read("v.npy")? };
        let mut contenders = contenders::all(what, &inputs, self.args)?;
        let contender = find(&mut contenders, contender)?;
        let output = contender.output()?;
        let output = output.with_context(|| format!("{} has no f32 result", contender.name))?;
        let path = folder.join(format!("{}.npy", contender.id));
        output
            .to_dtype(DType::F32)?
            .write_npy(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(json!({ "written": path }))
    }
}

fn parse_what(text: &str) -> Result<What> {
    What::from_str(text, false)
        .map_err(|_| anyhow::anyhow!("{text:?}, expected scores or attention"))
}

fn parse_shape(text: &str) -> Result<Shape> {
    text.parse().map_err(anyhow::Error::msg)
}

fn find<'a>(contenders: &'a mut [Contender], id: &str) -> Result<&'a mut Contender> {
    let ids: Vec<_> = contenders.iter().map(|contender| contender.id).collect();
    let found = contenders.iter_mut().find(|contender| contender.id == id);
    found.with_context(|| format!("{id:?}, expected one of {}", ids.join(", ")))
}
