//! The README's figure: the time of attention against the number of tokens, for this crate and its
//! peers.
//!
//! ```sh
//! python benches/peers/compare.py --json docs/figures/attention.json
//! cargo run --release -p benches -- docs/figures/attention.json
//! ```

use anyhow::{Context, Result, bail};
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use serde::Deserialize;
use std::path::PathBuf;

/// Draw the sweep that benches/peers/compare.py measured
#[derive(clap::Parser)]
struct Args {
    /// What `compare.py --json` wrote
    results: PathBuf,

    /// The figure [default: beside the results, with the ending .svg]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Results {
    date: String,
    threads: usize,
    machine: Machine,
    tables: Vec<Table>,
}

#[derive(Deserialize)]
struct Machine {
    processor: String,
    level: String,
}

#[derive(Deserialize)]
struct Table {
    name: String,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    shape: [usize; 4],
    entries: Vec<Entry>,
    limit: Limit,
}

#[derive(Deserialize)]
struct Entry {
    title: String,
    /// Seconds; absent where the contender did not run.
    median: Option<f64>,
}

#[derive(Deserialize)]
struct Limit {
    seconds: Option<f64>,
    /// Precision of probabilities times values.
    pv: String,
}

/// One line of the figure: pairs of tokens and what the axis shows.
struct Series {
    title: String,
    colour: RGBColor,
    /// This crate's line is drawn wider.
    width: u32,
    points: Vec<(f64, f64)>,
}

/// One of the two diagrams.
struct Panel<'a> {
    /// What the vertical axis shows.
    what: &'a str,
    /// It is labelled at powers of this, and ends at two of them.
    base: f64,
    label: &'a dyn Fn(&f64) -> String,
    series: Vec<Series>,
    /// The least time, as a dashed line.
    limit: Vec<(f64, f64)>,
    limit_label: String,
    legend: bool,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (900, 780);
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xd8, 0xd8, 0xd8);
const LIMIT: RGBColor = RGBColor(0x66, 0x66, 0x66);
/// This crate, then the peers: apart for the colour-blind too (after Okabe and Ito), and dark enough
/// on white. The background is filled, so that a dark page does not swallow the text.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x00, 0x8a, 0x64),
    RGBColor(0xb0, 0x4f, 0x8a),
    RGBColor(0x8a, 0x6d, 0x00),
    RGBColor(0x33, 0x33, 0x99),
    RGBColor(0x00, 0x00, 0x00),
];

fn main() -> Result<()> {
    let args: Args = clap::Parser::parse();
    let path = &args.results;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let results: Results = serde_json::from_str(&text)
        .with_context(|| format!("{} is not what compare.py --json writes", path.display()))?;
    let table = results.tables.iter().find(|table| table.name == "sweep");
    let table = table.filter(|table| table.rows.len() > 1).with_context(|| {
        format!("{} has no table `sweep`: run compare.py with --only sweep", path.display())
    })?;
    let output = args.output.unwrap_or_else(|| path.with_extension("svg"));
    let mut svg = String::new();
    draw(&results, table, &mut svg)?;
    std::fs::write(&output, svg).with_context(|| format!("cannot write {}", output.display()))?;
    println!("{}", output.display());
    Ok(())
}

/// Two diagrams above each other: the time of everyone, and what it is to this crate's.
fn draw(results: &Results, table: &Table, svg: &mut String) -> Result<()> {
    let [batch, heads, _, dim] = table.rows[0].shape;
    let title = format!("Attention of [{batch}, {heads}, N, {dim}] on a CPU, f32 in and out");
    let subtitle = format!(
        "{}, {} threads, level {}, {}; medians, everyone in turns",
        results.machine.processor, results.threads, results.machine.level, results.date
    );
    let times = Panel {
        what: "time of a call",
        base: 10.0,
        label: &time_label,
        series: series(table),
        limit: table
            .rows
            .iter()
            .filter_map(|row| Some((row.tokens(), row.limit.seconds?)))
            .collect(),
        limit_label: format!("limit of the instructions (int8, {})", table.rows[0].limit.pv),
        legend: true,
    };
    let ratios = Panel {
        what: "times as long as this crate",
        base: 2.0,
        label: &|ratio| format!("{ratio}x"),
        series: ratios(&times.series),
        limit: Vec::new(),
        limit_label: String::new(),
        legend: false,
    };
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let inside = root.margin(12, 8, 12, 28);
    let inside = inside.titled(&title, text(20))?.titled(&subtitle, text(14))?;
    let (upper, lower) = inside.split_vertically((60).percent_height());
    times.draw(&upper)?;
    ratios.draw(&lower)?;
    root.present()?;
    Ok(())
}

