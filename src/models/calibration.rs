//! Static quantization: ranges of queries and keys, collected once, then used for every text.
//!
//! A scale of its own for each token cannot be known beforehand, so static scales are per head or
//! per tensor. Smoothing stays dynamic: the mean of this very text is subtracted, exactly added
//! back as ever, and the static range is that of what is left, rotated, outliers apart. A mean costs one
//! pass over the data, much less than what follows, and without it a range would have to cover every
//! offset that any text may have.

use super::{LayeredModel, run_layers};
use crate::attention::AttentionConfig;
use crate::attention::{Backend, Int8Config, PvPrecision, ScoreConfig};
use crate::cpu::Level;
use crate::files::{corrupt, read_text, write};
use crate::memory::check_size;
use crate::quant::{
    ConditionedHead, Conditioning, Granularity, KEY_BLOCK, Observer, ObserverKind, QUERY_BLOCK,
    QuantConfig, QuantParams, RangeSource, Scheme, Smoothing, ValueRange,
};
use crate::{Error, Result};
use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What is collected, and how ranges follow from it.
///
/// More fields may be added: end an expression in `..CalibrationConfig::default()`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationConfig {
    /// How a range is chosen.
    pub observer: ObserverKind,
    /// Symmetric or affine codes.
    pub scheme: Scheme,
    /// What is subtracted from the keys before.
    pub smooth_k: Smoothing,
    /// What is subtracted from the queries.
    pub smooth_q: Smoothing,
    /// Whether both are rotated.
    pub rotate: bool,
    /// Whether what stands out is left out.
    pub outliers: bool,
}

impl CalibrationConfig {
    /// Scores that are quantized so.
    fn scores(&self, q: QuantConfig, k: QuantConfig) -> ScoreConfig {
        let Self { smooth_k, smooth_q, rotate, outliers, .. } = *self;
        ScoreConfig { q, k, smooth_k, smooth_q, rotate, outliers }
    }

    /// What is done to queries and to keys of `depth` elements before they are quantized.
    fn conditioning(&self, depth: usize) -> (Conditioning, Conditioning) {
        self.scores(QuantConfig::default(), QuantConfig::default()).conditioning(depth)
    }
}

impl Default for CalibrationConfig {
    /// Symmetric, conditioned as in [`ScoreConfig::default`], all that was seen. On the attention of MiniLM models this keeps 3 to 10 dB
    /// more in the worst head than observers that clip: the largest elements of queries and keys
    /// are those that decide where a softmax looks.
    fn default() -> Self {
        let ScoreConfig { smooth_k, smooth_q, rotate, outliers, .. } = ScoreConfig::default();
        let (observer, scheme) = (ObserverKind::MinMax, Scheme::Symmetric);
        Self { observer, scheme, smooth_k, smooth_q, rotate, outliers }
    }
}

/// Watches queries and keys of every layer and head.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::models::{CalibrationConfig, Calibrator, StaticScales};
/// use candle_int8_attention::{AttentionConfig, AttnMask, attention};
///
/// let passage = || Tensor::randn(0f32, 1., (1, 4, 64, 32), &Device::Cpu);
/// let mut calibrator = Calibrator::new(CalibrationConfig::default())?;
/// for _ in 0..3 {
///     let layer = 0;
///     calibrator.observe(layer, &passage()?, &passage()?)?;
/// }
/// let calibration = calibrator.finish()?;
/// let config = calibration.config(0, StaticScales::PerHead, &AttentionConfig::int8())?;
/// let (q, k, v) = (passage()?, passage()?, passage()?);
/// let out = attention(&q, &k, &v, &AttnMask::None, &config)?;
/// # assert_eq!(out.dims(), [1, 4, 64, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrator {
    config: CalibrationConfig,
    layers: Vec<LayerObservers>,
}

/// One observer a head.
#[derive(Debug, Clone, PartialEq, Default)]
struct LayerObservers {
    q: Vec<Observer>,
    k: Vec<Observer>,
    tokens: u64,
}

