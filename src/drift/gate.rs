//! Thresholds that a report must keep.

use super::Report;
use super::report::{ConfigReport, HeadReport, LinearReport};
use crate::files::{corrupt, read_text};
use crate::{Error, Result};
use serde::Deserialize;
use std::path::Path;

/// Thresholds; those that are `None` are not looked at. They hold for the main configuration of a
/// report, with fp32 input to every layer unless they say otherwise, and for its linear layers.
///
/// As a TOML file, in which an unknown key is an error:
///
/// ```toml
/// min_layer_sqnr_db = 44.0
/// min_head_sqnr_db = 39.0
/// max_head_kl = 1e-3
/// min_head_top1 = 0.95
/// min_embedding_cosine = 0.9999
/// ```
///
/// ```
/// use candle_int8_attention::drift::Gate;
/// let gate = Gate::from_toml("min_head_sqnr_db = 39")?;
/// assert_eq!(gate.min_head_sqnr_db, Some(39.0));
/// assert!(Gate::from_toml("min_head_sqn_db = 39").is_err());
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Signal-to-noise ratio of the attention output in dB, mean over heads and passages: every
    /// layer.
    pub min_layer_sqnr_db: Option<f64>,
    /// The same, mean over passages: every head.
    pub min_head_sqnr_db: Option<f64>,
    /// Cosine of the attention output: every head in every passage.
    pub min_head_cosine: Option<f64>,
    /// KL divergence of the probabilities in nats, mean over queries: every head.
    pub max_head_kl: Option<f64>,
    /// Share of queries with the same most attended key: every head.
    pub min_head_top1: Option<f64>,
    /// The same of the five most attended keys.
    pub min_head_top5: Option<f64>,
    /// Signal-to-noise ratio in dB of what leaves a layer, each path on its own input: every layer.
    pub min_accumulated_sqnr_db: Option<f64>,
    /// Cosine of the model's embedding, int8 in every layer: every passage.
    pub min_embedding_cosine: Option<f64>,
    /// Signal-to-noise ratio in dB of the model's embedding over all passages, one linear layer in the
    /// precision that was measured: every product.
    pub min_linear_sqnr_db: Option<f64>,
    /// Cosine of the model's embedding, all linear layers in that precision: every passage.
    pub min_linear_embedding_cosine: Option<f64>,
}

/// A threshold that does not hold.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Violation {
    /// The threshold's name.
    pub name: &'static str,
    /// Where: a layer, a head, or neither for the embedding and where nothing was measured.
    pub layer: Option<usize>,
    /// See `layer`.
    pub head: Option<usize>,
    /// The product of the layer, where the threshold is one of linear layers.
    pub product: Option<String>,
    /// What was found; NaN where nothing was measured.
    pub value: f64,
    /// The threshold.
    pub limit: f64,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.layer, self.head, &self.product) {
            (Some(layer), Some(head), _) => write!(f, "layer {layer} head {head}")?,
            (Some(layer), None, Some(product)) => write!(f, "layer {layer} {product}")?,
            (Some(layer), None, None) => write!(f, "layer {layer}")?,
            (None, ..) if self.name == EMBEDDING => write!(f, "embedding")?,
            (None, ..) if self.name == LINEAR_EMBEDDING => {
                write!(f, "embedding with all linear layers switched")?;
            }
            (None, ..) if self.name == LINEAR => write!(f, "no linear layer was measured")?,
            (None, ..) => write!(f, "no layer was measured")?,
        }
        write!(f, ": {} is {}, found {}", self.name, self.limit, rounded(self.value, self.limit))
    }
}

/// A value with few digits, or with all of them where rounding would move it onto its threshold or
/// across.
fn rounded(value: f64, limit: f64) -> String {
    let small = value != 0.0 && value.abs() < 0.01;
    let short = if small { format!("{value:.3e}") } else { format!("{value:.6}") };
    let same_side = |shown: f64| shown.partial_cmp(&limit) == value.partial_cmp(&limit);
    if short.parse().is_ok_and(same_side) { short } else { value.to_string() }
}

impl Gate {
    /// Reads TOML.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for text that is not TOML, an unknown key, a value that is not a finite
    /// number, or no threshold at all.
    pub fn from_toml(text: &str) -> Result<Self> {
        let gate: Self = toml::from_str(text).map_err(|e| {
            Error::InvalidArgument(format!("not a gate: {}", e.to_string().trim_end()))
        })?;
        gate.check()?;
        Ok(gate)
    }

