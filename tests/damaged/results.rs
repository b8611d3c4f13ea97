//! Results of `drift` that are read back to be merged, and gates over nothing.

use super::numbers;
use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_int8_attention::attention::AttentionCall;
use candle_int8_attention::drift::{Candidate, Gate, Recorder};
use candle_int8_attention::models::{Attend, LayeredModel};
use candle_int8_attention::{AttentionConfig, Error, QuantizedAttention};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};

pub const LAYERS: usize = 2;
const TOKENS: usize = 12;

/// Self-attention of two heads over its input, layer after layer; one of them may fail.
pub struct Chain {
    layers: Vec<QuantizedAttention>,
    fails_in: Option<usize>,
}

impl Chain {
    fn new(layers: usize, fails_in: Option<usize>) -> Self {
        let attention = || QuantizedAttention::new(AttentionConfig::fp32());
        Self { layers: (0..layers).map(|_| attention()).collect(), fails_in }
    }
}

impl LayeredModel for Chain {
    type Input = usize;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.layers.iter().collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.layers.iter_mut().collect()
    }

    fn embed(&self, seed: &usize) -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(numbers(TOKENS * 16, *seed), (1, TOKENS, 16), &Device::Cpu)?)
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, Error> {
        let x = hidden.reshape((1, TOKENS, 2, 8))?.transpose(1, 2)?;
        let out = attend(&x, &x, &x, &AttentionCall::default())?;
        if self.fails_in == Some(index) {
            return Err(Error::Mismatch(format!("layer {index} fails")));
        }
        Ok((out.transpose(1, 2)?.reshape((1, TOKENS, 16))? + hidden)?)
    }
}

pub fn sound() -> Chain {
    Chain::new(LAYERS, None)
}

pub fn words() -> Vec<String> {
    (0..TOKENS).map(|i| format!(" word{i}")).collect()
}

pub fn recorder() -> Result<Recorder> {
    Ok(Recorder::new(vec![Candidate::default(), "token".parse()?])?)
}

/// The state of a recorder that saw two passages.
pub fn state() -> Result<Value> {
    let mut recorder = recorder()?;
    for seed in [1, 2] {
        recorder.record(&sound(), &seed, &words(), seed as u64)?;
    }
    Ok(serde_json::to_value(&recorder)?)
}

fn read(state: &Value) -> Result<Recorder, serde_json::Error> {
    serde_json::from_str(&state.to_string())
}

/// What is said of the state with `value` at each of these places.
fn check(cases: &[(&str, Value, &str)]) -> Result<()> {
    let whole = state()?;
    read(&whole)?;
    for (place, value, says) in cases {
        let mut state = whole.clone();
        *state.pointer_mut(place).unwrap_or_else(|| panic!("no {place}")) = value.clone();
        let error = match read(&state) {
            Ok(_) => panic!("{place} of {value} was read"),
            Err(error) => error.to_string(),
        };
        assert!(error.contains(says), "{place} of {value}: {says:?} is not in: {error}");
    }
    Ok(())
}

#[test]
fn parts_of_another_size_are_refused() -> Result<()> {
    check(&[
        ("/candidates", json!([]), "no configuration"),
        ("/candidates/0/layers", json!([]), "layers with [] heads, expected [2, 2]"),
        ("/candidates/1/layers/0/heads", json!([]), "[0, 2] heads, expected [2, 2]"),
        ("/shapes", json!([]), "2 passages of 24 tokens in 0 layers"),
        ("/shapes/1", json!([]), "layer 1 has no head"),
        ("/passages", json!(0), "0 passages of 24 tokens in 2 layers"),
        ("/passages", json!(3), "2 values of 3 passages"),
        ("/passages", json!(u64::MAX), "18446744073709551615 passages"),
        ("/worst/words/0/layer", json!(2), "a word in head"),
        ("/worst/sentences/0/worst/head", json!(7), "a word in head 7"),
    ])
}

#[test]
fn sums_that_nothing_adds_up_to_are_refused() -> Result<()> {
    let stage = "/candidates/0/layers/0/heads/1/alone/output";
    let sum = |sum: &str| format!("{stage}/{sum}");
    check(&[
        (&sum("sqnr_db/count"), json!(1), "a summary with the mean"),
        (&sum("sqnr_db/count"), json!(u64::MAX), "a summary of"),
        (&sum("sqnr_db/min"), json!(1e9), "numbers from 1000000000"),
        (&sum("sqnr_db/min"), json!("NaN"), "from NaN"),
        (&sum("sqnr_db/sum"), json!([1e9, 0.0]), "the mean 500000000"),
        (&sum("cosine_loss/max"), json!(-1.0), "to -1"),
        (&sum("pooled/error_squares"), json!([-1.0, 0.0]), "a sum of squares or sizes of -1"),
        (&sum("pooled/count"), json!(u64::MAX), "sums of 18446744073709551615"),
        ("/candidates/0/layers/0/heads/0/q_clipped/clipped", json!(1u64 << 40), "codes"),
        ("/candidates/0/layers/0/heads/0/alone/probabilities/top1/nan", json!(3), "same queries"),
    ])
}

