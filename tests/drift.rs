//! The recorder on models with planted faults, split over recorders, and on bad input.

mod common;

use candle_core::{Device, Tensor};
use candle_int8_attention::drift::{Candidate, Cause, Gate, Recorder, Report};
use candle_int8_attention::models::{Attend, LayeredModel, WordEmbeddings};
use candle_int8_attention::{AttentionCall, QuantizedAttention, Result};
use common::json::assert_same;
use serde_json::Value;
use std::sync::LazyLock;

const LAYERS: usize = 4;
const HEADS: usize = 4;
const TOKENS: usize = 48;
const DEPTH: usize = 16;

/// Normally distributed numbers, the same for the same seed.
struct Normal(u64);

impl Normal {
    /// A uniform number from SplitMix64.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The sum of twelve uniform numbers has variance 1.
    fn next(&mut self) -> f32 {
        ((0..12).map(|_| self.uniform()).sum::<f64>() - 6.0) as f32
    }
}

/// Queries, keys and values of a layer, `[head][token][channel]` flat.
struct Qkv([Vec<f32>; 3]);

impl Qkv {
    fn normal(seed: u64) -> Self {
        let mut numbers = Normal(seed);
        let mut matrix = || (0..HEADS * TOKENS * DEPTH).map(|_| numbers.next()).collect();
        Self([matrix(), matrix(), matrix()])
    }

    fn row(&mut self, which: usize, head: usize, token: usize) -> &mut [f32] {
        &mut self.0[which][(head * TOKENS + token) * DEPTH..][..DEPTH]
    }
}

const Q: usize = 0;
const K: usize = 1;

/// A model that ignores its hidden state: its queries, keys and values follow from the input's
/// seed, with or without faults.
struct Planted {
    attention: [QuantizedAttention; LAYERS],
    faults: bool,
    calls: usize,
}

static SOUND: LazyLock<Planted> = LazyLock::new(|| Planted::new(false, 1));
static FAULTY: LazyLock<Planted> = LazyLock::new(|| Planted::new(true, 1));

impl Planted {
    fn new(faults: bool, calls: usize) -> Self {
        Self { attention: Default::default(), faults, calls }
    }

    fn qkv(&self, layer: usize, seed: u64) -> Qkv {
        let mut qkv = Qkv::normal(seed * 100 + layer as u64);
        if !self.faults {
            return qkv;
        }
        for token in 0..TOKENS {
            match layer {
                // An attention sink: all queries have something in common with key 0.
                0 => qkv.row(Q, 3, token).iter_mut().for_each(|x| *x += 0.8),
                // A key channel with a large bias.
                1 => qkv.row(K, 2, token)[5] += 20.0,
                // A head with near-uniform attention.
                3 => qkv.row(Q, 1, token).iter_mut().for_each(|x| *x *= 0.02),
                _ => {}
            }
        }
        match layer {
            0 => qkv.row(K, 3, 0).fill(3.0),
            // One outlier token.
            2 => qkv.row(K, 0, 17).iter_mut().for_each(|x| *x *= 12.0),
            _ => {}
        }
        qkv
    }
}

impl LayeredModel for Planted {
    type Input = u64;

    fn attention(&self) -> Vec<&QuantizedAttention> {
        self.attention.iter().collect()
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        self.attention.iter_mut().collect()
    }

    /// The seed rides along in the first number of every row.
    fn embed(&self, seed: &u64) -> Result<Tensor> {
        Ok(Tensor::full(*seed as f32, (1, TOKENS, HEADS * DEPTH), &Device::Cpu)?)
    }

    fn layer(&self, index: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let seed = hidden.get(0)?.get(0)?.get(0)?.to_scalar::<f32>()?.round() as u64;
        let shape = (1, HEADS, TOKENS, DEPTH);
        let Qkv([q, k, v]) = self.qkv(index, seed);
        let tensor = |data: Vec<f32>| Tensor::from_vec(data, shape, &Device::Cpu);
        let (q, k, v) = (tensor(q)?, tensor(k)?, tensor(v)?);
        let mut out = v.zeros_like()?;
        for _ in 0..self.calls {
            out = attend(&q, &k, &v, &AttentionCall::default())?;
        }
        let out = out.transpose(1, 2)?.reshape((1, TOKENS, HEADS * DEPTH))?;
        Ok((hidden + (out * 1e-3)?)?)
    }
}