impl Calibrator {
    /// A calibrator that has seen nothing.
    ///
    /// # Errors
    /// Those of [`ObserverKind::check`].
    pub fn new(config: CalibrationConfig) -> Result<Self> {
        config.observer.check()?;
        Ok(Self { config, layers: Vec::new() })
    }

    /// Takes queries `[B, H, M, D]` and keys `[B, H_kv, N, D]` of a layer into account. Each
    /// sequence of the batch is one observation; leave padding out, its numbers would count.
    ///
    /// # Errors
    /// [`Error::Rank`]; [`Error::Shape`] for another number of heads than before; [`Error::DType`]
    /// unless both are floats; [`Error::InvalidArgument`] for a layer that no model has. Nothing is counted
    /// then.
    pub fn observe(&mut self, layer: usize, q: &Tensor, k: &Tensor) -> Result<()> {
        if layer >= MAX_LAYERS {
            return Err(Error::InvalidArgument(format!(
                "layer {layer}, expected less than {MAX_LAYERS}"
            )));
        }
        let known = self.layers.get(layer);
        // Both sides are read before either is counted.
        let known = known.map_or((0, 0), |layer| (layer.q.len(), layer.k.len()));
        let (q, k) = both_sides(&self.config, (q, k), known)?;
        if self.layers.len() <= layer {
            self.layers.resize_with(layer + 1, LayerObservers::default);
        }
        let layer = &mut self.layers[layer];
        // A kind that a calibrator was made with is a good one.
        q.count(&mut layer.q, self.config.observer)?;
        k.count(&mut layer.k, self.config.observer)?;
        layer.tokens += q.tokens as u64;
        Ok(())
    }

    /// Adds what another calibrator saw: of another part of the text, say.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the configurations, the layers or the heads differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.config != other.config {
            return Err(Error::Mismatch(format!(
                "calibrators of {:?} and {:?}, expected the same",
                self.config, other.config
            )));
        }
        if self.layers.is_empty() {
            self.layers = other.layers.clone();
            return Ok(());
        }
        let heads = |layers: &[LayerObservers]| -> Vec<(usize, usize)> {
            layers.iter().map(|layer| (layer.q.len(), layer.k.len())).collect()
        };
        let (ours, theirs) = (heads(&self.layers), heads(&other.layers));
        if !theirs.is_empty() && ours != theirs {
            return Err(Error::Mismatch(format!(
                "calibrators with query and key heads {ours:?} and {theirs:?}, expected the same"
            )));
        }
        for (layer, other) in self.layers.iter_mut().zip(&other.layers) {
            let sides = [(&mut layer.q, &other.q), (&mut layer.k, &other.k)];
            for (heads, others) in sides {
                for (observer, other) in heads.iter_mut().zip(others) {
                    observer.merge(other)?;
                }
            }
            layer.tokens += other.tokens;
        }
        Ok(())
    }

    /// The ranges.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is a layer or a head without any finite number.
    pub fn finish(&self) -> Result<Calibration> {
        let CalibrationConfig { scheme, .. } = self.config;
        if self.layers.is_empty() {
            return Err(Error::InvalidArgument(
                "nothing was observed, expected at least a token".into(),
            ));
        }
        let ranges = |index: usize, side: &str, heads: &[Observer]| -> Result<Vec<ValueRange>> {
            let ranges: Vec<ValueRange> = heads.iter().map(|head| head.range(scheme)).collect();
            match ranges.iter().position(|range| *range == ValueRange::EMPTY) {
                None if !ranges.is_empty() => Ok(ranges),
                head => Err(Error::InvalidArgument(format!(
                    "no finite number was observed in {side} of layer {index}, head {}",
                    head.unwrap_or(0)
                ))),
            }
        };
        let layers = self.layers.iter().enumerate().map(|(index, layer)| {
            Ok(LayerRanges { q: ranges(index, "q", &layer.q)?, k: ranges(index, "k", &layer.k)? })
        });
        Ok(Calibration {
            config: self.config,
            tokens: self.layers[0].tokens,
            layers: layers.collect::<Result<_>>()?,
        })
    }
}

