//! The drift of static scales beside that of dynamic ones.

use crate::common::text_model::TextModel;
use anyhow::Result;
use candle_core::Tensor;
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::drift::layers::{
    LayerErrors, attention_errors, embedding_error, embeddings,
};
use candle_int8_attention::drift::metrics::lowest;
use candle_int8_attention::models::{
    Calibration, CalibrationConfig, LayerRanges, LayeredModel, StaticScales, run_layers,
};
use candle_int8_attention::quant::{Granularity, ValueRange, token_mean};
use serde::Serialize;

/// One way to find scales.
#[derive(Debug, Serialize)]
pub struct Row {
    pub scales: String,
    /// Signal-to-noise ratio of each layer's attention output, mean over heads.
    pub layer_sqnr_db: Vec<f64>,
    pub worst_head_db: f64,
    pub embedding_sqnr_db: f64,
    /// Share of the elements of queries and keys that lie outside of their static range.
    pub clipped: Option<f64>,
}

impl Row {
    pub fn mean_sqnr_db(&self) -> f64 {
        self.layer_sqnr_db.iter().sum::<f64>() / self.layer_sqnr_db.len() as f64
    }
}

/// The attention of every layer in one of the ways.
struct Way {
    name: String,
    configs: Vec<AttentionConfig>,
    clipped: Option<f64>,
}

/// First the dynamic scales, then those of each calibration. `model` computes in fp32.
pub fn rows(
    model: &mut TextModel,
    passages: &[Tensor],
    calibrations: &[Calibration],
    scales: StaticScales,
) -> Result<Vec<Row>> {
    let layers = model.attention().len();
    let mut ways = Vec::new();
    if let Some(calibration) = calibrations.first() {
        calibration.check_model(model)?;
        ways.extend(dynamic_ways(layers, calibration.config, scales));
    }
    for calibration in calibrations {
        let configs = (0..layers)
            .map(|layer| calibration.config(layer, scales, &AttentionConfig::fp32()))
            .collect::<Result<_, _>>()?;
        let clipped = Some(clipped(model, passages, calibration)?);
        let name = format!("static, {}", calibration.config.observer);
        ways.push(Way { name, configs, clipped });
    }
    let configs: Vec<_> = ways.iter().map(|way| way.configs.clone()).collect();
    let errors = attention_errors(model, passages, &configs)?;
    let reference = embeddings(model, passages)?;
    let mut rows = Vec::new();
    for (way, errors) in ways.into_iter().zip(errors) {
        for (layer, config) in model.attention_mut().into_iter().zip(way.configs) {
            layer.set_config(config);
        }
        let embedding = embedding_error(&reference, &embeddings(model, passages)?)?;
        rows.push(Row {
            scales: way.name,
            layer_sqnr_db: errors.iter().map(LayerErrors::mean_sqnr_db).collect(),
            worst_head_db: lowest(errors.iter().map(LayerErrors::worst_head_db)),
            embedding_sqnr_db: embedding.sqnr_db(),
            clipped: way.clipped,
        });
    }
    Ok(rows)
}

/// A scale for each token, the default; and what differs from the static scales only in that
/// ranges are from the data.
fn dynamic_ways(layers: usize, config: CalibrationConfig, scales: StaticScales) -> [Way; 2] {
    let CalibrationConfig { scheme, smooth_k, smooth_q, .. } = config;
    let shared = match scales {
        StaticScales::PerHead => Granularity::PerHead,
        StaticScales::PerTensor => Granularity::PerTensor,
    };
    [Granularity::PerToken, shared].map(|granularity| {
        let config = AttentionConfig::int8().scheme(scheme).granularity(granularity);
        let config = config.smoothing(smooth_k, smooth_q);
        Way {
            name: format!("dynamic, {granularity}"),
            configs: vec![config; layers],
            clipped: None,
        }
    })
}

/// The share of elements outside of their ranges.
fn clipped(model: &TextModel, passages: &[Tensor], calibration: &Calibration) -> Result<f64> {
    let CalibrationConfig { smooth_k, smooth_q, .. } = calibration.config;
    let (mut outside, mut all) = (0, 0);
    for ids in passages {
        run_layers(model, ids, &mut |layer, input| {
            let LayerRanges { q, k } = &calibration.layers[layer];
            for (tensor, ranges, smooth) in [(input.q, q, smooth_q), (input.k, k, smooth_k)] {
                all += tensor.elem_count();
                outside += count_outside(tensor, ranges, smooth)?;
            }
            Ok(())
        })?;
    }
    Ok(outside as f64 / all.max(1) as f64)
}

/// Of `[B, H, S, D]`, with one range a head.
fn count_outside(
    tensor: &Tensor,
    ranges: &[ValueRange],
    smooth: bool,
) -> candle_int8_attention::Result<usize> {
    let (_, heads, tokens, depth) = tensor.dims4()?;
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    let mut outside = 0;
    for (head, matrix) in values.chunks_exact((tokens * depth).max(1)).enumerate() {
        let mean = if smooth { token_mean(matrix, depth) } else { vec![0.0; depth] };
        let range = ranges[head % heads];
        let row = |row: &[f32]| {
            let smoothed = row.iter().zip(&mean).map(|(x, mean)| x - mean);
            smoothed.filter(|x| *x < range.min || *x > range.max).count()
        };
        outside += matrix.chunks_exact(depth).map(row).sum::<usize>();
    }
    Ok(outside)
}
