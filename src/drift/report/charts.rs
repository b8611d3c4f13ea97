//! The coordinates of the page's two charts, in the units of their SVG.

use super::ConfigReport;
use serde::Serialize;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 56.0;
const BOTTOM: f64 = 44.0;
const MARGIN: f64 = 16.0;

/// A line with a number on an axis.
#[derive(Debug, Serialize)]
pub(super) struct Tick {
    at: f64,
    label: String,
}

/// A linear axis: values from `low` to `high` onto `start..end`.
struct Axis {
    low: f64,
    high: f64,
    start: f64,
    end: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, start: f64, end: f64) -> Self {
        let finite = values.filter(|x| x.is_finite());
        let low = finite.clone().fold(f64::INFINITY, f64::min);
        let high = finite.fold(f64::NEG_INFINITY, f64::max);
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let room = ((high - low) * 0.08).max(high.abs() * 1e-3).max(1e-6);
        Self { low: low - room, high: high + room, start, end }
    }

    fn at(&self, x: f64) -> f64 {
        let share = (x.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        let place = self.start + share * (self.end - self.start);
        (place * 10.0).round() / 10.0
    }

    /// At round numbers, four to eight of them.
    fn ticks(&self) -> Vec<Tick> {
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= rough).unwrap_or(10.0);
        let step = factor * power;
        let digits = (-step.log10().floor()).max(0.0) as usize;
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        let tick = |i: i64| {
            let x = i as f64 * step;
            Tick { at: self.at(x), label: format!("{x:.digits$}") }
        };
        (first..=last).map(tick).collect()
    }
}

/// One configuration in the chart.
#[derive(Debug, Serialize)]
struct Dot {
    x: f64,
    y: f64,
    /// Its number in the table below the chart.
    number: usize,
    main: bool,
    title: String,
}

/// Accuracy against speed.
#[derive(Debug, Serialize)]
pub(super) struct Scatter {
    width: f64,
    height: f64,
    left: f64,
    bottom: f64,
    dots: Vec<Dot>,
    x_ticks: Vec<Tick>,
    y_ticks: Vec<Tick>,
}

impl Scatter {
    /// Of the configurations that were timed.
    pub fn of(configs: &[ConfigReport]) -> Self {
        let speeds = || {
            let all = configs.iter().enumerate();
            all.filter_map(|(i, config)| Some((i, config, config.timing?.speedup)))
        };
        let speed = speeds().map(|(_, _, speed)| speed);
        let accuracy = speeds().map(|(_, config, _)| config.output.mean_sqnr_db);
        let x = Axis::over(speed, LEFT, WIDTH - MARGIN);
        let y = Axis::over(accuracy, HEIGHT - BOTTOM, MARGIN);
        let dot = |(i, config, speed): (usize, &ConfigReport, f64)| Dot {
            x: x.at(speed),
            y: y.at(config.output.mean_sqnr_db),
            number: i + 1,
            main: config.main,
            title: format!(
                "{}: {:.1} dB, {:.1} times as fast as fp32",
                config.name, config.output.mean_sqnr_db, speed
            ),
        };
        Self {
            width: WIDTH,
            height: HEIGHT,
            left: LEFT,
            bottom: HEIGHT - BOTTOM,
            dots: speeds().map(dot).collect(),
            x_ticks: x.ticks(),
            y_ticks: y.ticks(),
        }
    }
}

/// A column of the histogram.
#[derive(Debug, Serialize)]
struct Bar {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    title: String,
}

/// How the errors of single tokens are distributed, over all heads.
#[derive(Debug, Serialize)]
pub(super) struct Histogram {
    width: f64,
    height: f64,
    left: f64,
    bottom: f64,
    bars: Vec<Bar>,
    x_ticks: Vec<Tick>,
}

const BARS: usize = 40;

impl Histogram {
    pub fn of(config: &ConfigReport) -> Self {
        let heads = || config.layers.iter().flat_map(|layer| &layer.heads);
        // An error of exactly 0 has no place on this axis.
        let values: Vec<f64> = heads()
            .flat_map(|head| &head.token_percentiles)
            .filter(|&&error| error > 0.0)
            .map(|error| -20.0 * error.log10())
            .collect();
        let x = Axis::over(values.iter().copied(), LEFT, WIDTH - MARGIN);
        let mut counts = [0usize; BARS];
        let step = (x.high - x.low) / BARS as f64;
        for value in &values {
            counts[(((value - x.low) / step) as usize).min(BARS - 1)] += 1;
        }
        let (all, most) = (values.len().max(1), counts.iter().max().copied().unwrap_or(0).max(1));
        let room = HEIGHT - BOTTOM - MARGIN;
        let bar = |(i, &count): (usize, &usize)| {
            let (from, to) = (x.low + i as f64 * step, x.low + (i + 1) as f64 * step);
            let height = (room * count as f64 / most as f64 * 10.0).round() / 10.0;
            Bar {
                x: x.at(from),
                y: HEIGHT - BOTTOM - height,
                width: ((x.at(to) - x.at(from) - 1.0) * 10.0).round() / 10.0,
                height,
                title: format!(
                    "{from:.1} to {to:.1} dB: {:.2} % of the tokens",
                    100.0 * count as f64 / all as f64
                ),
            }
        };
        Self {
            width: WIDTH,
            height: HEIGHT,
            left: LEFT,
            bottom: HEIGHT - BOTTOM,
            bars: counts.iter().enumerate().map(bar).collect(),
            x_ticks: x.ticks(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers_and_survive_a_single_value() {
        let axis = Axis::over([0.0, 10.0].into_iter(), 0.0, 100.0);
        let labels: Vec<String> = axis.ticks().into_iter().map(|tick| tick.label).collect();
        assert_eq!(labels, ["0", "5", "10"]);
        let axis = Axis::over([3.0].into_iter(), 0.0, 100.0);
        assert_eq!(axis.at(3.0), 50.0);
        assert!(!axis.ticks().is_empty());
        let none = Axis::over([f64::NAN].into_iter(), 0.0, 100.0);
        assert!(none.at(0.5).is_finite());
    }
}