/// More layers than any model has: a number beyond is a mistake, and would only take memory.
const MAX_LAYERS: usize = 1 << 16;

/// Queries or keys of a layer, `[B, H, S, D]`, conditioned, without what stands out.
struct Side {
    /// One a head of each sequence.
    matrices: Vec<Vec<f32>>,
    heads: usize,
    /// `B * S`
    tokens: usize,
}

/// Queries and keys of a layer that has had `known` heads of each so far, if it has had any.
fn both_sides(
    config: &CalibrationConfig,
    (q, k): (&Tensor, &Tensor),
    known: (usize, usize),
) -> Result<(Side, Side)> {
    let of = |tensor: &Tensor| config.conditioning(tensor.dim(D::Minus1).unwrap_or(0));
    let q = Side::read(("q", q), known.0, (&of(q).0, QUERY_BLOCK))?;
    let k = Side::read(("k", k), known.1, (&of(k).1, KEY_BLOCK))?;
    Ok((q, k))
}

impl Side {
    fn read(
        (name, tensor): (&'static str, &Tensor),
        known: usize,
        (conditioning, block): (&Conditioning, usize),
    ) -> Result<Self> {
        const OP: &str = "Calibrator::observe";
        let shape = tensor.dims().to_vec();
        let &[batch, heads, tokens, depth] = tensor.dims() else {
            return Err(Error::Rank { op: OP, tensor: name, shape, expected: "[B, H, S, D]" });
        };
        if known != 0 && known != heads {
            let expected = format!("the {known} heads seen before");
            return Err(Error::Shape { op: OP, tensor: name, shape, expected });
        }
        check_size(OP, name, &shape)?;
        if !tensor.dtype().is_float() {
            let (dtype, expected) = (tensor.dtype(), "F32, F16, BF16 or F64");
            return Err(Error::DType { op: OP, tensor: name, dtype, expected });
        }
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if values.is_empty() {
            return Ok(Self { matrices: Vec::new(), heads, tokens: 0 });
        }
        let level = Level::active()?;
        let without_outliers = |matrix: &[f32]| {
            let head = ConditionedHead::new(level, conditioning, matrix, depth, block);
            let rows = head.values.chunks_exact(depth).enumerate();
            let rows = rows.filter(|(row, _)| !head.outliers.contains(row));
            rows.flat_map(|(_, row)| row.iter().copied()).collect()
        };
        let matrices = values.chunks_exact(tokens * depth).map(without_outliers).collect();
        Ok(Self { matrices, heads, tokens: batch * tokens })
    }

    /// Feeds the heads to their observers.
    fn count(&self, observers: &mut Vec<Observer>, kind: ObserverKind) -> Result<()> {
        if observers.is_empty() {
            *observers = (0..self.heads).map(|_| Observer::new(kind)).collect::<Result<_>>()?;
        }
        for (matrix, head) in self.matrices.iter().zip((0..self.heads).cycle()) {
            observers[head].observe(matrix);
        }
        Ok(())
    }

    /// How many elements lie outside of the range of their head, and how many there are.
    fn outside(&self, ranges: &[ValueRange]) -> (usize, usize) {
        let of_matrix = |(matrix, range): (&Vec<f32>, &ValueRange)| {
            matrix.iter().filter(|x| **x < range.min || **x > range.max).count()
        };
        let all = self.matrices.iter().map(Vec::len).sum();
        (self.matrices.iter().zip(ranges.iter().cycle()).map(of_matrix).sum(), all)
    }
}

/// The ranges of one layer, one a head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRanges {
    /// Of the queries, `H`.
    pub q: Vec<ValueRange>,
    /// Of the keys, `H_kv`.
    pub k: Vec<ValueRange>,
}

/// What shares a static scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StaticScales {
    /// Each head.
    #[default]
    PerHead,
    /// All heads of a layer.
    PerTensor,
}