fn words() -> Vec<String> {
    (0..TOKENS).map(|i| format!(" w{i}")).collect()
}

fn recorder() -> Recorder {
    Recorder::new(vec![Candidate::default(), "token".parse().unwrap()]).unwrap()
}

fn record(model: &Planted, seeds: &[u64]) -> Recorder {
    let mut recorder = recorder();
    for &seed in seeds {
        recorder.record(model, &seed, &words(), seed).unwrap();
    }
    recorder
}

/// Everything but the times, which differ from run to run.
fn figures(report: &Report) -> Value {
    let mut json = serde_json::to_value(report).unwrap();
    for config in json["configs"].as_array_mut().unwrap() {
        config.as_object_mut().unwrap().remove("timing");
    }
    json
}

#[test]
fn planted_faults_are_found_where_they_are() {
    let report = record(&FAULTY, &[1, 2, 3]).report();
    for (cause, layer, head, text) in [
        (Cause::AttentionSink, 0, 3, "token 0 \"w0\""),
        (Cause::KeyChannelBias, 1, 2, "channel 5 of the keys"),
        (Cause::OutlierKey, 2, 0, "token 17 \"w17\""),
        (Cause::NearUniform, 3, 1, "nearly uniform"),
    ] {
        let found: Vec<_> = report.findings.iter().filter(|f| f.cause == cause).collect();
        let [finding] = found[..] else { panic!("{cause:?}: {found:?}") };
        assert_eq!((finding.layer, finding.head), (layer, head), "{finding:?}");
        assert!(finding.text.contains(text), "{finding:?}");
        assert!(report.to_text().contains(text), "the terminal does not say {text:?}");
        assert!(report.to_html().unwrap().contains(&text.replace('"', "&quot;")), "{text}");
    }
    assert_eq!(report.findings.len(), 4, "{:?}", report.findings);
}

#[test]
fn a_sound_model_has_nothing_unusual() {
    let report = record(&SOUND, &[1, 2]).report();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert!(report.to_text().contains("No head has biased channels"));
}

#[test]
fn the_biased_head_is_the_worst_without_smoothing_and_smoothing_heals_it() {
    let report = record(&FAULTY, &[1, 2]).report();
    let config = |name: &str| report.configs.iter().find(|c| c.name == name).unwrap();
    let (smooth, plain) = (config("default"), config("token"));
    let worst = plain.output.worst_head;
    assert_eq!((worst.layer, worst.head), (1, 2));
    let healed = smooth.layers[1].heads[2].alone.output.sqnr_db.mean;
    assert!(healed > worst.value + 10.0, "{healed} with smoothing, {} without", worst.value);
    let [first, second] = &report.configs[..] else { panic!("two configurations") };
    assert!(first.output.mean_sqnr_db > second.output.mean_sqnr_db, "the better one comes first");

    let gain = report.layers[1].heads[2].k.smoothing_gain_db;
    assert!(gain > 10.0, "{gain}");
    let gain = report.layers[2].heads[3].k.smoothing_gain_db;
    assert!(gain.abs() < 1.0, "{gain}");
}

#[test]
fn shares_and_stages_are_those_of_the_error() {
    let report = record(&SOUND, &[1]).report();
    let main = report.main().unwrap();
    for head in main.layers.iter().flat_map(|layer| &layer.heads) {
        let shares = head.shares.unwrap();
        let sum = shares.q + shares.k + shares.requantization + shares.pv;
        assert!((sum - 1.0).abs() < 1e-9 && shares.requantization == 0.0, "{shares:?}");
        assert!(shares.q > 0.2 && shares.k > 0.2, "{shares:?}");
        assert_eq!((head.q_clipped, head.k_clipped), (0.0, 0.0));
        for stage in [&head.alone.q, &head.alone.k, &head.alone.scores, &head.alone.output] {
            assert!(stage.sqnr_db.mean > 30.0 && stage.cosine.min > 0.999, "{stage:?}");
        }
    }
    let config = "token+requantized:tensor+f32".parse().unwrap();
    let mut recorder = Recorder::new(vec![config]).unwrap();
    recorder.record(&*SOUND, &1, &words(), 0).unwrap();
    let shares = recorder.report().configs[0].layers[0].heads[0].shares.unwrap();
    assert!(shares.requantization > 0.5 && shares.pv == 0.0, "{shares:?}");
}

