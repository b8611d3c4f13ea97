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
    Calibration, CalibrationConfig, LayeredModel, StaticScales, run_layers,
};
use candle_int8_attention::quant::Granularity;
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
    // What belongs to the model, such as the windows of its layers, is the same in all ways.
    let own: Vec<AttentionConfig> =
        model.attention().iter().map(|layer| layer.config().clone()).collect();
    let mut ways = Vec::new();
    if let Some(calibration) = calibrations.first() {
        calibration.check_model(model)?;
        ways.extend(dynamic_ways(&own, calibration.config, scales));
    }
    for calibration in calibrations {
        let configs = (own.iter().enumerate())
            .map(|(layer, own)| calibration.config(layer, scales, own))
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
fn dynamic_ways(
    own: &[AttentionConfig],
    config: CalibrationConfig,
    scales: StaticScales,
) -> [Way; 2] {
    let CalibrationConfig { scheme, smooth_k, smooth_q, rotate, outliers, .. } = config;
    let shared = match scales {
        StaticScales::PerHead => Granularity::PerHead,
        StaticScales::PerTensor => Granularity::PerTensor,
    };
    [Granularity::PerToken, shared].map(|granularity| {
        let config = AttentionConfig::int8().scheme(scheme).granularity(granularity);
        let config = config.smoothing(smooth_k, smooth_q);
        let config =
            config.with_scores(|scores| (scores.rotate, scores.outliers) = (rotate, outliers));
        Way {
            name: format!("dynamic, {granularity}"),
            configs: own.iter().map(|own| own.with_backend(config.backend.clone())).collect(),
            clipped: None,
        }
    })
}

/// The share of elements outside of their ranges.
fn clipped(model: &TextModel, passages: &[Tensor], calibration: &Calibration) -> Result<f64> {
    let (mut outside, mut all) = (0, 0);
    for ids in passages {
        run_layers(model, ids, &mut |layer, input| {
            let (found, of) = calibration.outside(layer, input.q, input.k)?;
            (outside, all) = (outside + found, all + of);
            Ok(())
        })?;
    }
    Ok(outside as f64 / all.max(1) as f64)
}