/// Static ranges of queries and keys of all layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// How they were found.
    pub config: CalibrationConfig,
    /// From how many queries.
    pub tokens: u64,
    /// The ranges, first layer first.
    pub layers: Vec<LayerRanges>,
}

/// What the file says first.
const FORMAT: &str = "candle-int8-attention calibration";
const VERSION: u32 = 1;

/// The file: JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File<T> {
    format: String,
    version: u32,
    calibration: T,
}

impl Calibration {
    /// `base` with static scales in layer `layer`: its P·V precision (if it is int8) and everything
    /// that is not quantization stay.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such layer, [`Error::QuantParams`] for ranges that are not
    /// finite.
    pub fn config(
        &self,
        layer: usize,
        scales: StaticScales,
        base: &AttentionConfig,
    ) -> Result<AttentionConfig> {
        let ranges = self.layer(layer)?;
        let pv = match &base.backend {
            Backend::Int8(int8) => int8.pv,
            Backend::Fp32 => PvPrecision::default(),
        };
        let (q, k) = (self.side(&ranges.q, scales)?, self.side(&ranges.k, scales)?);
        let scores = self.config.scores(q, k);
        let backend = Backend::Int8(Int8Config { scores, pv });
        Ok(base.with_backend(backend))
    }

    /// How many elements of queries `[B, H, M, D]` and keys `[B, H_kv, N, D]` of a layer lie outside of the
    /// ranges of their heads, where their codes saturate; and how many there are. Both without what stands
    /// out.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such layer, and those of [`Calibrator::observe`].
    pub fn outside(&self, layer: usize, q: &Tensor, k: &Tensor) -> Result<(usize, usize)> {
        let ranges = self.layer(layer)?;
        let (q, k) = both_sides(&self.config, (q, k), (ranges.q.len(), ranges.k.len()))?;
        let ((q_outside, q_all), (k_outside, k_all)) = (q.outside(&ranges.q), k.outside(&ranges.k));
        Ok((q_outside + k_outside, q_all + k_all))
    }

    fn layer(&self, layer: usize) -> Result<&LayerRanges> {
        let layers = self.layers.len();
        let missing = || Error::Mismatch(format!("layer {layer} of a calibration of {layers}"));
        self.layers.get(layer).ok_or_else(missing)
    }

    fn side(&self, ranges: &[ValueRange], scales: StaticScales) -> Result<QuantConfig> {
        let scheme = self.config.scheme;
        let (granularity, ranges) = match scales {
            StaticScales::PerHead => (Granularity::PerHead, ranges.to_vec()),
            StaticScales::PerTensor => {
                let all = ranges.iter().fold(ValueRange::EMPTY, |all, range| all.union(*range));
                (Granularity::PerTensor, vec![all])
            }
        };
        let params = ranges.into_iter().map(|range| QuantParams::from_range(scheme, range));
        let range = RangeSource::Static(params.collect::<Result<_>>()?);
        Ok(QuantConfig { scheme, granularity, range })
    }

    /// Refuses a model that these ranges are not from.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless the model has as many layers, and as many heads if it
    /// [tells](LayeredModel::head_counts).
    pub fn check_model(&self, model: &impl LayeredModel) -> Result<()> {
        let differ = |what: String, found, expected| {
            Err(Error::Mismatch(format!("ranges of {found} {what} for a model of {expected}")))
        };
        let (found, expected) = (self.layers.len(), model.attention().len());
        if found != expected {
            return differ("layers".into(), found, expected);
        }
        let Some([query_heads, key_heads]) = model.head_counts() else { return Ok(()) };
        for (index, layer) in self.layers.iter().enumerate() {
            let sides = [("query", layer.q.len(), query_heads), ("key", layer.k.len(), key_heads)];
            if let Some((side, found, expected)) = sides.into_iter().find(|(_, f, e)| f != e) {
                return differ(format!("{side} heads in layer {index}"), found, expected);
            }
        }
        Ok(())
    }

