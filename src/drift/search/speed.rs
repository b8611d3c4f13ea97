//! How long the attention of every layer takes in every setting.

use crate::Result;
use crate::attention::{AttentionCall, AttentionConfig, Backend, attention};
use crate::models::{LayeredModel, run_layers};
use candle_core::Tensor;
use std::time::Instant;

/// Passages whose attention is timed; time depends on shapes, not on words.
const PASSAGES: usize = 2;

/// What enters the attention of one layer, kept.
struct Kept {
    layer: usize,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    base: AttentionConfig,
}

impl Kept {
    /// Layers with the same shapes take the same time, so they share one measurement, which is
    /// less noisy than one of each.
    fn shapes(&self) -> [Vec<usize>; 3] {
        [&self.q, &self.k, &self.v].map(|x| x.dims().to_vec())
    }
}

/// Seconds for a passage, `[layer][setting]`. Settings take turns in every round, so that what else
/// the machine does falls on all of them; the fastest of the rounds counts.
pub(super) fn attention_seconds<M: LayeredModel<Input: Sized>>(
    model: &M,
    passages: &[M::Input],
    settings: &[Backend],
    rounds: usize,
) -> Result<Vec<Vec<f64>>> {
    let bases = model.attention();
    let mut seconds = vec![vec![0.0; settings.len()]; bases.len()];
    let timed = &passages[..passages.len().min(PASSAGES)];
    for passage in timed {
        let mut kept: Vec<Kept> = Vec::new();
        run_layers(model, passage, &mut |layer, input| {
            let (q, k, v) = (input.q.clone(), input.k.clone(), input.v.clone());
            let base = bases[layer].config().clone();
            kept.push(Kept { layer, q, k, v, call: input.call.clone(), base });
            Ok(())
        })?;
        while let Some(first) = kept.first() {
            let shapes = first.shapes();
            let (same, others): (Vec<_>, Vec<_>) =
                kept.into_iter().partition(|kept| kept.shapes() == shapes);
            kept = others;
            let times = time(&same, settings, rounds)?;
            for Kept { layer, .. } in &same {
                seconds[*layer].iter_mut().zip(&times).for_each(|(sum, time)| *sum += time);
            }
        }
    }
    seconds.iter_mut().flatten().for_each(|sum| *sum /= timed.len() as f64);
    Ok(seconds)
}

/// Seconds for one layer, one entry a setting.
fn time(layers: &[Kept], settings: &[Backend], rounds: usize) -> Result<Vec<f64>> {
    let mut fastest = vec![f64::INFINITY; settings.len()];
    let configs: Vec<Vec<AttentionConfig>> = (settings.iter())
        .map(|setting| {
            layers.iter().map(|layer| layer.base.with_backend(setting.clone())).collect()
        })
        .collect();
    for _ in 0..rounds {
        for (fastest, configs) in fastest.iter_mut().zip(&configs) {
            let start = Instant::now();
            for (layer, config) in layers.iter().zip(configs) {
                attention(&layer.q, &layer.k, &layer.v, &layer.call, config)?;
            }
            *fastest = fastest.min(start.elapsed().as_secs_f64() / layers.len() as f64);
        }
    }
    Ok(fastest)
}
