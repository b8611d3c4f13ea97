//! The encoders beside those of candle-transformers, on the same small random weights.
//!
//! BERT alone is compared in `candle_transformers`, on real weights too. Where candle-transformers
//! differs from Hugging Face, the library's own tests (`tests/encoders.rs`) compare with the definition:
//! it has no RoBERTa, whose embeddings and layers are those of its XLM-RoBERTa; its DistilBERT
//! computes GELU by the tanh approximation, so the activation here is ReLU; its ModernBERT classifier
//! ends in a softmax, where Hugging Face gives logits; it has no classifier with BERT or DistilBERT.

// Of the tests of the library, with which this package shares no crate.
#[path = "../../tests/common/numbers.rs"]
mod numbers;
#[path = "../../tests/common/tiny_encoders.rs"]
#[allow(dead_code, reason = "its other users need the rest of it")]
mod tiny_encoders;

use candle_core::{D, DType, Device, Tensor};
use candle_int8_attention::models::{EncoderModel, SequenceClassifier};
use candle_nn::VarBuilder;
use candle_transformers::models::{bert, distilbert, modernbert, xlm_roberta};
use numbers::{largest, largest_difference};
use serde::de::DeserializeOwned;
use serde_json::json;
use tiny_encoders::{TinyEncoder, VOCAB};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;
/// Both compute the same in f32, and round it differently.
const ROUNDING: f64 = 1e-5;

fn reference<T: DeserializeOwned>(tiny: &TinyEncoder) -> Result<(T, VarBuilder<'static>)> {
    let vb = VarBuilder::from_tensors(tiny.tensors.clone(), DType::F32, &CPU);
    Ok((serde_json::from_value(tiny.config.clone())?, vb))
}

fn ours(tiny: &TinyEncoder) -> Result<EncoderModel> {
    let folder = tempfile::tempdir()?;
    Ok(EncoderModel::load(&tiny.write(folder.path())?, &CPU)?)
}

fn classifier(tiny: &TinyEncoder) -> Result<SequenceClassifier> {
    let folder = tempfile::tempdir()?;
    Ok(SequenceClassifier::load(&tiny.write(folder.path())?, &CPU)?)
}

/// Two sequences, the second with padding behind its first 11 tokens; ids, and a mask.
fn batch(pad: u32) -> Result<(Tensor, Tensor)> {
    let id = |(row, i): (usize, usize)| match row == 0 || i < 11 {
        true => (4 + (i * 7 + row * 3) % (VOCAB - 4)) as u32,
        false => pad,
    };
    let places = || (0..2).flat_map(|row| (0..20).map(move |i| (row, i)));
    let ids = Tensor::from_iter(places().map(id), &CPU)?.reshape((2, 20))?;
    let mask = Tensor::from_iter(places().map(|(row, i)| u32::from(row == 0 || i < 11)), &CPU)?;
    Ok((ids, mask.reshape((2, 20))?))
}

/// Of the states `[B, N, hidden]` of tokens, padding left out.
fn assert_same(ours: &Tensor, theirs: &Tensor, mask: &Tensor) -> Result {
    let tokens = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
    let (ours, theirs) = (ours.broadcast_mul(&tokens)?, theirs.broadcast_mul(&tokens)?);
    let difference = largest_difference(&ours, &theirs);
    assert!(difference < ROUNDING, "{difference}");
    assert!(largest(&ours) > 0.5, "not all zeros");
    Ok(())
}

#[test]
fn bert_with_token_types() -> Result {
    let tiny = TinyEncoder::new("bert", "bert.");
    let (config, vb) = reference::<bert::Config>(&tiny)?;
    let (ids, mask) = batch(0)?;
    let types = (&mask * ids.ge(9u32)?.to_dtype(DType::U32)?)?;
    let theirs = bert::BertModel::load(vb, &config)?.forward(&ids, &types, Some(&mask))?;
    assert_same(&ours(&tiny)?.forward(&ids, Some(&types), Some(&mask))?, &theirs, &mask)
}

#[test]
fn roberta_and_xlm_roberta() -> Result {
    let (ids, mask) = batch(1)?;
    for model_type in ["roberta", "xlm-roberta"] {
        let mut tiny = TinyEncoder::new("roberta", "roberta.");
        tiny.config["model_type"] = json!(model_type);
        let (config, vb) = reference::<xlm_roberta::Config>(&tiny)?;
        let model = xlm_roberta::XLMRobertaModel::new(&config, vb.pp("roberta"))?;
        let types = ids.zeros_like()?;
        let theirs = model.forward(&ids, &mask, &types, None, None, None)?;
        assert_same(&ours(&tiny)?.forward(&ids, None, Some(&mask))?, &theirs, &mask)?;
    }
    Ok(())
}

#[test]
fn distilbert_with_relu() -> Result {
    let mut tiny = TinyEncoder::new("distilbert", "distilbert.");
    tiny.config["activation"] = json!("relu");
    let (config, vb) = reference::<distilbert::Config>(&tiny)?;
    let (ids, mask) = batch(0)?;
    let hidden = mask.eq(0u32)?.reshape((2, 1, 1, 20))?;
    let theirs = distilbert::DistilBertModel::load(vb, &config)?.forward(&ids, &hidden)?;
    assert_same(&ours(&tiny)?.forward(&ids, None, Some(&mask))?, &theirs, &mask)
}

#[test]
fn modernbert_with_local_and_global_layers() -> Result {
    let tiny = TinyEncoder::new("modernbert", "model.").with_head(2);
    let (config, vb) = reference::<modernbert::Config>(&tiny)?;
    let (ids, mask) = batch(0)?;
    let theirs = modernbert::ModernBert::load(vb, &config)?.forward(&ids, &mask)?;
    assert_same(&ours(&tiny)?.forward(&ids, None, Some(&mask))?, &theirs, &mask)
}

const TEXTS: [&str; 2] = ["the sea is wide", "a ship sails far and the storm comes"];

#[test]
fn the_classifier_of_roberta() -> Result {
    let tiny = TinyEncoder::new("roberta", "roberta.").with_head(3);
    let (config, vb) = reference::<xlm_roberta::Config>(&tiny)?;
    let reference = xlm_roberta::XLMRobertaForSequenceClassification::new(3, &config, vb)?;
    let ours = classifier(&tiny)?;
    let batch = ours.tokenize_pairs(&[(TEXTS[0], TEXTS[1]), (TEXTS[1], "calm")])?;
    let types = batch.input_ids.zeros_like()?;
    let theirs = reference.forward(&batch.input_ids, &batch.attention_mask, &types)?;
    let difference = largest_difference(&ours.logits(&batch)?, &theirs);
    assert!(difference < ROUNDING, "{difference}");
    Ok(())
}

#[test]
fn the_classifier_of_modernbert_by_either_pooling() -> Result {
    for pooling in ["cls", "mean"] {
        let mut tiny = TinyEncoder::new("modernbert", "model.").with_head(3);
        tiny.config["classifier_pooling"] = json!(pooling);
        let (config, vb) = reference::<modernbert::Config>(&tiny)?;
        let reference = modernbert::ModernBertForSequenceClassification::load(vb, &config)?;
        let ours = classifier(&tiny)?;
        let batch = ours.tokenize(&TEXTS)?;
        let theirs = reference.forward(&batch.input_ids, &batch.attention_mask)?;
        let ours = candle_nn::ops::softmax(&ours.logits(&batch)?, D::Minus1)?;
        let difference = largest_difference(&ours, &theirs);
        assert!(difference < ROUNDING, "{pooling}: {difference}");
    }
    Ok(())
}