#[test]
fn errors_add_up_over_layers() {
    let report = record(&SOUND, &[1]).report();
    let layers = &report.main().unwrap().layers;
    let alone = |i: usize| layers[i].output_alone.sqnr_db.mean;
    let accumulated = |i: usize| layers[i].output_accumulated.sqnr_db.mean;
    assert_eq!(alone(0), accumulated(0));
    // Four errors of one size: 6 dB.
    let lost = alone(3) - accumulated(3);
    assert!((3.0..9.0).contains(&lost), "{lost}");
}

#[test]
fn merged_recorders_give_the_figures_of_one_in_any_order() {
    let whole = figures(&record(&FAULTY, &[1, 2, 3, 4, 5]).report());
    let parts = [&[2, 5][..], &[1, 4], &[3]];
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let mut merged: Option<Recorder> = None;
        for part in order {
            let json = serde_json::to_string(&record(&FAULTY, parts[part])).unwrap();
            let read: Recorder = serde_json::from_str(&json).unwrap();
            match &mut merged {
                None => merged = Some(read),
                Some(merged) => merged.merge(&read).unwrap(),
            }
        }
        assert_same(&figures(&merged.unwrap().report()), &whole);
    }
    // A part without any passage changes nothing, on either side.
    let mut empty = recorder();
    empty.merge(&record(&FAULTY, &[1, 2, 3, 4, 5])).unwrap();
    empty.merge(&recorder()).unwrap();
    assert_same(&figures(&empty.report()), &whole);
}

#[test]
fn what_was_recorded_differently_is_not_merged() {
    let mut sound = record(&SOUND, &[1]);
    let other = Recorder::new(vec![Candidate::sage()]).unwrap();
    let error = sound.merge(&other).unwrap_err().to_string();
    assert!(error.contains("different configurations") && error.contains("Sage"), "{error}");
    assert!(Recorder::new(Vec::new()).is_err());
}

#[test]
fn a_gate_names_the_layer_the_head_and_the_value() {
    let report = record(&FAULTY, &[1]).report();
    let holds = Gate::from_toml("min_head_sqnr_db = 20\nmax_head_kl = 0.1").unwrap();
    assert_eq!(holds.violations(&report), []);
    let worst = report.main().unwrap().output.worst_head;
    let gate = Gate { min_head_sqnr_db: Some(worst.value + 1e-6), ..Gate::default() };
    let [violation] = &gate.violations(&report)[..] else { panic!("one head expected") };
    assert_eq!((violation.layer, violation.head), (Some(worst.layer), Some(worst.head)));
    let text = violation.to_string();
    assert!(text.contains(&format!("layer {} head {}", worst.layer, worst.head)), "{text}");
    assert!(text.contains(&format!("{:.6}", worst.value)), "{text}");

    let all = Gate::from_toml(
        "min_layer_sqnr_db = 999\nmin_head_cosine = 2\nmax_head_kl = -1\nmin_head_top1 = 2\n\
         min_head_top5 = 2\nmin_accumulated_sqnr_db = 999\nmin_embedding_cosine = 2\n",
    );
    let heads = LAYERS * HEADS;
    assert_eq!(all.unwrap().violations(&report).len(), 4 * heads + 2 * LAYERS + 1);
}

