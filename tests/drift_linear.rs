//! What linear layers cost, in a recorder: merged, read back, in reports, at a gate.

mod common;

use candle_core::{Device, Tensor};
use candle_int8_attention::Error;
use candle_int8_attention::drift::linear::{LinearSums, Substitutes, linear_errors};
use candle_int8_attention::drift::{Candidate, Gate, Recorder};
use candle_int8_attention::models::llama::LlamaModel;
use candle_int8_attention::models::{EncoderModel, LayeredModel};
use candle_int8_attention::nn::Precision;
use common::json::assert_same;
use common::tiny::Tiny;
use common::tiny_encoders::{LAYERS, TinyEncoder, VOCAB};
use serde_json::{Value, json};
use std::sync::LazyLock;

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;

/// Its weights are random, and the same in all tests.
static ENCODER: LazyLock<TinyEncoder> = LazyLock::new(|| TinyEncoder::new("bert", ""));

fn model() -> TestResult<EncoderModel> {
    let folder = tempfile::tempdir()?;
    Ok(EncoderModel::load(&ENCODER.write(folder.path())?, &CPU)?)
}

fn passage(seed: usize) -> TestResult<Tensor> {
    let ids = (0..9 + seed).map(|i| (4 + (i * 7 + seed) % (VOCAB - 4)) as u32);
    Ok(Tensor::from_iter(ids, &CPU)?.unsqueeze(0)?)
}

/// A recorder of these passages; of linear layers those of `linear` alone.
fn record(passages: &[usize], linear: &[usize], precision: Precision) -> TestResult<Recorder> {
    let mut model = model()?;
    let mut substitutes = Substitutes::new(&mut model, precision)?;
    let mut recorder = Recorder::new(vec![Candidate::default()])?;
    for &seed in passages {
        let ids = passage(seed)?;
        let words = vec![" word".to_string(); ids.dim(1)?];
        recorder.record(&model, &ids, &words, seed as u64)?;
        if linear.contains(&seed) {
            recorder.record_linear(&mut model, &mut substitutes, &ids)?;
        }
    }
    Ok(recorder)
}

fn of_all(passages: &[usize]) -> TestResult<Recorder> {
    record(passages, passages, Precision::Int8)
}

/// As `merge` of the example reads it.
fn read_back(recorder: &Recorder) -> TestResult<Recorder> {
    Ok(serde_json::from_str(&serde_json::to_string(recorder)?)?)
}

fn linear(recorder: &Recorder) -> TestResult<Value> {
    Ok(serde_json::to_value(&recorder.report().linear)?)
}

#[test]
fn parts_give_the_figures_of_one_run_and_those_of_the_function() -> TestResult {
    let whole = linear(&of_all(&[1, 2, 3])?)?;
    let mut merged = read_back(&of_all(&[3])?)?;
    merged.merge(&read_back(&of_all(&[1, 2])?)?)?;
    assert_same(&linear(&merged)?, &whole);
    // A part of a text may hold no passage.
    let mut empty = record(&[], &[], Precision::Int8)?;
    empty.merge(&merged)?;
    empty.merge(&record(&[], &[], Precision::Int8)?)?;
    assert_same(&linear(&empty)?, &whole);

    let passages = [passage(1)?, passage(2)?, passage(3)?];
    let errors = linear_errors(&mut model()?, &passages, Precision::Int8)?;
    assert_same(&serde_json::to_value(errors)?, &whole["products"]);
    assert_eq!(
        (&whole["precision"], whole["products"].as_array().map(Vec::len)),
        (&json!("int8"), Some(4 * LAYERS))
    );
    let near = linear_errors(&mut model()?, &passages, Precision::Int16)?;
    assert!(near.iter().all(|of| of.alone.sqnr_db > 60.0), "{near:?}");
    Ok(())
}

#[test]
fn what_was_measured_differently_is_not_merged() -> TestResult {
    let (one, both) = (of_all(&[1])?, of_all(&[2])?);
    let without = record(&[2], &[], Precision::Int8)?;
    let int16 = record(&[2], &[2], Precision::Int16)?;
    for (a, b, expected) in [
        (&one, &without, "only one of the results has measured linear layers"),
        (&without, &one, "only one of the results has measured linear layers"),
        (&one, &int16, "linear layers in int8 and in int16"),
    ] {
        let mut merged = a.clone();
        let error = merged.merge(b).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(merged.passages(), 1, "nothing is changed");
    }
    let mut merged = one;
    merged.merge(&both)?;
    assert_eq!(merged.passages(), 2);
    // A part of the passages is not all.
    assert!(record(&[1, 2], &[1], Precision::Int8)?.report().linear.is_none());
    Ok(())
}

#[test]
fn damaged_sums_of_linear_layers_are_refused() -> TestResult {
    let whole = serde_json::to_value(of_all(&[1, 2])?)?;
    for (place, value, expected) in [
        ("/linear/products", json!([]), "no linear layer was measured"),
        ("/linear/products/0/layer", json!(LAYERS), "a linear layer \"qkv\" in layer 4 of 4"),
        ("/linear/products/1/product", json!("qkv"), "a linear layer \"qkv\" in layer 0 of 4"),
        ("/linear/products/2/alone/cosine/nan", json!(1), "3 values of 2 passages"),
        ("/linear/products/3/accumulated/errors/max_abs", json!(-1.0), "of -1"),
        ("/linear/precision", json!("int4"), "unknown variant `int4`"),
    ] {
        let mut state = whole.clone();
        *state.pointer_mut(place).ok_or(place)? = value;
        let error = serde_json::from_str::<Recorder>(&state.to_string()).unwrap_err().to_string();
        assert!(error.contains(expected), "{place}: {error}");
    }
    Ok(())
}