impl Row {
    fn tokens(&self) -> f64 {
        self.shape[2] as f64
    }
}

/// Everyone's times; this crate first, as in every row of the table.
fn series(table: &Table) -> Vec<Series> {
    let line = |(i, first): (usize, &Entry)| Series {
        title: first.title.clone(),
        colour: COLOURS[i % COLOURS.len()],
        width: if i == 0 { 4 } else { 2 },
        points: table
            .rows
            .iter()
            .filter_map(|row| Some((row.tokens(), row.entries.get(i)?.median?)))
            .collect(),
    };
    table.rows[0].entries.iter().enumerate().map(line).collect()
}

/// All lines divided by the first.
fn ratios(series: &[Series]) -> Vec<Series> {
    let ours = |tokens: f64| series[0].points.iter().find(|point| point.0 == tokens);
    let divided = |line: &Series| Series {
        title: line.title.clone(),
        points: line
            .points
            .iter()
            .filter_map(|&(tokens, seconds)| Some((tokens, seconds / ours(tokens)?.1)))
            .collect(),
        ..*line
    };
    series.iter().map(divided).collect()
}

impl Panel<'_> {
    fn draw(&self, area: &Area<'_>) -> Result<()> {
        let tokens = || self.series.iter().flat_map(|line| &line.points).map(|point| point.0);
        let mut marks: Vec<f64> = tokens().collect();
        marks.sort_by(f64::total_cmp);
        marks.dedup();
        let (&[first, ..], &[.., last]) = (&marks[..], &marks[..]) else {
            bail!("nothing was measured");
        };
        let ticks = self.ticks();
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        let mut chart = ChartBuilder::on(area)
            .margin_top(12)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d(
                (first..last * 1.0001).log_scale().base(2.0).with_key_points(marks),
                (low..high * 1.0001).log_scale().with_key_points(ticks),
            )?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .light_line_style(TRANSPARENT)
            .axis_style(INK)
            .label_style(text(14))
            .axis_desc_style(text(15))
            .x_desc("tokens N")
            .y_desc(self.what)
            .x_label_formatter(&|tokens| format!("{tokens}"))
            .y_label_formatter(self.label)
            .draw()?;
        for line in self.series.iter().rev() {
            let (colour, width) = (line.colour, line.width);
            let style = colour.stroke_width(width);
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), style))?
                .label(&line.title)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
            let dot = |&point: &(f64, f64)| Circle::new(point, width + 1, colour.filled());
            chart.draw_series(line.points.iter().map(dot))?;
        }
        if !self.limit.is_empty() {
            let style = LIMIT.stroke_width(2);
            chart
                .draw_series(DashedLineSeries::new(self.limit.iter().copied(), 6, 4, style))?
                .label(&self.limit_label)
                .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 24, y)], 6, 4, style));
        }
        if self.legend {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperLeft)
                .legend_area_size(32)
                .margin(14)
                .background_style(WHITE)
                .border_style(GRID)
                .label_font(text(14))
                .draw()?;
        }
        Ok(())
    }

    /// The powers of the base that enclose all points.
    fn ticks(&self) -> Vec<f64> {
        let lines = self.series.iter().map(|line| &line.points).chain([&self.limit]);
        let powers: Vec<f64> = lines.flatten().map(|point| point.1.log(self.base)).collect();
        let low = powers.iter().copied().fold(f64::INFINITY, f64::min).floor() as i32;
        let high = powers.iter().copied().fold(f64::NEG_INFINITY, f64::max).ceil() as i32;
        (low..=high.max(low + 1)).map(|power| self.base.powi(power)).collect()
    }
}

fn time_label(seconds: &f64) -> String {
    match *seconds {
        s if s < 9e-7 => format!("{:.0} ns", s * 1e9),
        s if s < 9e-4 => format!("{:.0} µs", s * 1e6),
        s if s < 0.9 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.0} s"),
    }
}

fn text(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}
