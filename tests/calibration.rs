//! Static ranges, the search, and their files, with the encoder of this repository.

mod common;

use candle_core::{Device, Tensor};
use candle_int8_attention::drift::layers::{attention_errors, embedding_error, embeddings};
use candle_int8_attention::drift::search::{Budget, SearchConfig, search};
use candle_int8_attention::models::{
    BertModel, Calibration, CalibrationConfig, Calibrator, LayerSettings, LayeredModel, ModelFiles,
    StaticScales, TextEncoder, calibrate, run_layers,
};
use candle_int8_attention::nn::Precision;
use candle_int8_attention::quant::{Granularity, ObserverKind, Scheme, Smoothing};
use candle_int8_attention::{AttentionConfig, AttnMask, Backend, Error, attention};
use common::randn;
use std::path::{Path, PathBuf};

fn encoder() -> TextEncoder {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/paraphrase-MiniLM-L3-v2");
    TextEncoder::load_in(&ModelFiles::from_dir(folder).unwrap(), &Device::Cpu, Precision::F32)
        .unwrap()
}

fn load_model() -> BertModel {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/paraphrase-MiniLM-L3-v2");
    BertModel::load(&ModelFiles::from_dir(folder).unwrap(), &Device::Cpu).unwrap()
}

/// Token ids of four short passages.
fn passages() -> Vec<Tensor> {
    let texts = [
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, \
         must be in want of a wife.",
        "However little known the feelings or views of such a man may be on his first entering a \
         neighbourhood, this truth is so well fixed in the minds of the surrounding families.",
        "The river burst its banks after three days of rain, and the bank in the high street had to \
         close its doors until the water was gone.",
        "Kernels are leaves; they know nothing of tensors, and whoever reads them should not have to.",
    ];
    let encoder = encoder();
    texts.iter().map(|text| encoder.tokenize(&[text]).unwrap().input_ids).collect()
}

fn folder() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file.json");
    (folder, path)
}

/// What [`Error::Corrupt`] says of a file with this content.
fn corrupt<T>(content: &str, load: impl Fn(&Path) -> Result<T, Error>) -> String {
    let (_folder, path) = folder();
    std::fs::write(&path, content).unwrap();
    match load(&path) {
        Err(Error::Corrupt { problem, .. }) => problem,
        Err(other) => panic!("{content}: {other}"),
        Ok(_) => panic!("{content} was accepted"),
    }
}

#[test]
fn static_ranges_come_close_to_dynamic_ones() {
    let (model, passages) = (load_model(), passages());
    let dynamic = vec![AttentionConfig::int8().granularity(Granularity::PerHead); 3];
    for scheme in [Scheme::Symmetric, Scheme::Affine] {
        let config = CalibrationConfig { scheme, ..CalibrationConfig::default() };
        let calibration = calibrate(&model, &passages, config).unwrap();
        assert_eq!((calibration.layers.len(), calibration.layers[0].q.len()), (3, 12));
        for (scales, loss) in [(StaticScales::PerHead, 2.0), (StaticScales::PerTensor, 8.0)] {
            let base = AttentionConfig::fp32();
            let fixed: Vec<_> =
                (0..3).map(|layer| calibration.config(layer, scales, &base).unwrap()).collect();
            let errors = attention_errors(&model, &passages, &[dynamic.clone(), fixed]).unwrap();
            for (dynamic, fixed) in errors[0].iter().zip(&errors[1]) {
                let (dynamic, fixed) = (dynamic.mean_sqnr_db(), fixed.mean_sqnr_db());
                assert!(fixed > dynamic - loss && fixed > 35.0, "{scheme} {dynamic} {fixed}");
            }
        }
    }
}

#[test]
fn a_calibration_is_applied_saved_and_loaded() {
    let (mut model, passages) = (load_model(), passages());
    let reference = embeddings(&model, &passages[2..]).unwrap();
    let calibration = calibrate(&model, &passages[..2], CalibrationConfig::default()).unwrap();
    let tokens: usize = passages[..2].iter().map(Tensor::elem_count).sum();
    assert_eq!(calibration.tokens, tokens as u64);

    let (_folder, path) = folder();
    calibration.save(&path).unwrap();
    let loaded = Calibration::load(&path).unwrap();
    assert_eq!(loaded, calibration);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);

    loaded.apply(&mut model, StaticScales::PerHead).unwrap();
    let candidate = embeddings(&model, &passages[2..]).unwrap();
    let sqnr = embedding_error(&reference, &candidate).unwrap().sqnr_db();
    assert!(sqnr > 35.0 && sqnr.is_finite(), "{sqnr}");
}

