//! The tables: for every shape, this crate beside its peers and the machine's limit.

use crate::args::{Args, What};
use crate::contenders::{self, Inputs};
use crate::limit::{Limit, pv_peak};
use crate::peak::{Peak, Peaks};
use crate::print::{self, known, milliseconds, percent, times};
use crate::shape::Shape;
use anyhow::{Context, Result};
use benches::turns::{Timing, in_turns};
use comfy_table::CellAlignment;
use serde::Serialize;

/// From here up, attention should be near its limit.
const LONG: usize = 512;

/// Everything that is printed.
#[derive(Serialize)]
struct Report {
    peaks: Peaks,
    tables: Vec<Table>,
}

#[derive(Serialize)]
struct Table {
    what: What,
    rows: Vec<Row>,
    geometric_means: Means,
}

/// Over all shapes for which the number is known.
#[derive(Serialize)]
struct Means {
    peers: Vec<MeanRatio>,
    fraction_of_limit: Option<f64>,
    fraction_of_macs: Option<f64>,
}

/// How many times as long as this crate a peer takes.
#[derive(Serialize)]
struct MeanRatio {
    id: &'static str,
    ratio: Option<f64>,
}

#[derive(Serialize)]
struct Row {
    shape: Shape,
    /// This crate first.
    entries: Vec<Entry>,
    limit: Option<Limit>,
    /// Of the limit's time to this crate's: 1 is as fast as the instructions allow.
    fraction_of_limit: Option<f64>,
    /// The same without exponentials.
    fraction_of_macs: Option<f64>,
}

/// One contender on one shape.
#[derive(Serialize)]
struct Entry {
    id: &'static str,
    name: &'static str,
    seconds: Option<Timing>,
    /// Median to this crate's median.
    ratio: Option<f64>,
    /// Why it did not run.
    left_out: Option<String>,
}

/// Measures and prints; what is returned goes into the JSON.
pub fn run(args: &Args, level: &str) -> Result<impl Serialize + use<>> {
    let peaks = Peaks::measure(level);
    print_peaks(&peaks);
    let mut tables = Vec::new();
    for what in args.tables() {
        let rows = args.shapes().into_iter().map(|shape| measure(what, shape, &peaks, args));
        let table = Table::new(what, rows.collect::<Result<_>>()?);
        table.print(&peaks, args);
        tables.push(table);
    }
    Ok(Report { peaks, tables })
}

fn measure(what: What, shape: Shape, peaks: &Peaks, args: &Args) -> Result<Row> {
    eprintln!("{} of {shape} ..", what.name());
    let inputs = Inputs::random(shape, args.dtype.candle())?;
    let context = || format!("{} of {shape}", what.name());
    let mut contenders = contenders::all(what, &inputs, args).with_context(context)?;
    if args.alone {
        contenders.truncate(1);
    }
    let mut calls: Vec<_> = contenders.iter_mut().map(|contender| || contender.call()).collect();
    let mut timings = in_turns(&mut calls, args.options.pace()).into_iter();
    drop(calls);
    let ours = timings.next().context("nobody ran")?.with_context(context)?;
    let entry = |(contender, timing): (_, candle_core::Result<Timing>)| {
        let contenders::Contender { id, name, .. } = contender;
        let (seconds, left_out) = match timing {
            Ok(timing) => (Some(timing), None),
            Err(error) => (None, Some(first_line(&error))),
        };
        let ratio = seconds.map(|timing| timing.median / ours.median);
        Entry { id, name, seconds, ratio, left_out }
    };
    let entries = contenders.into_iter().zip(std::iter::once(Ok(ours)).chain(timings)).map(entry);
    let limit = match what {
        What::Scores => Limit::scores(shape, peaks),
        What::Attention => Limit::attention(shape, peaks, args.pv),
    };
    Ok(Row {
        shape,
        entries: entries.collect(),
        limit,
        fraction_of_limit: limit.map(|limit| limit.seconds() / ours.median),
        fraction_of_macs: limit.map(|limit| limit.macs() / ours.median),
    })
}

/// An error without its backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

impl Table {
    fn new(what: What, rows: Vec<Row>) -> Self {
        let of_all = |number: &dyn Fn(&Row) -> Option<f64>| geometric_mean(rows.iter().map(number));
        let peers = rows.first().map_or(&[][..], |row| &row.entries[1..]).iter().enumerate();
        let mean = |(i, peer): (usize, &Entry)| MeanRatio {
            id: peer.id,
            ratio: of_all(&|row| row.entries[i + 1].ratio),
        };
        let geometric_means = Means {
            peers: peers.map(mean).collect(),
            fraction_of_limit: of_all(&|row| row.fraction_of_limit),
            fraction_of_macs: of_all(&|row| row.fraction_of_macs),
        };
        Self { what, rows, geometric_means }
    }

