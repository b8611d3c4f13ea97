//! The tools that measure drift and choose settings, on a decoder.

use super::tiny::{HEADS, LAYERS, Tiny, VOCAB};
use super::{batch, relative_difference};
use anyhow::Result;
use candle_core::Device;
use candle_int8_attention::AttentionConfig;
use candle_int8_attention::drift::search::{Budget, SearchConfig, search};
use candle_int8_attention::drift::{Candidate, Recorder};
use candle_int8_attention::models::llama::{LlamaCache, LlamaModel};
use candle_int8_attention::models::{
    CalibrationConfig, LayeredModel, StaticScales, calibrate, run_layers,
};

fn model() -> Result<LlamaModel> {
    let folder = tempfile::tempdir()?;
    Tiny::new(true)?.write_folder(folder.path())?;
    Ok(LlamaModel::from_folder(folder.path(), &Device::Cpu)?)
}

fn ids(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * 71 + 11) % VOCAB as u32).collect()
}

#[test]
fn without_a_cache_the_states_are_those_with_one() -> Result<()> {
    let mut model = model()?;
    let ids = batch(&ids(50))?;
    for config in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        model.set_attention(&config);
        let mut cache = model.new_cache(1, 50)?;
        let expected = model.hidden_states(&ids, &mut cache)?;
        let mut seen = Vec::new();
        let found = run_layers(&model, &ids, &mut |layer, input| {
            seen.push((layer, input.q.dims()[1] / input.k.dims()[1]));
            Ok(())
        })?;
        let found = model.normalize(&found)?;
        // In int8, the cache holds other codes than a sequence that is quantized at once.
        let tolerance = if config == AttentionConfig::fp32() { 2e-5 } else { 0.05 };
        assert!(relative_difference(&found, &expected)? < tolerance);
        assert_eq!(seen, [(0, 2), (1, 2)]);
    }
    Ok(())
}

#[test]
fn a_decoder_is_recorded_and_searched() -> Result<()> {
    let mut model = model()?;
    let (count, passages) = (40, 3);
    let mut recorder = Recorder::new(vec![Candidate::default()])?;
    let words: Vec<String> = (0..count).map(|i| format!("word {i}")).collect();
    for index in 0..passages {
        recorder.record(&model, &batch(&ids(count))?, &words, index)?;
    }
    let report = recorder.report();
    assert_eq!((report.passages, report.tokens), (passages, passages * u64::from(count)));
    let layers = &report.configs[0].layers;
    assert_eq!(layers.len(), LAYERS);
    assert!(layers.iter().all(|layer| layer.heads.len() == HEADS));
    assert!(report.configs[0].output.mean_sqnr_db > 20.0, "{:?}", report.configs[0].output);
    assert_eq!(model.attention().len(), LAYERS);

    let ids = [batch(&ids(count))?];
    let mut config = SearchConfig::new(Budget::AttentionOutput(25.0));
    config.rounds = 1;
    let found = search(&mut model, (&ids, &ids), &config, &mut |_| ())?;
    assert_eq!(found.layers.len(), LAYERS);
    assert!(found.holds(), "{found:?}");
    found.settings()?.apply(&mut model)?;
    let set = model.attention();
    assert_eq!(set.len(), LAYERS);
    Ok(())
}

#[test]
fn calibrated_scales_of_each_head_serve_single_tokens_too() -> Result<()> {
    let mut model = model()?;
    let ids = ids(40);
    let passages = [batch(&ids)?];
    let calibration = calibrate(&model, &passages, CalibrationConfig::default())?;
    calibration.apply(&mut model, StaticScales::PerHead)?;
    let mut cache = LlamaCache::full(model.config(), 1, 40, &Device::Cpu)?;
    let whole = model.hidden_states(&batch(&ids)?, &mut cache)?.narrow(1, 39, 1)?;
    cache.truncate(39)?;
    let last = model.hidden_states(&batch(&ids[39..])?, &mut cache)?;
    let difference = relative_difference(&last, &whole)?;
    assert!(difference < 0.05, "{difference}");
    Ok(())
}