#[test]
fn bad_models_and_inputs_are_errors() {
    let fails = |model: &Planted, words: &[String], expected: &str| {
        let error = recorder().record(model, &1, words, 0).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    fails(&Planted::new(false, 0), &words(), "called attention 0 times");
    fails(&Planted::new(false, 2), &words(), "called attention 2 times");
    fails(&SOUND, &words()[1..], "[1, 47, hidden]");

    let json = serde_json::to_string(&recorder()).unwrap();
    let mut read: Recorder = serde_json::from_str(&json).unwrap();
    let error = read.record(&*SOUND, &1, &words(), 0).unwrap_err().to_string();
    assert!(error.contains("read back"), "{error}");
}

/// Queries with NaN in them.
#[derive(Default)]
struct Broken {
    attention: QuantizedAttention,
}

impl LayeredModel for Broken {
    type Input = ();

    fn attention(&self) -> Vec<&QuantizedAttention> {
        vec![&self.attention]
    }

    fn attention_mut(&mut self) -> Vec<&mut QuantizedAttention> {
        vec![&mut self.attention]
    }

    fn embed(&self, (): &()) -> Result<Tensor> {
        Ok(Tensor::full(f32::NAN, (1, 8, 4), &Device::Cpu)?)
    }

    fn layer(&self, _: usize, hidden: &Tensor, attend: &mut Attend<'_>) -> Result<Tensor> {
        let x = hidden.unsqueeze(1)?;
        let out = attend(&x, &x, &x, &AttentionCall::default())?;
        Ok(out.squeeze(1)?)
    }
}

#[test]
fn nan_is_reported() {
    let words: Vec<String> = (0..8).map(|i| i.to_string()).collect();
    let error = recorder().record(&Broken::default(), &(), &words, 0).unwrap_err().to_string();
    assert!(error.contains("element 0 is NaN"), "{error}");
}

#[test]
fn a_head_that_gives_nan_is_the_worst_of_its_layer() {
    let mut report = record(&SOUND, &[1]).report();
    let main = report.configs.iter_mut().find(|config| config.main).unwrap();
    main.layers[1].heads[2].alone.output.sqnr_db.mean = f64::NAN;
    assert!(report.to_text().contains(" NaN (2) "), "{}", report.to_text());
}

#[test]
fn word_embeddings_are_recorded_as_they_are() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/glove-6b-50d-top20k");
    let model = WordEmbeddings::load(folder, &Device::Cpu).unwrap();
    let text = "a single man in possession of a good fortune must be in want of a wife";
    let (ids, words): (Vec<u32>, Vec<String>) = model
        .tokenize(text)
        .into_iter()
        .filter_map(|w| Some((w.id?, format!(" {}", w.text))))
        .unzip();
    let mut recorder = recorder();
    let embeddings = recorder.record(&model, ids.as_slice(), &words, 0).unwrap();
    assert_eq!(embeddings.fp32.len(), 50);
    let report = recorder.report();
    assert!(report.main().unwrap().output.mean_sqnr_db > 30.0);
    assert_eq!(report.sentences[0].text, text);
}

#[test]
fn bf16_is_explained_as_int8_is_but_not_timed() {
    let mut recorder = Recorder::new(vec![Candidate::bf16(), Candidate::default()]).unwrap();
    recorder.record(&*SOUND, &1, &words(), 1).unwrap();
    let report = recorder.report();
    let main = report.main().unwrap();
    assert_eq!((main.name.as_str(), main.timing.is_none()), ("bf16", true));
    for head in main.layers.iter().flat_map(|layer| &layer.heads) {
        let shares = head.shares.unwrap();
        assert_eq!(shares.requantization, 0.0);
        assert!([shares.q, shares.k, shares.pv].into_iter().all(|share| share > 0.0), "{shares:?}");
        assert!(head.alone.output.sqnr_db.mean > 45.0, "{}", head.alone.output.sqnr_db.mean);
    }
    let timed = report.configs.iter().filter(|config| config.timing.is_some());
    assert_eq!(timed.map(|config| config.name.as_str()).collect::<Vec<_>>(), ["default"]);
    assert!(report.to_html().unwrap().contains(">bf16</td>"));
    let json = serde_json::to_string(&recorder).unwrap();
    assert!(serde_json::from_str::<Recorder>(&json).is_ok(), "what was not timed can be read back");
}