#[test]
fn parts_of_a_text_are_merged() {
    let (model, passages) = (load_model(), passages());
    for observer in [ObserverKind::MinMax, ObserverKind::PERCENTILE, ObserverKind::Mse] {
        let config = CalibrationConfig { observer, ..CalibrationConfig::default() };
        let part = |passages: &[Tensor]| {
            let mut calibrator = Calibrator::new(config).unwrap();
            for ids in passages {
                run_layers(&model, ids, &mut |layer, x| calibrator.observe(layer, x.q, x.k))
                    .unwrap();
            }
            calibrator
        };
        let whole = part(&passages);
        let mut merged = part(&[]);
        for ids in passages.chunks(2) {
            merged.merge(&part(ids)).unwrap();
        }
        assert_eq!(merged.finish().unwrap(), whole.finish().unwrap());
    }
    let other =
        Calibrator::new(CalibrationConfig { smooth_k: Smoothing::None, ..Default::default() });
    let mut calibrator = Calibrator::new(CalibrationConfig::default()).unwrap();
    let error = calibrator.merge(&other.unwrap()).unwrap_err().to_string();
    assert!(error.contains("expected the same"), "{error}");
}

#[test]
fn what_cannot_be_calibrated_is_said() {
    let x = |shape: &[usize]| Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut calibrator = Calibrator::new(CalibrationConfig::default()).unwrap();
    let error = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert!(error(calibrator.finish().map(|_| ())).contains("nothing was observed"));
    calibrator.observe(1, &x(&[1, 4, 8, 16]), &x(&[2, 2, 8, 16])).unwrap();
    assert!(error(calibrator.finish().map(|_| ())).contains("q of layer 0, head 0"));
    let found = error(calibrator.observe(1, &x(&[1, 3, 8, 16]), &x(&[1, 2, 8, 16])));
    assert!(found.contains("[1, 3, 8, 16]") && found.contains("the 4 heads"), "{found}");
    let found = error(calibrator.observe(1, &x(&[4, 8, 16]), &x(&[1, 2, 8, 16])));
    assert!(found.contains("rank 3"), "{found}");
    let bad = CalibrationConfig {
        observer: ObserverKind::Percentile { percent: 0.0 },
        ..CalibrationConfig::default()
    };
    assert!(error(Calibrator::new(bad).map(|_| ())).contains("percentile 0"));

    // Rows of NaN are passed over, as they are when ranges are dynamic.
    let nan = (x(&[1, 4, 8, 16]) * f64::NAN).unwrap();
    let mut calibrator = Calibrator::new(CalibrationConfig::default()).unwrap();
    calibrator.observe(0, &nan, &x(&[1, 4, 8, 16])).unwrap();
    assert!(error(calibrator.finish().map(|_| ())).contains("no finite number"));
}

#[test]
fn what_fails_half_way_has_counted_nothing() {
    let mut calibrator = Calibrator::new(CalibrationConfig::default()).unwrap();
    let (q, k) = (randn((1, 4, 10, 8)), randn((1, 2, 10, 8)));
    calibrator.observe(0, &q, &k).unwrap();
    let before = calibrator.clone();
    let flat = randn((10, 8));
    let integers = k.to_dtype(candle_core::DType::U32).unwrap();
    let other_heads = randn((1, 3, 10, 8));
    let cases = [
        (0, &q, &flat),
        (0, &flat, &k),
        (0, &q, &integers),
        (0, &q, &other_heads),
        (0, &other_heads, &k),
        // Of a layer that was not seen before.
        (1, &q, &flat),
        (5, &flat, &k),
        // No model has such layers, and memory for them would not either.
        (1 << 40, &q, &k),
        (usize::MAX, &q, &k),
    ];
    for (layer, q, k) in cases {
        let error = calibrator.observe(layer, q, k).unwrap_err();
        assert!(!matches!(error, Error::Candle(_)), "{error:?}");
        assert_eq!(calibrator, before, "{error}");
    }
}