    fn print(&self, peaks: &Peaks, args: &Args) {
        let Some(first) = self.rows.first() else { return };
        let (title, limit) = match self.what {
            What::Scores => ("Scores: q·k^T", "B·H·N·N·D int8 MACs at their peak"),
            What::Attention => ("Attention: softmax(q·k^T / sqrt(D))·v", "see below"),
        };
        println!(
            "\n{title}, {} in and out, {}.\nMedian ms ± half of the interquartile range, and how many \
             times as long as this crate.\nLimit: {limit}.\n",
            args.dtype.name(),
            args.options.pace()
        );
        let names = first.entries.iter().map(|entry| entry.name);
        let mut header: Vec<&str> = [print::SHAPE].into_iter().chain(names).collect();
        header.push("of the limit");
        if self.what == What::Attention {
            header.push("MACs alone");
        }
        let mut table = print::table(&header);
        for row in &self.rows {
            table.add_row(self.cells(row));
        }
        table.add_row(self.means());
        println!("{table}");
        self.print_left_out();
        if self.what == What::Attention {
            self.print_limits(pv_peak(peaks, args.pv).0);
        }
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let mut cells = vec![row.shape.to_string()];
        cells.extend(row.entries.iter().enumerate().map(|(i, entry)| match entry {
            Entry { seconds: Some(timing), ratio: Some(ratio), .. } => {
                let time = format!("{} ±{}", milliseconds(timing.median), percent(timing.spread()));
                if i == 0 { time } else { format!("{time}  {}", times(*ratio)) }
            }
            _ => print::NOTHING.into(),
        }));
        cells.push(known(row.fraction_of_limit, percent));
        if self.what == What::Attention {
            cells.push(known(row.fraction_of_macs, percent));
        }
        cells
    }

    fn means(&self) -> Vec<String> {
        let means = &self.geometric_means;
        let mut cells = vec!["geometric mean".to_string(), String::new()];
        cells.extend(means.peers.iter().map(|peer| known(peer.ratio, times)));
        cells.push(known(means.fraction_of_limit, percent));
        if self.what == What::Attention {
            cells.push(known(means.fraction_of_macs, percent));
        }
        cells
    }

    fn print_left_out(&self) {
        for row in &self.rows {
            for entry in &row.entries {
                if let Some(reason) = &entry.left_out {
                    println!("{} {}: left out, {reason}", row.shape, entry.name);
                }
            }
        }
    }

    /// How the limit of each shape is made.
    fn print_limits(&self, pv: &str) {
        if self.rows.iter().all(|row| row.limit.is_none()) {
            return;
        }
        println!(
            "\nThe limit of attention, in ms, is the sum of its parts at the instruction peaks above: \
             B·H·N·N·D MACs\nin int8, as many in {pv}, and B·H·N·N exponentials. Nothing else is in \
             it: no loads and stores, no\nquantizing and packing, no maxima and sums of the \
             softmax.\n"
        );
        let product = format!("P·V {pv}");
        let header =
            [print::SHAPE, "q·k^T int8", &product, "exp2", "limit", "this crate", "of the limit"];
        let mut table = print::table(&header);
        for row in &self.rows {
            let (Some(limit), Some(ours)) = (row.limit, row.entries[0].seconds) else { continue };
            let times = [limit.int8, limit.pv, limit.exp2, limit.seconds(), ours.median];
            let fraction = known(row.fraction_of_limit, percent);
            let shape = std::iter::once(row.shape.to_string());
            table.add_row(shape.chain(times.map(milliseconds)).chain([fraction]));
        }
        println!("{table}");
        let long = self.rows.iter().filter(|row| row.shape.tokens() >= LONG);
        let fractions = long.filter_map(|row| Some((row.fraction_of_limit?, row.shape)));
        if let Some((fraction, shape)) = fractions.min_by(|a, b| a.0.total_cmp(&b.0)) {
            println!("\nLeast at N >= {LONG}: {} of the limit, {shape}.", percent(fraction));
        }
    }
}

fn print_peaks(peaks: &Peaks) {
    let threads = rayon::current_num_threads();
    println!(
        "\nInstruction peaks of the level: loops on registers alone, all threads at once. Multiply-accumulates\n\
         (MACs), or f32 exponentials with a polynomial of degree 5, in 10^9 a second.\n"
    );
    let mut table = print::table(&["peak of", "all threads", "one thread", "loop"]);
    table.column_mut(3).expect("four columns").set_cell_alignment(CellAlignment::Left);
    let quantities: [(&str, &Option<Peak>); 5] = [
        ("int8 MACs, exact", &peaks.int8),
        ("int16 MACs, exact", &peaks.int16),
        ("bf16 MACs", &peaks.bf16),
        ("f32 MACs", &peaks.f32),
        ("exp2", &peaks.exp2),
    ];
    for (quantity, peak) in quantities {
        let (all, one, instructions) = match peak {
            Some(peak) => (
                format!("{:.1}", peak.per_second / 1e9),
                format!("{:.1}", peak.per_second / 1e9 / threads as f64),
                peak.instructions,
            ),
            None => (print::NOTHING.into(), print::NOTHING.into(), "not in this level"),
        };
        table.add_row([quantity.to_string(), all, one, instructions.to_string()]);
    }
    println!("{table}");
}

/// Over what is there; `None` if nothing is.
fn geometric_mean(numbers: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let logs: Vec<f64> = numbers.flatten().map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}