    /// [`Gate::from_toml`] from a file.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for what [`Gate::from_toml`]
    /// refuses.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_toml(&read_text("gate", path)?).map_err(|problem| corrupt(path, problem))
    }

    /// The thresholds with their names.
    fn limits(&self) -> [(&'static str, Option<f64>); 10] {
        [
            ("min_layer_sqnr_db", self.min_layer_sqnr_db),
            ("min_head_sqnr_db", self.min_head_sqnr_db),
            ("min_head_cosine", self.min_head_cosine),
            ("max_head_kl", self.max_head_kl),
            ("min_head_top1", self.min_head_top1),
            ("min_head_top5", self.min_head_top5),
            ("min_accumulated_sqnr_db", self.min_accumulated_sqnr_db),
            (EMBEDDING, self.min_embedding_cosine),
            (LINEAR, self.min_linear_sqnr_db),
            (LINEAR_EMBEDDING, self.min_linear_embedding_cosine),
        ]
    }

    /// # Errors
    /// [`Error::InvalidArgument`] for a threshold that is not finite, or none at all.
    pub fn check(&self) -> Result<()> {
        let set = || self.limits().into_iter().filter_map(|(name, limit)| Some((name, limit?)));
        if set().next().is_none() {
            return Err(Error::InvalidArgument("a gate without a threshold holds nothing".into()));
        }
        match set().find(|(_, limit)| !limit.is_finite()) {
            Some((name, limit)) => {
                Err(Error::InvalidArgument(format!("{name} is {limit}, expected a finite number")))
            }
            None => Ok(()),
        }
    }

    /// This gate's thresholds, and those of another where this one has none.
    pub fn or(self, other: Self) -> Self {
        Self {
            min_layer_sqnr_db: self.min_layer_sqnr_db.or(other.min_layer_sqnr_db),
            min_head_sqnr_db: self.min_head_sqnr_db.or(other.min_head_sqnr_db),
            min_head_cosine: self.min_head_cosine.or(other.min_head_cosine),
            max_head_kl: self.max_head_kl.or(other.max_head_kl),
            min_head_top1: self.min_head_top1.or(other.min_head_top1),
            min_head_top5: self.min_head_top5.or(other.min_head_top5),
            min_accumulated_sqnr_db: self.min_accumulated_sqnr_db.or(other.min_accumulated_sqnr_db),
            min_embedding_cosine: self.min_embedding_cosine.or(other.min_embedding_cosine),
            min_linear_sqnr_db: self.min_linear_sqnr_db.or(other.min_linear_sqnr_db),
            min_linear_embedding_cosine: (self.min_linear_embedding_cosine)
                .or(other.min_linear_embedding_cosine),
        }
    }

    /// Every place where a threshold does not hold; none if all hold. NaN holds nothing, and a
    /// report in which nothing was measured holds no threshold.
    pub fn violations(&self, report: &Report) -> Vec<Violation> {
        let mut found = Vec::new();
        for (name, limit) in self.limits() {
            let Some(limit) = limit else { continue };
            let mut places = if report.passages > 0 { places(name, report) } else { Vec::new() };
            if places.is_empty() {
                places.push(Place::nowhere(f64::NAN));
            }
            for Place { layer, head, product, value } in places {
                let holds = if name.starts_with("max") { value <= limit } else { value >= limit };
                if !holds {
                    found.push(Violation { name, layer, head, product, value, limit });
                }
            }
        }
        found
    }
}

/// The thresholds that are of no layer, and that of linear layers.
const EMBEDDING: &str = "min_embedding_cosine";
const LINEAR: &str = "min_linear_sqnr_db";
const LINEAR_EMBEDDING: &str = "min_linear_embedding_cosine";

/// A value, and where it is from.
struct Place {
    layer: Option<usize>,
    head: Option<usize>,
    product: Option<String>,
    value: f64,
}

impl Place {
    fn nowhere(value: f64) -> Self {
        Self { layer: None, head: None, product: None, value }
    }

    fn layer(layer: usize, value: f64) -> Self {
        Self { layer: Some(layer), ..Self::nowhere(value) }
    }
}

/// Everything that a threshold looks at.
fn places(name: &str, report: &Report) -> Vec<Place> {
    match name {
        LINEAR | LINEAR_EMBEDDING => {
            report.linear.as_ref().map_or_else(Vec::new, |linear| linear_places(name, linear))
        }
        _ => report.main().map_or_else(Vec::new, |config| attention_places(name, config)),
    }
}