/// Merging read beyond the buckets, or told the sketches' configurations apart with a panic.
#[test]
fn percentiles_whose_buckets_are_damaged_are_refused() -> Result<()> {
    let kl = "/candidates/0/layers/0/heads/0/alone/probabilities/kl";
    let of = |place: &str| format!("{kl}/sketch/{place}");
    check(&[
        (&of("config/gamma"), json!(1.5), "another precision"),
        (&of("config/max_num_bins"), json!(1), "another precision"),
        (&of("store/bins"), json!([]), "0 buckets of"),
        (&of("store/bins"), json!([u64::MAX, 1]), "2 buckets of"),
        (&of("store/count"), json!(7), "buckets of 7"),
        (&of("store/bin_limit"), json!(1u64 << 40), "buckets of"),
        (&of("store/offset"), json!(1000), "at 1000"),
        (&of("store/offset"), json!(i32::MIN), "at -2147483648"),
        (&of("store/min_key"), json!(i32::MAX), "buckets from"),
        (&of("store/max_key"), json!(i32::MAX), "buckets from"),
        (&of("negative_store/max_key"), json!(3), "buckets without a number"),
        (&of("zero_count"), json!(u64::MAX), "percentiles of"),
        (&of("min"), json!(1e300), "percentiles from"),
        (&format!("{kl}/sketch"), Value::Null, "percentiles of 0 numbers"),
        (&format!("{kl}/summary/count"), json!(3), "3"),
    ])
}

#[test]
fn parts_of_texts_that_there_cannot_be_are_refused() -> Result<()> {
    let text = |shards: Value, count: u64| json!({"name": "t", "cut": "c", "shards": shards, "shard_count": count});
    for (shards, count) in [
        (json!([]), 1),
        (json!([0]), 1),
        (json!([2]), 1),
        (json!([1, 1]), 2),
        (json!([1]), 0),
        (json!([u64::MAX]), 3),
    ] {
        let mut state = state()?;
        state["subject"]["texts"] = json!([text(shards.clone(), count)]);
        let error = read(&state).expect_err("parts were read").to_string();
        assert!(error.contains(&format!("parts {shards}").replace(',', ", ")), "{error}");
    }
    Ok(())
}

/// A state of no layers passed a gate of 500 dB.
#[test]
fn a_gate_over_nothing_is_not_held() -> Result<()> {
    let nothing = recorder()?.report();
    for (text, place) in [
        ("min_layer_sqnr_db = 500", "no layer was measured"),
        ("min_layer_sqnr_db = -500", "no layer was measured"),
        ("min_head_sqnr_db = -500", "no layer was measured"),
        ("min_head_cosine = -1", "no layer was measured"),
        ("max_head_kl = 1e9", "no layer was measured"),
        ("min_head_top1 = 0", "no layer was measured"),
        ("min_head_top5 = 0", "no layer was measured"),
        ("min_accumulated_sqnr_db = -500", "no layer was measured"),
        ("min_embedding_cosine = -1", "embedding"),
    ] {
        let violations = Gate::from_toml(text)?.violations(&nothing);
        assert_eq!(violations.len(), 1, "{text}");
        let shown = violations[0].to_string();
        assert!(shown.starts_with(place) && shown.ends_with("found NaN"), "{shown}");
    }
    // Also where parts of a report are missing.
    let gate = Gate::from_toml("max_head_kl = 1e9\nmin_layer_sqnr_db = -500")?;
    let whole = read(&state()?)?.report();
    assert!(gate.violations(&whole).is_empty());
    let mut report = whole.clone();
    report.configs.iter_mut().for_each(|config| config.layers.clear());
    assert_eq!(gate.violations(&report).len(), 2);
    let mut report = whole.clone();
    report.configs.iter_mut().for_each(|config| config.layers[1].heads.clear());
    assert_eq!(gate.violations(&report).len(), 1);
    let mut report = whole.clone();
    report.configs.clear();
    assert_eq!(gate.violations(&report).len(), 2);
    Ok(())
}

#[test]
fn a_passage_that_fails_half_way_has_counted_nothing() -> Result<()> {
    let mut recorder = recorder()?;
    let broken = Chain::new(LAYERS, Some(1));
    for passages in 0..2 {
        let before = serde_json::to_string(&recorder)?;
        let other = Chain::new(LAYERS + 1, None);
        assert!(recorder.record(&broken, &7, &words(), 7).is_err());
        assert!(passages == 0 || recorder.record(&other, &7, &words(), 7).is_err());
        assert_eq!(serde_json::to_string(&recorder)?, before);
        recorder.record(&sound(), &7, &words(), passages)?;
        assert_eq!(recorder.passages(), passages + 1);
    }
    let error = recorder.record(&Chain::new(0, None), &1, &words(), 1).unwrap_err();
    assert!(error.to_string().contains("no layers"), "{error}");
    Ok(())
}

/// Attends to one key less with every call.
struct Shrinking(Chain, AtomicUsize);

impl LayeredModel for Shrinking {
    type Input = usize;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.0.attention()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.0.attention_mut()
    }

    fn embed(&self, seed: &usize) -> Result<Tensor, Error> {
        self.0.embed(seed)
    }

    fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        attend: &mut Attend<'_>,
    ) -> Result<Tensor, Error> {
        let keys = TOKENS - self.1.fetch_add(1, Ordering::Relaxed);
        self.0.layer(index, hidden, &mut |q, k, v, call| {
            attend(q, &k.narrow(2, 0, keys)?, &v.narrow(2, 0, keys)?, call)
        })
    }
}

#[test]
fn a_model_that_calls_attention_otherwise_in_int8_is_an_error() -> Result<()> {
    let model = Shrinking(sound(), AtomicUsize::new(0));
    let mut recorder = recorder()?;
    let error = recorder.record(&model, &1, &words(), 1).unwrap_err();
    assert!(matches!(error, Error::Mismatch(_)), "{error}");
    assert!(
        error.to_string().contains("keys: 11") && error.to_string().contains("keys: 12"),
        "{error}"
    );
    Ok(())
}
