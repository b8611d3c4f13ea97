//! How much memory one call of attention takes beyond its inputs and its output.

use crate::args::Args;
use crate::contenders::Inputs;
use crate::print;
use crate::shape::Shape;
use anyhow::{Context, Result, bail};
use serde::Serialize;

/// Long enough that all scores would take 13 GB.
const LONG: Shape = Shape([1, 12, 16384, 64]);

#[derive(Serialize)]
struct Report {
    shape: Shape,
    /// Bytes of queries, keys and values.
    inputs: usize,
    /// Bytes of the output.
    output: usize,
    /// Bytes that the process had at most, beyond what it had before the call and the output.
    beyond: usize,
}

/// Makes one call and prints; what is returned goes into the JSON. The process has done nothing
/// else before, so that its peak is that of the call.
pub fn run(args: &Args) -> Result<impl Serialize + use<>> {
    let shape = match args.shape[..] {
        [] if args.options.short => Shape([1, 2, 1024, 32]),
        [] => LONG,
        [shape] => shape,
        _ => bail!(
            "--memory measures one shape, in a process of its own: {} given",
            args.shape.len()
        ),
    };
    let inputs = Inputs::random(shape, args.dtype.candle())?;
    let bytes = shape.elements() * args.dtype.candle().size_in_bytes();
    // Threads start before, with whatever they take.
    rayon::broadcast(|_| ());
    let before = peak_memory()?;
    let output = inputs.attend(&args.attention())?;
    let after = peak_memory()?;
    drop(output);
    let beyond = after.saturating_sub(before).saturating_sub(bytes);
    let report = Report { shape, inputs: 3 * bytes, output: bytes, beyond };
    report.print();
    Ok(report)
}

impl Report {
    fn print(&self) {
        println!("\nPeak memory of one call of attention by this crate, in MB (10^6 bytes).\n");
        let mut table =
            print::table(&[print::SHAPE, "inputs", "output", "beyond these", "all scores in f32"]);
        let mb = |bytes: f64| format!("{:.1}", bytes / 1e6);
        table.add_row([
            self.shape.to_string(),
            mb(self.inputs as f64),
            mb(self.output as f64),
            mb(self.beyond as f64),
            mb(self.shape.scores() * 4.0),
        ]);
        println!("{table}");
    }
}

/// The most bytes of memory that this process has had so far.
fn peak_memory() -> Result<usize> {
    const FILE: &str = "/proc/self/status";
    let status = std::fs::read_to_string(FILE)
        .with_context(|| format!("peak memory is read from {FILE}, which only Linux has"))?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = kilobytes.with_context(|| format!("no line VmHWM in {FILE}"))?;
    let number = kilobytes.trim().trim_end_matches(" kB");
    let number: usize = number.parse().with_context(|| format!("VmHWM is {number:?}"))?;
    Ok(number * 1024)
}
