//! A report as one HTML page that needs nothing else: no script, no network. It follows the
//! reader's light or dark setting and the width of the window.

use super::causes::LayerCauses;
use super::charts::{Histogram, Scatter};
use super::terminal::{count, decibel, in_words, small};
use super::{ConfigReport, Report};
use crate::{Error, Result};
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;

const PAGE: &str = include_str!("page.html");

/// Everything that the template shows.
#[derive(Serialize)]
struct Page<'a> {
    report: &'a Report,
    main: Option<&'a ConfigReport>,
    /// Value, name, note.
    summary: Vec<(String, String, String)>,
    map: Vec<Vec<Cell>>,
    histogram: Option<Histogram>,
    scatter: Option<Scatter>,
    shares: Option<String>,
    causes: Vec<LayerCauses>,
}

/// One cell of the heat map.
#[derive(Debug, Serialize)]
struct Cell {
    text: String,
    /// 0 (best of this map) to 100 (worst).
    heat: f64,
    title: String,
}

impl Report {
    /// The report as an HTML page.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the page's template fails, which no report makes it do.
    pub fn to_html(&self) -> Result<String> {
        let failed =
            |e: minijinja::Error| Error::Unsupported(format!("the page's template: {e:#}"));
        let mut pages = Environment::new();
        pages.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        pages.add_filter("decibel", decibel);
        pages.add_filter("small", small);
        pages.add_filter("count", |n: u64, noun: &str| count(n, noun));
        pages.add_filter("percent", |x: f64| format!("{:.1} %", 100.0 * x));
        pages.add_filter("digits", |x: f64, digits: usize| format!("{x:.digits$}"));
        // The name's ending turns escaping on: words of a text may hold `<`.
        pages.add_template("page.html", PAGE).map_err(failed)?;
        let page = pages.get_template("page.html").map_err(failed)?;
        let main = self.main();
        let timed = self.configs.iter().filter(|config| config.timing.is_some()).count();
        page.render(Serde(Page {
            report: self,
            main,
            summary: self.summary(),
            map: self.heat_map(),
            histogram: main.map(Histogram::of),
            scatter: (timed > 1).then(|| Scatter::of(&self.configs)),
            shares: self.worst_shares(),
            causes: main.map(|main| self.causes(main)).unwrap_or_default(),
        }))
        .map_err(failed)
    }

    /// The main figures, with a word on each.
    fn summary(&self) -> Vec<(String, String, String)> {
        let Some(main) = self.main() else { return Vec::new() };
        let o = &main.output;
        let worst = o.worst_head;
        let figure = |value: String, name: &str, note: String| (value, name.to_string(), note);
        vec![
            figure(
                format!("{} dB", decibel(o.mean_sqnr_db)),
                "attention output",
                "signal to error, mean of all heads".into(),
            ),
            figure(
                format!("{} dB", decibel(o.lowest_layer_sqnr_db)),
                "lowest layer",
                format!("layer {}", o.lowest_layer),
            ),
            figure(
                format!("{} dB", decibel(worst.value)),
                "worst head",
                format!("layer {}, head {}", worst.layer, worst.head),
            ),
            figure(small(o.mean_kl), "KL of the probabilities", "nats, mean of all queries".into()),
            figure(
                format!("{:.2} %", 100.0 * o.top1),
                "same top key",
                "queries with the same most attended key".into(),
            ),
            figure(
                format!("{:.6}", main.embedding.cosine.min),
                "embedding cosine",
                "lowest of a passage, int8 in every layer".into(),
            ),
        ]
    }

    fn heat_map(&self) -> Vec<Vec<Cell>> {
        let Some(main) = self.main() else { return Vec::new() };
        let values = main.layers.iter().flat_map(|layer| &layer.heads);
        let values = values.map(|head| head.alone.output.sqnr_db.mean).filter(|x| x.is_finite());
        let (low, high) = values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        let heat = |x: f64| match x.is_finite() && high > low {
            true => 100.0 * (high - x) / (high - low),
            false => 0.0,
        };
        let row = |layer: &super::LayerReport| {
            let heads = layer.heads.iter().map(|head| {
                let output = &head.alone.output;
                let shares = head.shares.map_or(String::new(), |s| format!("; {}", in_words(&s)));
                Cell {
                    text: decibel(output.sqnr_db.mean),
                    heat: heat(output.sqnr_db.mean),
                    title: format!(
                        "layer {}, head {}: {} dB, lowest passage {} dB, KL {}{shares}",
                        layer.layer,
                        head.head,
                        decibel(output.sqnr_db.mean),
                        decibel(output.sqnr_db.min),
                        small(head.alone.probabilities.kl.mean),
                    ),
                }
            });
            heads.collect()
        };
        main.layers.iter().map(row).collect()
    }

    /// Where the worst head's error comes from, in words.
    fn worst_shares(&self) -> Option<String> {
        let main = self.main()?;
        let place = main.output.worst_head;
        let head = main.layers.get(place.layer)?.heads.get(place.head)?;
        Some(in_words(&head.shares?))
    }
}