fn linear_places(name: &str, linear: &LinearReport) -> Vec<Place> {
    let products = linear.products.iter();
    match name {
        LINEAR => products
            .map(|of| Place {
                product: Some(of.product.clone()),
                ..Place::layer(of.layer, of.alone.sqnr_db)
            })
            .collect(),
        // The last one has all before it.
        _ => products
            .last()
            .map(|of| Place::nowhere(of.accumulated.min_cosine))
            .into_iter()
            .collect(),
    }
}

fn attention_places(name: &str, config: &ConfigReport) -> Vec<Place> {
    let heads = |value: fn(&HeadReport) -> f64| -> Vec<Place> {
        let layers = config.layers.iter();
        layers
            .flat_map(|layer| {
                let heads = layer.heads.iter().map(move |head| Place {
                    head: Some(head.head),
                    ..Place::layer(layer.layer, value(head))
                });
                let none = layer.heads.is_empty().then(|| Place::layer(layer.layer, f64::NAN));
                heads.chain(none)
            })
            .collect()
    };
    match name {
        "min_layer_sqnr_db" => {
            config.layers.iter().map(|l| Place::layer(l.layer, l.mean_sqnr_db)).collect()
        }
        "min_head_sqnr_db" => heads(|h| h.alone.output.sqnr_db.mean),
        "min_head_cosine" => heads(|h| h.alone.output.cosine.min),
        "max_head_kl" => heads(|h| h.alone.probabilities.kl.mean),
        "min_head_top1" => heads(|h| h.alone.probabilities.top1.mean),
        "min_head_top5" => heads(|h| h.alone.probabilities.top5.mean),
        "min_accumulated_sqnr_db" => (config.layers.iter())
            .map(|l| Place::layer(l.layer, l.output_accumulated.sqnr_db.mean))
            .collect(),
        _ => vec![Place::nowhere(config.embedding.cosine.min)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_that_hold_nothing_or_cannot_be_read_are_errors() {
        for (text, expected) in [
            ("", "without a threshold"),
            ("min_head_sqnr = 39", "unknown field `min_head_sqnr`"),
            ("max_head_kl = nan", "finite"),
            ("max_head_kl = \"small\"", "expected"),
            ("max_head_kl", "not a gate"),
        ] {
            let error = Gate::from_toml(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let error = Gate::load("no/such/gate.toml").unwrap_err().to_string();
        assert!(error.contains("no/such/gate.toml"), "{error}");
    }

    #[test]
    fn a_value_is_never_shown_as_its_threshold_or_beyond() {
        let shown = |name, value, limit| {
            let place =
                Violation { name, layer: Some(1), head: Some(2), product: None, value, limit };
            place.to_string()
        };
        let place = "layer 1 head 2: ";
        let few = format!("{place}min_head_sqnr_db is 39, found 38.123457");
        assert_eq!(shown("min_head_sqnr_db", 38.123_456_78, 39.0), few);
        let kl = format!("{place}max_head_kl is 0.001, found 1.234e-3");
        assert_eq!(shown("max_head_kl", 1.2341e-3, 1e-3), kl);
        for (name, value, limit) in [
            ("min_embedding_cosine", 0.999_999_99, 1.0),
            ("min_embedding_cosine", 0.999_999_5, 0.999_999_6),
            ("min_head_sqnr_db", 38.999_999_999, 39.0),
            ("max_head_kl", 1.000_01e-3, 1e-3),
            ("max_head_kl", 1e-9, 0.0),
            ("min_head_sqnr_db", f64::NAN, 39.0),
            ("min_head_sqnr_db", f64::NEG_INFINITY, 39.0),
        ] {
            let text = shown(name, value, limit);
            let found: f64 = text.rsplit(' ').next().unwrap().parse().unwrap();
            assert_eq!(found.partial_cmp(&limit), value.partial_cmp(&limit), "{text}");
        }
    }

    #[test]
    fn flags_win_over_a_file() {
        let file = Gate::from_toml("max_head_kl = 0.1\nmin_head_top1 = 0.5").unwrap();
        let flags = Gate { max_head_kl: Some(0.2), ..Gate::default() };
        let both = flags.or(file);
        assert_eq!((both.max_head_kl, both.min_head_top1), (Some(0.2), Some(0.5)));
    }
}