#[test]
fn calibrations_of_other_models_are_refused() {
    let mut model = load_model();
    let x = randn((1, 4, 8, 16));
    let mut calibrator = Calibrator::new(CalibrationConfig::default()).unwrap();
    calibrator.observe(0, &x, &x).unwrap();
    let calibration = calibrator.finish().unwrap();
    let error = calibration.apply(&mut model, StaticScales::PerHead).unwrap_err().to_string();
    assert!(error.contains("1 layers for a model of 3"), "{error}");
    for layer in 1..3 {
        calibrator.observe(layer, &x, &x).unwrap();
    }
    for scales in [StaticScales::PerHead, StaticScales::PerTensor] {
        let error = calibrator.finish().unwrap().apply(&mut model, scales).unwrap_err().to_string();
        assert!(error.contains("4 query heads in layer 0 for a model of 12"), "{error}");
    }
    assert!(model.attention().iter().all(|layer| layer.config() == &AttentionConfig::fp32()));
    let base = AttentionConfig::int8();
    let error = calibration.config(1, StaticScales::PerHead, &base).unwrap_err().to_string();
    assert!(error.contains("layer 1"), "{error}");
    // Other heads are found where the data are.
    let config = calibration.config(0, StaticScales::PerHead, &base).unwrap();
    let y = randn((1, 6, 8, 16));
    let error = attention(&y, &y, &y, &AttnMask::None, &config).unwrap_err().to_string();
    assert!(error.contains("4 static parameters for 6 groups"), "{error}");
}

#[test]
fn files_that_are_not_calibrations_are_refused() {
    let good = r#"{"format": "candle-int8-attention calibration", "version": 1, "calibration":
        {"config": {"observer": "mse", "scheme": "symmetric", "smooth_k": "head", "smooth_q": "block",
         "rotate": true, "outliers": true},
        "tokens": 7, "layers": [{"q": [{"min": -1.0, "max": 2.5}], "k": [{"min": -1, "max": 1}]}]}}"#;
    let (_folder, path) = folder();
    std::fs::write(&path, good).unwrap();
    let calibration = Calibration::load(&path).unwrap();
    assert_eq!(calibration.layers[0].q[0].max, 2.5);
    let cases = [
        ("version\": 1", "version\": 2", "of version 2, expected"),
        ("attention calibration", "attention layer settings", "layer settings\" of version 1"),
        ("\"mse\"", "\"best\"", "unknown variant `best`"),
        ("\"mse\"", "{\"percentile\": {\"percent\": 101}}", "percentile 101"),
        ("\"tokens\": 7", "\"token\": 7", "unknown field `token`"),
        ("2.5", "null", "invalid type: null"),
        ("2.5", "-2.5", "range -1..-2.5 in layer 0"),
        ("2.5", "1e39", "range -1..inf in layer 0"),
        ("[{\"min\": -1, \"max\": 1}]", "[]", "no heads in layer 0"),
        ("{", "", "not a calibration"),
    ];
    for (from, to, expected) in cases {
        let problem = corrupt(&good.replacen(from, to, 1), |path| Calibration::load(path));
        assert!(problem.contains(expected), "{to}: {problem}");
    }
    for len in [0, 10, good.len() - 1] {
        let problem = corrupt(&good[..len], |path| Calibration::load(path));
        assert!(problem.contains("not a calibration"), "{problem}");
    }
    let missing = Calibration::load("no/such/file.json").unwrap_err();
    assert!(matches!(missing, Error::MissingFile { what: "calibration", .. }), "{missing}");
    let unwritable = calibration.save("no/such/folder/file.json").unwrap_err();
    assert!(matches!(unwritable, Error::Io { .. }), "{unwritable}");
}

#[test]
fn layer_settings_are_applied_saved_and_loaded() {
    let mut model = load_model();
    model.set_attention(&AttentionConfig::fp32().softcap(30.0));
    let int8: Backend = "block:64/token+smooth-k+auto".parse().unwrap();
    let settings = LayerSettings::new(vec![int8.clone(), Backend::Fp32, Backend::default()]);
    let settings = settings.with_about(&"by hand").unwrap();
    let (_folder, path) = folder();
    settings.save(&path).unwrap();
    let loaded = LayerSettings::load(&path).unwrap();
    assert_eq!(loaded, settings);
    assert_eq!(loaded.about_json(), "\"by hand\"");
    loaded.apply(&mut model).unwrap();
    let backends: Vec<_> = model.layers().iter().map(|l| &l.attention.config().backend).collect();
    assert_eq!(backends, settings.layers.iter().collect::<Vec<_>>());
    // What the model asks for stays.
    let mut specs = model.layers().iter().map(|layer| &layer.attention.config().spec);
    assert!(specs.all(|spec| spec.softcap == Some(30.0)));
    let error = LayerSettings::new(vec![Backend::Fp32]).apply(&mut model).unwrap_err();
    assert!(error.to_string().contains("1 layers for a model of 3"), "{error}");
}