#[test]
fn a_gate_names_the_product_and_holds_nothing_that_was_not_measured() -> TestResult {
    let report = of_all(&[1, 2])?.report();
    let products = &report.linear.as_ref().ok_or("linear layers")?.products;
    let worst = products.iter().min_by(|a, b| a.alone.sqnr_db.total_cmp(&b.alone.sqnr_db));
    let worst = worst.ok_or("a product")?;
    let cosine = products[products.len() - 1].accumulated.min_cosine;
    let gate = |sqnr, cosine| Gate {
        min_linear_sqnr_db: sqnr,
        min_linear_embedding_cosine: cosine,
        ..Gate::default()
    };
    let holds = gate(Some(worst.alone.sqnr_db), Some(cosine));
    assert_eq!(holds.violations(&report), []);
    let [violation] = &gate(Some(worst.alone.sqnr_db + 1e-6), None).violations(&report)[..] else {
        return Err("one product expected".into());
    };
    let place = format!("layer {} {}: min_linear_sqnr_db is", worst.layer, worst.product);
    assert!(violation.to_string().starts_with(&place), "{violation}");
    let [violation] = &gate(None, Some(cosine + 1e-6)).violations(&report)[..] else {
        return Err("one embedding expected".into());
    };
    let place = "embedding with all linear layers switched: min_linear_embedding_cosine is";
    assert!(violation.to_string().starts_with(place), "{violation}");

    let read = Gate::from_toml("min_linear_sqnr_db = 40\nmin_linear_embedding_cosine = 0.999")?;
    assert_eq!(read, gate(Some(40.0), Some(0.999)));
    for unmeasured in [record(&[1], &[], Precision::Int8)?, record(&[], &[], Precision::Int8)?] {
        let violations = read.violations(&unmeasured.report());
        assert_eq!(violations.len(), 2, "{violations:?}");
        assert!(violations.iter().all(|of| of.value.is_nan()), "{violations:?}");
        assert!(violations[0].to_string().starts_with("no linear layer was measured: min_linear"));
    }
    Ok(())
}

#[test]
fn every_report_shows_each_product() -> TestResult {
    let report = of_all(&[1])?.report();
    let (text, html) = (report.to_text(), report.to_html()?);
    assert!(text.contains("## Linear layers in int8"), "{text}");
    assert!(html.contains("<h2>Linear layers in int8</h2>"), "{html}");
    for product in ["qkv", "output", "up", "down"] {
        let rows = text.lines().filter(|line| line.contains(&format!("| {product} |")));
        let rows =
            rows.count() + text.lines().filter(|l| l.contains(&format!(" {product} | "))).count();
        assert!(rows >= LAYERS, "{product}: {text}");
        let cells = html.matches(&format!("<td class=\"text\">{product}</td>")).count();
        assert_eq!(cells, LAYERS, "{product}");
    }
    let without = record(&[1], &[], Precision::Int8)?.report();
    assert!(!without.to_text().contains("Linear layers") && without.linear.is_none());
    assert!(!without.to_html()?.contains("Linear layers"));
    Ok(())
}

/// The same numbers whether a passage failed in between or not, in a model that is as it was.
#[test]
fn a_passage_that_fails_leaves_no_trace() -> TestResult {
    let mut model = model()?;
    let before = model.forward(&passage(1)?, None, None)?;
    let mut substitutes = Substitutes::new(&mut model, Precision::Int8)?;
    let mut sums = LinearSums::new(&substitutes);
    sums.record(&mut model, &mut substitutes, &passage(1)?)?;
    let recorded = sums.clone();
    let unknown = Tensor::new(&[[VOCAB as u32]], &CPU)?;
    assert!(sums.record(&mut model, &mut substitutes, &unknown).is_err());
    assert_eq!(sums, recorded);
    let mut other = Substitutes::new(&mut model, Precision::Int16)?;
    let error = sums.record(&mut model, &mut other, &passage(1)?).unwrap_err().to_string();
    assert!(error.contains("linear layers in int8 and in int16"), "{error}");
    assert_eq!((&sums, sums.passages()), (&recorded, 1));
    assert!(model.linear_mut().iter().all(|of| of.linear.precision() == Precision::F32));
    let after = model.forward(&passage(1)?, None, None)?;
    assert_eq!(common::largest_difference(&after, &before), 0.0);
    Ok(())
}

#[test]
fn a_decoder_has_no_linear_layers_to_substitute() -> TestResult {
    let folder = tempfile::tempdir()?;
    Tiny::new(true)?.write_folder(folder.path())?;
    let mut model = LlamaModel::from_folder(folder.path(), &CPU)?;
    match Substitutes::new(&mut model, Precision::Int8) {
        Err(Error::Unsupported(problem)) => {
            assert!(problem.contains("no linear layer whose precision can be chosen"), "{problem}");
        }
        _ => return Err("a decoder has no such layers".into()),
    }
    Ok(())
}
