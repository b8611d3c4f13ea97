//! Heads that classify sequences, and pairs of texts as one sequence.

use super::*;
use candle_int8_attention::models::SequenceClassifier;

/// A folder with a model of its own that the tests with real weights need.
const CROSS_ENCODER: &str = "CANDLE_INT8_TEST_CROSS_ENCODER";

fn classifier(tiny: &TinyEncoder) -> Result<SequenceClassifier, Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let files = tiny.write(folder.path()).expect("files");
    SequenceClassifier::load(&files, &CPU)
}

fn tiny(family: &'static str, labels: usize) -> TinyEncoder {
    TinyEncoder::new(family, TinyEncoder::own_prefix(family)).with_head(labels)
}

const PAIRS: [(&str, &str); 2] = [("the sea is wide", "a storm"), ("far", "the calm sea comes")];

/// `x·W^T + b` with a layer of these names.
fn linear(tiny: &TinyEncoder, x: &Tensor, name: &str) -> TestResult<Tensor> {
    let y = x.matmul(&tiny.tensors[&format!("{name}.weight")].t()?)?;
    Ok(match tiny.tensors.get(&format!("{name}.bias")) {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    })
}

#[test]
fn logits_are_those_of_each_family_s_head() -> TestResult {
    for family in FAMILIES {
        let tiny = tiny(family, 3);
        let found = classifier(&tiny)?;
        assert_eq!(found.labels(), ["label 0", "label 1", "label 2"]);
        let batch = found.tokenize_pairs(&PAIRS)?;
        let types = (family == "bert").then_some(&batch.token_type_ids);
        let hidden = found.model.forward(&batch.input_ids, types, Some(&batch.attention_mask))?;
        let first = hidden.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
        let expected = match family {
            "bert" => {
                linear(&tiny, &linear(&tiny, &first, "bert.pooler.dense")?.tanh()?, "classifier")?
            }
            "roberta" => {
                let x = linear(&tiny, &first, "classifier.dense")?.tanh()?;
                linear(&tiny, &x, "classifier.out_proj")?
            }
            "distilbert" => {
                linear(&tiny, &linear(&tiny, &first, "pre_classifier")?.relu()?, "classifier")?
            }
            _ => {
                let x = linear(&tiny, &first, "head.dense")?.gelu_erf()?;
                let weight = &tiny.tensors["head.norm.weight"];
                let x = candle_nn::ops::layer_norm_slow(&x, weight, &weight.zeros_like()?, 1e-5)?;
                linear(&tiny, &x, "classifier")?
            }
        };
        let difference = largest_difference(&found.logits(&batch)?, &expected);
        assert!(difference < ROUNDING, "{family}: {difference}");
        assert_eq!(largest_difference(&found.scores(&batch)?, &found.logits(&batch)?), 0.0);
        // Each pair alone.
        for (i, pair) in PAIRS.iter().enumerate() {
            let alone = found.logits(&found.tokenize_pairs(&[*pair])?)?;
            let difference = largest_difference(&alone, &expected.narrow(0, i, 1)?);
            assert!(difference < ROUNDING, "{family} {i}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn modernbert_s_head_reads_the_mean_where_it_is_said() -> TestResult {
    let mut tiny = tiny("modernbert", 2);
    tiny.config["classifier_pooling"] = json!("mean");
    let found = classifier(&tiny)?;
    let batch = found.tokenize(&["the sea", "a ship sails far"])?;
    let hidden = found.model.forward(&batch.input_ids, None, Some(&batch.attention_mask))?;
    // The second text is the longer one: nothing of it is padding.
    let mean = hidden.get(1)?.mean_keepdim(0)?;
    let x = linear(&tiny, &mean, "head.dense")?.gelu_erf()?;
    let weight = &tiny.tensors["head.norm.weight"];
    let x = candle_nn::ops::layer_norm_slow(&x, weight, &weight.zeros_like()?, 1e-5)?;
    let expected = linear(&tiny, &x, "classifier")?;
    let difference = largest_difference(&found.logits(&batch)?.narrow(0, 1, 1)?, &expected);
    assert!(difference < ROUNDING, "{difference}");
    tiny.config["classifier_pooling"] = json!("max");
    let error = classifier(&tiny).err().ok_or("loaded")?.to_string();
    assert!(error.contains("classifier_pooling \"max\", expected \"cls\" or \"mean\""), "{error}");
    Ok(())
}

#[test]
fn pairs_are_one_sequence_with_types_where_the_family_has_them() -> TestResult {
    let bert = classifier(&tiny("bert", 1))?;
    let batch = bert.tokenize_pairs(&PAIRS)?;
    let expected = ["[CLS]", "the", "sea", "is", "wide", "[SEP]", "a", "storm", "[SEP]"];
    assert_eq!(batch.tokens[0], expected);
    let types = batch.token_type_ids.to_vec2::<u32>()?;
    assert_eq!(types, [[0, 0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 0]]);
    assert_eq!(batch.attention_mask.get(1)?.to_vec1::<u32>()?, [1, 1, 1, 1, 1, 1, 1, 1, 0]);
    // The types are seen: the same ids without them give other logits.
    let types = batch.token_type_ids.clone();
    let other = {
        let mut batch = batch.clone();
        batch.token_type_ids = types.zeros_like()?;
        bert.logits(&batch)?
    };
    assert!(largest_difference(&bert.logits(&batch)?, &other) > 1e-3);

    let roberta = classifier(&tiny("roberta", 1))?;
    let batch = roberta.tokenize_pairs(&[("far", "sea")])?;
    assert_eq!(batch.tokens[0], ["<s>", "far", "</s>", "</s>", "sea", "</s>"]);
    Ok(())
}

#[test]
fn of_a_pair_that_is_too_long_the_longer_text_is_cut_first() -> TestResult {
    let bert = classifier(&tiny("bert", 1))?;
    let long = "sea ".repeat(40);
    let batch = bert.tokenize_pairs(&[("the ship", long.as_str()), (&long, &long)])?;
    assert_eq!(batch.input_ids.dims(), [2, TOKENS]);
    // 24 = 3 special + 2 + 19, and 3 + 10 + 11.
    assert_eq!(batch.truncated, [21, 59]);
    assert_eq!(batch.tokens[0][..4], ["[CLS]", "the", "ship", "[SEP]"]);
    let second = batch.token_type_ids.sum(1)?.to_vec1::<u32>()?;
    assert_eq!(second, [20, 12]);
    Ok(())
}

#[test]
fn scores_go_through_a_sigmoid_where_sentence_transformers_has_one() -> TestResult {
    let mut tiny = tiny("bert", 1);
    let identity = "torch.nn.modules.linear.Identity";
    for (key, value, sigmoid) in [
        ("unused", json!(null), true),
        ("sentence_transformers", json!({"activation_fn": identity}), false),
        ("sentence_transformers", json!({"version": "4.1.0"}), true),
        ("sbert_ce_default_activation_function", json!(identity), false),
    ] {
        let config = tiny.config.as_object_mut().ok_or("an object")?;
        config.remove("sentence_transformers");
        config.insert(key.into(), value);
        let found = classifier(&tiny)?;
        let batch = found.tokenize_pairs(&PAIRS)?;
        let (logits, scores) = (found.logits(&batch)?, found.scores(&batch)?);
        let expected = if sigmoid { candle_nn::ops::sigmoid(&logits)? } else { logits };
        assert_eq!(largest_difference(&scores, &expected), 0.0, "{key}");
    }
    tiny.config["sbert_ce_default_activation_function"] = json!("torch.nn.Softplus");
    let error = classifier(&tiny).err().ok_or("loaded")?.to_string();
    assert!(error.contains("\"torch.nn.Softplus\", expected Identity or Sigmoid"), "{error}");
    Ok(())
}

#[test]
fn a_head_that_does_not_fit_or_is_not_there_is_named() -> TestResult {
    for family in FAMILIES {
        let plain = TinyEncoder::new(family, TinyEncoder::own_prefix(family));
        let error = classifier(&plain).err().ok_or("loaded")?;
        assert!(matches!(error, Error::MissingTensor { .. }), "{family}: {error:?}");
        let mut tiny = tiny(family, 2);
        tiny.config["id2label"] = json!({"0": "a", "1": "b", "2": "c"});
        let error = classifier(&tiny).err().ok_or("loaded")?;
        assert!(matches!(error, Error::ModelShape { .. }), "{family}: {error:?}");
        assert!(error.to_string().contains("[2, 16]") && error.to_string().contains("[3, 16]"));
        // As an encoder of texts it says that the head is not used.
        let folder = tempfile::tempdir()?;
        let encoder = TextEncoder::load_in(&tiny.write(folder.path())?, &CPU, Precision::F32)?;
        assert!(encoder.warnings()[0].contains("classifier.*"), "{:?}", encoder.warnings());
    }
    Ok(())
}

/// The values that the authors of cross-encoder/ms-marco-MiniLM-L6-v2 publish with it.
#[test]
fn a_real_cross_encoder_gives_its_published_scores() -> TestResult {
    let Some(folder) = std::env::var_os(CROSS_ENCODER) else {
        eprintln!("NOT RUN: a real cross-encoder ({CROSS_ENCODER} names no folder)");
        return Ok(());
    };
    let mut model = SequenceClassifier::load(&ModelFiles::from_dir(&folder)?, &CPU)?;
    let query = "How many people live in Berlin?";
    let population = "Berlin had a population of 3,520,031 registered inhabitants in an area of \
                      891.82 square kilometers.";
    let batch = model
        .tokenize_pairs(&[(query, population), (query, "Berlin is well known for its museums.")])?;
    let published = [8.607138, -4.320078];
    for (attention, tolerance) in [(AttentionConfig::fp32(), 1e-4), (AttentionConfig::int8(), 0.1)]
    {
        model.model.set_attention(&attention);
        let logits = model.logits(&batch)?.flatten_all()?.to_vec1::<f32>()?;
        eprintln!("RUN: a real cross-encoder: {logits:?}");
        for (found, expected) in logits.iter().zip(published) {
            assert!((f64::from(*found) - expected).abs() < tolerance, "{found}, not {expected}");
        }
    }
    Ok(())
}