#[test]
fn files_that_are_not_layer_settings_are_refused() {
    let good = r#"{"format": "candle-int8-attention layer settings", "version": 1, "layers": [
        {"backend": "int8", "scheme": "affine", "granularity": "block:128/token", "smooth_k": "head",
         "smooth_q": "none", "rotate": false, "outliers": false, "pv": "f32"}, {"backend": "fp32"}],
        "linear": [{"layer": 0, "product": "qkv", "precision": "int16"}]}"#;
    let (_folder, path) = folder();
    std::fs::write(&path, good).unwrap();
    let settings = LayerSettings::load(&path).unwrap();
    assert_eq!(settings.layers[0].to_string(), "affine+block:128/token+smooth-k+f32");
    assert_eq!(settings.layers[1], Backend::Fp32);
    assert_eq!(settings.about_json(), "null");
    let linear = &settings.linear[0];
    assert_eq!((linear.product.as_str(), linear.precision), ("qkv", Precision::Int16));
    let cases = [
        ("version\": 1", "version\": 9", "of version 9, expected"),
        ("\"int8\"", "\"int4\"", "unknown variant `int4`"),
        ("smooth_q", "smoothq", "unknown field `smoothq`"),
        ("\"f32\"", "\"f64\"", "unknown variant `f64`"),
        ("block:128", "block:0", "\"block:0/token\", expected one of symmetric, affine"),
        ("{\"backend\": \"fp32\"}", "{\"backend\": \"fp32\"", "not layer settings"),
        ("\"fp32\"", "\"fp32\", \"pv\": \"f32\"", "key \"pv\", but backend fp32"),
        (
            "\"int16\"",
            "\"int12\"",
            "unknown variant `int12`, expected one of `f32`, `int16`, `int8`",
        ),
        ("\"product\"", "\"products\"", "unknown field `products`"),
        ("\"layer\": 0", "\"layer\": -1", "invalid value: integer `-1`"),
        ("\"layer\": 0", "\"layer\": 0, \"layer\": 1", "duplicate field `layer`"),
    ];
    for (from, to, expected) in cases {
        let problem = corrupt(&good.replacen(from, to, 1), |path| LayerSettings::load(path));
        assert!(problem.contains(expected), "{to}: {problem}");
    }
}

#[test]
fn the_search_keeps_its_budget_and_the_model_its_attention() {
    let (mut model, passages) = (load_model(), passages());
    model.set_attention(&AttentionConfig::int8());
    let texts = (&passages[..2], &passages[2..]);
    let mut run = |budget| {
        let config = SearchConfig { rounds: 1, ..SearchConfig::new(budget) };
        let found = search(&mut model, texts, &config, &mut |_| ()).unwrap();
        let own = model.layers().iter().map(|layer| layer.attention.config());
        assert!(own.clone().all(|config| *config == AttentionConfig::int8()));
        found
    };
    for budget in [Budget::Embedding(40.0), Budget::AttentionOutput(40.0)] {
        let found = run(budget);
        assert_eq!(found.layers.len(), 3);
        assert!(found.promised.of(budget) >= 41.0 && found.holds(), "{found:?}");
        // The file that it writes does what it says.
        let (_folder, path) = folder();
        found.settings().unwrap().save(&path).unwrap();
        let settings = LayerSettings::load(&path).unwrap();
        let mut model = load_model();
        let reference = embeddings(&model, texts.1).unwrap();
        settings.apply(&mut model).unwrap();
        let sqnr =
            embedding_error(&reference, &embeddings(&model, texts.1).unwrap()).unwrap().sqnr_db();
        let promised = found.verified.embedding_sqnr_db;
        assert!(sqnr == promised || (sqnr - promised).abs() < 1e-9, "{sqnr} {found:?}");
    }
    // What nothing can hold stays in fp32.
    for budget in [Budget::Embedding(300.0), Budget::AttentionOutput(300.0)] {
        let found = run(budget);
        assert!(found.layers.iter().all(|layer| layer.setting == Backend::Fp32));
        assert!(found.holds() && found.verified.embedding_sqnr_db == f64::INFINITY);
    }
}

#[test]
fn a_search_without_text_or_numbers_is_an_error() {
    let (mut model, passages) = (load_model(), passages());
    let mut error = |texts: (&[Tensor], &[Tensor]), config: &SearchConfig| {
        search(&mut model, texts, config, &mut |_| ()).unwrap_err().to_string()
    };
    let config = SearchConfig::new(Budget::Embedding(40.0));
    assert!(error((&passages, &[]), &config).contains("no passage to verify"));
    assert!(error((&[], &passages), &config).contains("no passage to search"));
    let texts = (&passages[..1], &passages[1..]);
    let bad = SearchConfig::new(Budget::Embedding(f64::NAN));
    assert!(error(texts, &bad).contains("budget NaN"));
    let bad = SearchConfig { rounds: 0, ..config };
    assert!(error(texts, &bad).contains("0 rounds"));
}