    /// Switches all layers of a model to int8 with these ranges.
    ///
    /// # Errors
    /// Those of [`Calibration::check_model`] and [`Calibration::config`]; then no layer is switched.
    pub fn apply(&self, model: &mut impl LayeredModel, scales: StaticScales) -> Result<()> {
        self.check_model(model)?;
        let layers = model.attention_mut();
        let configs = layers.iter().enumerate();
        let configs = configs.map(|(index, layer)| self.config(index, scales, layer.config()));
        let configs = configs.collect::<Result<Vec<_>>>()?;
        layers.into_iter().zip(configs).for_each(|(layer, config)| layer.set_config(config));
        Ok(())
    }

    /// Writes a JSON file.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written; what was there before is still there then.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = File { format: FORMAT.to_string(), version: VERSION, calibration: self };
        let json = serde_json::to_string_pretty(&file).map_err(|e| corrupt(path, e))?;
        write(path, json.as_bytes())
    }

    /// Reads what [`Calibration::save`] wrote.
    ///
    /// # Errors
    /// [`Error::MissingFile`], [`Error::Io`], or [`Error::Corrupt`] for anything that is not such
    /// a file, or of another version.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text("calibration", path)?;
        let not_one = |e: serde_json::Error| corrupt(path, format!("not a calibration: {e}"));
        let file: File<serde_json::Value> = serde_json::from_str(&text).map_err(not_one)?;
        if (file.format.as_str(), file.version) != (FORMAT, VERSION) {
            let problem = format!(
                "{:?} of version {}, expected {FORMAT:?} of version {VERSION}",
                file.format, file.version
            );
            return Err(corrupt(path, problem));
        }
        let calibration: Self = serde_json::from_value(file.calibration).map_err(not_one)?;
        calibration.check().map_err(|e| corrupt(path, e))?;
        Ok(calibration)
    }

    fn check(&self) -> Result<()> {
        self.config.observer.check()?;
        if self.layers.is_empty() {
            return Err(Error::InvalidArgument("a calibration of 0 layers".into()));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            if layer.q.is_empty() || layer.k.is_empty() {
                return Err(Error::InvalidArgument(format!("no heads in layer {index}")));
            }
            let wrong =
                |r: &&ValueRange| !(r.min.is_finite() && r.max.is_finite() && r.min <= r.max);
            if let Some(range) = layer.q.iter().chain(&layer.k).find(wrong) {
                let ValueRange { min, max } = range;
                return Err(Error::InvalidArgument(format!(
                    "range {min}..{max} in layer {index}, expected finite and in order"
                )));
            }
        }
        Ok(())
    }
}

/// Runs the model over passages and collects the ranges of every layer
/// and head. The attention in use stays in use: with fp32 in all layers the ranges are those of
/// the original model.
///
/// ```no_run
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::models::{
///     BertModel, CalibrationConfig, ModelFiles, StaticScales, calibrate,
/// };
///
/// let files = ModelFiles::from_dir("models/paraphrase-MiniLM-L3-v2")?;
/// let mut model = BertModel::load(&files, &Device::Cpu)?;
/// let passages: Vec<Tensor> = vec![/* token ids [1, N] */];
/// let calibration = calibrate(&model, &passages, CalibrationConfig::default())?;
/// calibration.save("ranges.json")?;
/// calibration.apply(&mut model, StaticScales::PerHead)?;
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
///
/// # Errors
/// Those of the model and of [`Calibrator`]; [`Error::InvalidArgument`] without any passage.
pub fn calibrate<'a, M: LayeredModel<Input: 'a>>(
    model: &M,
    passages: impl IntoIterator<Item = &'a M::Input>,
    config: CalibrationConfig,
) -> Result<Calibration> {
    let mut calibrator = Calibrator::new(config)?;
    for passage in passages {
        run_layers(model, passage, &mut |layer, input| {
            calibrator.observe(layer, input.q, input.k)
        })?;
    }
    calibrator.finish()
}
