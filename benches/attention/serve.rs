//! Contenders one at a time, for a driver that takes turns with other programs.

use crate::args::{Args, What};
use crate::contenders::{self, Contender, Inputs};
use crate::limit::{Limit, pv_peak};
use crate::peak::Peaks;
use crate::shape::Shape;
use anyhow::{Context, Result, bail};
use benches::machine::Machine;
use benches::serve::{self, calls as calls_of, commands, words};
use benches::turns::seconds;
use candle_core::Tensor;
use clap::ValueEnum;
use serde_json::{Value, json};

const COMMANDS: &str = "\
about -> the machine; \
peaks -> the instruction peaks; \
limit WHAT B,H,N,D -> the seconds that the instructions allow; \
run WHAT CONTENDER B,H,N,D CALLS -> the seconds of each call, on random inputs; \
compute WHAT CONTENDER FOLDER -> reads q.npy, k.npy and v.npy (f32), writes CONTENDER.npy; \
release -> frees the inputs of the last run. \
WHAT is scores or attention; CONTENDER is ours, candle, ours-fp32 or candle-flash (attention), ours-plain, memory or rten (scores)";

/// Answers until there are no more commands.
pub fn run(args: &Args, machine: &Machine) -> Result<()> {
    let mut server = Server { args, machine, peaks: None, ready: None };
    commands(|line| server.answer(line))
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
        match words(line)[..] {
            ["compute", what, contender, folder] => self.compute(what, contender, folder),
            ["about"] => Ok(json!({
                "machine": self.machine,
                "dtype": self.args.dtype,
                "pv": self.args.pv,
            })),
            ["peaks"] => Ok(json!({ "peaks": self.peaks() })),
            ["limit", what, shape] => self.limit(parse_what(what)?, parse_shape(shape)?),
            ["run", what, contender, shape, calls] => {
                self.run(parse_what(what)?, contender, parse_shape(shape)?, calls_of(calls)?)
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
        self.peaks.get_or_insert_with(|| Peaks::measure(self.machine.level))
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
        let call = |_| seconds(|| contender.call());
        let seconds: Vec<f64> = (0..calls).map(call).collect::<candle_core::Result<_>>()?;
        Ok(json!({ "seconds": seconds }))
    }

    fn compute(&mut self, what: &str, contender: &str, folder: &str) -> Result<Value> {
        let what = parse_what(what)?;
        let read = |name| -> Result<Tensor> {
            Ok(serve::read(folder, name)?.to_dtype(self.args.dtype.candle())?)
        };
        let inputs = Inputs { q: read("q")?, k: read("k")?, v: read("v")? };
        let mut contenders = contenders::all(what, &inputs, self.args)?;
        let contender = find(&mut contenders, contender)?;
        let output = contender.output()?;
        let output = output.with_context(|| format!("{} has no f32 result", contender.name))?;
        let path = serve::write(folder, contender.id, &output)?;
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
