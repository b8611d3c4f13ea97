//! Texts through an encoder: batches without padding, and the precision of its linear layers.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::drift::layers::{embedding_error, embeddings};
use candle_int8_attention::drift::linear::linear_errors;
use candle_int8_attention::drift::metrics::{cosine, lowest};
use candle_int8_attention::drift::search::{Budget, SearchConfig, search};
use candle_int8_attention::models::{
    BertModel, LayerSettings, LayeredModel, LinearSetting, ModelFiles, TextEncoder, mean_pool,
};
use candle_int8_attention::nn::Precision;
use candle_int8_attention::{AttentionConfig, Backend, Error, Int8Config};
use common::largest_difference;
use common::tiny_bert::tiny_folder;
use std::path::Path;

type TestResult = Result<(), Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Int16, Precision::Int8];

fn shipped() -> Result<TextEncoder, Error> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/paraphrase-MiniLM-L3-v2");
    TextEncoder::load_in(&ModelFiles::from_dir(folder)?, &CPU, Precision::F32)
}

/// Of one word to more than the model reads, with nothing in between.
fn texts() -> Vec<String> {
    let sentence = "It is a truth universally acknowledged, that a single man in possession of a \
                    good fortune, must be in want of a wife. ";
    let mut texts: Vec<String> =
        ["Short.", "", "A cat sleeps on the warm stove."].map(str::to_string).to_vec();
    texts.extend([1, 3, 20, 2].map(|times| sentence.repeat(times)));
    texts
}

fn vectors(encoder: &TextEncoder, texts: &[String]) -> Result<Vec<Vec<f32>>, Error> {
    encoder.embed(texts).map(|embedding| Ok(embedding?.vector)).collect()
}

#[test]
fn a_text_has_the_same_bits_alone_and_in_any_batch() -> TestResult {
    let (mut encoder, texts) = (shipped()?, texts());
    for precision in PRECISIONS {
        encoder.set_precision(precision)?;
        let together = vectors(&encoder, &texts)?;
        let reversed: Vec<String> = texts.iter().rev().cloned().collect();
        let mut backwards = vectors(&encoder, &reversed)?;
        backwards.reverse();
        assert!(together == backwards, "{precision:?}");
        for (text, together) in texts.iter().zip(&together) {
            let alone = vectors(&encoder, std::slice::from_ref(text))?;
            assert!(alone[0] == *together, "{precision:?}: {text:?}");
        }
    }
    Ok(())
}

/// More texts than a batch holds come in their order, with what is known of each, and are taken only as
/// far as they are needed.
#[test]
fn any_number_of_texts_keeps_its_order() -> TestResult {
    let encoder = shipped()?;
    let text = |i: usize| if i == 250 { "much ".repeat(600) } else { format!("text number {i}") };
    let mut taken = 0;
    let all = (0..500).map(|i| {
        taken += 1;
        text(i)
    });
    let embeddings = encoder.embed(all).collect::<Result<Vec<_>, _>>()?;
    assert_eq!((embeddings.len(), taken), (500, 500));
    for i in [0, 1, 249, 250, 251, 499] {
        let alone = encoder.embed([text(i)]).next().ok_or("an embedding")??;
        assert!(alone == embeddings[i], "{i}");
    }
    assert_eq!((embeddings[250].tokens, embeddings[250].truncated), (512, 90));
    assert!(embeddings[..250].iter().all(|e| (5..=8).contains(&e.tokens) && e.truncated == 0));

    let mut taken = 0;
    let endless = std::iter::repeat_with(|| {
        taken += 1;
        "more and more"
    });
    assert!(encoder.embed(endless).take(3).all(|embedding| embedding.is_ok()));
    assert!(taken < 2000, "{taken} texts were taken for 3");
    assert!(encoder.embed([""; 0]).next().is_none());
    Ok(())
}

/// Packed sequences against a padded batch with a mask, which is another way to the same numbers.
#[test]
fn packed_sequences_are_those_of_a_padded_batch() -> TestResult {
    let mut encoder = shipped()?;
    let texts = texts();
    let batch = encoder.tokenize(&texts)?;
    for attention in [AttentionConfig::fp32(), AttentionConfig::int8()] {
        encoder.model.set_attention(&attention);
        let hidden = encoder.model.forward(&batch.input_ids, None, Some(&batch.attention_mask))?;
        let padded = mean_pool(&hidden, &batch.attention_mask)?;
        let packed = encoder.embed_sentences(&texts)?;
        for (packed, padded) in packed.to_vec2::<f32>()?.iter().zip(padded.to_vec2::<f32>()?) {
            assert!(cosine(packed, &padded)? > 0.9999);
        }
    }
    Ok(())
}

/// Tokens from which attention is in int8.
const LONG: usize = 96;

/// Texts on both sides of that.
#[test]
fn short_and_long_texts_of_a_padded_batch_are_as_alone() -> TestResult {
    let (mut encoder, texts) = (shipped()?, texts());
    encoder.set_attention(Precision::Int8);
    let batch = encoder.tokenize(&texts)?;
    let (ids, mask) = (batch.input_ids.to_vec2::<u32>()?, batch.attention_mask.to_vec2::<u32>()?);
    let lens: Vec<_> = mask.iter().map(|mask| mask.iter().sum::<u32>() as usize).collect();
    assert!(lens.iter().any(|&len| len < LONG) && lens.iter().any(|&len| len >= LONG), "{lens:?}");
    let sequences: Vec<_> = ids.iter().zip(&lens).map(|(ids, &len)| &ids[..len]).collect();
    let packed = encoder.model.forward_sequences(&sequences)?;
    let hidden = encoder.model.forward(&batch.input_ids, None, Some(&batch.attention_mask))?;
    let int8 = {
        encoder.model.set_attention(&AttentionConfig::int8());
        encoder.model.forward_sequences(&sequences)?
    };
    encoder.model.set_attention(&AttentionConfig::fp32());
    let fp32 = encoder.model.forward_sequences(&sequences)?;
    for (i, len) in lens.into_iter().enumerate() {
        let padded = hidden.get(i)?.narrow(0, 0, len)?;
        assert_eq!(largest_difference(&padded, &packed[i]), 0.0, "{len}");
        let (same, other) = if len < LONG { (&fp32, &int8) } else { (&int8, &fp32) };
        assert_eq!(largest_difference(&packed[i], &same[i]), 0.0, "{len}");
        assert!(largest_difference(&packed[i], &other[i]) > 0.0, "{len}");
    }
    Ok(())
}

#[test]
fn sequences_of_ids_may_be_empty_and_not_too_long() -> TestResult {
    let (_folder, files) = tiny_folder("", DType::F32, |_| {})?;
    let model = BertModel::load(&files, &CPU)?;
    let sequences = [vec![1u32, 2, 3], vec![], vec![4], vec![5, 6, 7, 8, 9, 10, 1]];
    let hidden = model.forward_sequences(&sequences)?;
    for (ids, hidden) in sequences.iter().zip(&hidden) {
        assert_eq!(hidden.dims(), [ids.len(), 6]);
        if !ids.is_empty() {
            let ids = Tensor::new(ids.as_slice(), &CPU)?.unsqueeze(0)?;
            let alone = model.forward(&ids, None)?.squeeze(0)?;
            assert_eq!(largest_difference(hidden, &alone), 0.0);
        }
    }
    let none = model.forward_sequences(&[[0u32; 0], []])?;
    assert_eq!(none.iter().map(|x| x.dims().to_vec()).collect::<Vec<_>>(), [[0, 6], [0, 6]]);
    let error = model.forward_sequences(&[vec![0; 8]]).unwrap_err().to_string();
    assert!(error.contains("[1, 8], expected [B, N] with N <= 7"), "{error}");
    let error = model.forward_sequences(&[[11]]).unwrap_err().to_string();
    assert!(error.contains("input_ids holds 11, expected less than 11"), "{error}");
    Ok(())
}

/// Int16 from the weights of the file, near those in f32.
#[test]
fn an_encoder_is_in_int16_unless_it_is_told() -> TestResult {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/paraphrase-MiniLM-L3-v2");
    let (mut default, mut exact) =
        (TextEncoder::load(&ModelFiles::from_dir(folder)?, &CPU)?, shipped()?);
    let in_precision = |encoder: &mut TextEncoder, precision| {
        encoder.linear_mut().iter().all(|of| of.linear.precision() == precision)
    };
    assert!(in_precision(&mut default, Precision::Int16));
    assert!(in_precision(&mut exact, Precision::F32));
    assert!(default.attention().iter().all(|of| of.config().backend == Backend::Fp32));
    let texts = texts();
    let (found, reference) = (vectors(&default, &texts)?, vectors(&exact, &texts)?);
    let cosines = reference.iter().zip(&found).map(|(a, b)| cosine(a, b).unwrap());
    assert!(found != reference && lowest(cosines) > 0.99999);
    exact.set_precision(Precision::Int16)?;
    assert!(vectors(&exact, &texts)? == found, "the bits of an encoder that was switched");
    Ok(())
}

#[test]
fn linear_layers_in_integers_keep_the_embeddings() -> TestResult {
    let (mut encoder, texts) = (shipped()?, texts());
    let exact = vectors(&encoder, &texts)?;
    for (precision, least) in [(Precision::Int16, 0.99999), (Precision::Int8, 0.999)] {
        encoder.set_precision(precision)?;
        let found = vectors(&encoder, &texts)?;
        let smallest = lowest(exact.iter().zip(&found).map(|(a, b)| cosine(a, b).unwrap()));
        assert!(smallest >= least && exact != found, "{precision:?}: {smallest}");
    }
    Ok(())
}

/// Beside the nearest codes, on words that the weights were not rounded for.
#[test]
fn int8_weights_suit_what_the_model_makes_of_words() -> TestResult {
    let (mut suited, mut nearest, exact) = (shipped()?, shipped()?, shipped()?);
    suited.model.set_linear(Precision::Int8)?;
    for product in nearest.linear_mut() {
        *product.linear = product.linear.to_precision(Precision::Int8)?;
    }
    let novel = include_str!("../examples/data/pride-and-prejudice.txt");
    let lines: Vec<&str> = novel.lines().filter(|line| !line.is_empty()).collect();
    let texts: Vec<String> = lines.chunks(5).map(|lines| lines.join(" ")).collect();
    let error = |encoder: &TextEncoder| -> Result<f64, Error> {
        let (exact, found) = (vectors(&exact, &texts)?, vectors(encoder, &texts)?);
        Ok(exact.iter().zip(&found).map(|(a, b)| 1.0 - cosine(a, b).unwrap()).sum())
    };
    let (suited, nearest) = (error(&suited)?, error(&nearest)?);
    // Rows are rounded all the same.
    assert!(suited < 0.9 * nearest, "{suited} {nearest}");
    Ok(())
}

/// The model as it was afterwards, and errors that add up.
#[test]
fn the_cost_of_each_product_is_measured() -> TestResult {
    let mut encoder = shipped()?;
    let ids = encoder.tokenize(&["It is a truth universally acknowledged."])?.input_ids;
    let (passages, model) = ([ids], &mut encoder.model);
    let before = model.forward(&passages[0], None, None)?;
    let errors = linear_errors(model, &passages, Precision::Int8)?;
    let names: Vec<_> = errors.iter().map(|e| (e.layer, e.product.as_str())).collect();
    assert_eq!(names[..5], [(0, "qkv"), (0, "output"), (0, "up"), (0, "down"), (1, "qkv")]);
    assert_eq!(errors.len(), 12);
    assert!(errors.iter().all(|e| (30.0..90.0).contains(&e.alone.sqnr_db)), "{errors:?}");
    let (first, last) = (errors[0].accumulated, errors[11].accumulated);
    assert_eq!(first, errors[0].alone);
    assert!(last.min_cosine < first.min_cosine && last.min_cosine > 0.999, "{errors:?}");
    assert_eq!(largest_difference(&before, &model.forward(&passages[0], None, None)?), 0.0);

    // By hand: the second product of the second layer, as the whole model in int8 has it.
    let reference = embeddings(&*model, &passages)?;
    let mut int8 = shipped()?.model;
    int8.set_linear(Precision::Int8)?;
    std::mem::swap(model.linear_mut()[5].linear, int8.linear_mut()[5].linear);
    let alone = embedding_error(&reference, &embeddings(&*model, &passages)?)?.sqnr_db();
    assert!((alone - errors[5].alone.sqnr_db).abs() < 1e-9, "{alone} {:?}", errors[5]);
    Ok(())
}

/// The budget is kept, and the file that is written gives what was measured on unseen text.
#[test]
fn the_precision_of_linear_layers_is_searched_saved_and_applied() -> TestResult {
    let mut encoder = shipped()?;
    let passages =
        ["It is a truth universally acknowledged.", "A cat sleeps on the warm stove.", "It rains."]
            .map(|text| encoder.tokenize(&[text]).map(|batch| batch.input_ids));
    let passages = passages.into_iter().collect::<Result<Vec<_>, Error>>()?;
    let texts = (&passages[..2], &passages[2..]);
    let before = vectors(&encoder, &["It rains.".to_string()])?;
    let mut run = |db, linear: &[Precision]| {
        let config = SearchConfig {
            linear: linear.to_vec(),
            candidates: vec![Int8Config::default()],
            rounds: 1,
            ..SearchConfig::new(Budget::Embedding(db))
        };
        let found = search(&mut encoder, texts, &config, &mut |_| ())?;
        let after = vectors(&encoder, &["It rains.".to_string()])?;
        assert!(before == after, "the model is as it was");
        Ok::<_, Error>(found)
    };
    // Which of those that keep it is the fastest depends on the machine.
    let found = run(50.0, &[Precision::Int8, Precision::Int16])?;
    assert!(found.promised.embedding_sqnr_db >= 51.0, "{found:?}");
    let chosen: Vec<Precision> = found.linear.iter().map(|of| of.setting.precision).collect();
    assert_eq!(chosen.len(), 12);
    // What integers cannot hold is in f32.
    let exact = run(300.0, &[Precision::Int8])?;
    assert!(exact.linear.iter().all(|of| of.setting.precision == Precision::F32), "{exact:?}");

    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layers.json");
    found.settings()?.save(&path)?;
    let settings = LayerSettings::load(&path)?;
    let mut encoder = shipped()?;
    let reference = embeddings(&encoder, texts.1)?;
    settings.apply(&mut encoder)?;
    let precisions: Vec<_> = encoder.linear_mut().iter().map(|of| of.linear.precision()).collect();
    assert_eq!(precisions, chosen);
    let sqnr = embedding_error(&reference, &embeddings(&encoder, texts.1)?)?.sqnr_db();
    let verified = found.verified.embedding_sqnr_db;
    // Both are infinite where f32 was the fastest of all.
    assert!(sqnr == verified || (sqnr - verified).abs() < 1e-9, "{sqnr} {verified}");
    Ok(())
}

#[test]
fn settings_of_other_linear_layers_leave_the_model_as_it_was() -> TestResult {
    let mut encoder = shipped()?;
    let products = encoder.linear_mut();
    let setting = |layer, product: &str| {
        let (product, precision) = (product.to_string(), Precision::Int8);
        LinearSetting { layer, product, precision }
    };
    let right: Vec<_> = products.iter().map(|of| setting(of.layer, of.name)).collect();
    let settings = |linear| LayerSettings::new(vec![Backend::default(); 3]).with_linear(linear);
    let changed = |change: &dyn Fn(&mut Vec<LinearSetting>)| {
        let mut linear = right.clone();
        change(&mut linear);
        settings(linear)
    };
    let cases = [
        (
            changed(&|all| all[0].product = "qk".into()),
            "with qk of layer 0, expected qkv of layer 0",
        ),
        (
            changed(&|all| all[1] = all[0].clone()),
            "with qkv of layer 0, expected output of layer 0",
        ),
        (changed(&|all| drop(all.pop())), "with nothing more, expected down of layer 2"),
        (changed(&|all| all.push(all[0].clone())), "with qkv of layer 0, expected nothing more"),
    ];
    for (settings, expected) in cases {
        let error = settings.apply(&mut encoder).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // Nor by settings of other layers.
    let short = LayerSettings::new(vec![Backend::default()]).with_linear(right.clone());
    assert!(short.apply(&mut encoder).is_err());
    assert!(encoder.linear_mut().iter().all(|of| of.linear.precision() == Precision::F32));
    assert!(encoder.attention().iter().all(|of| of.config().backend == Backend::Fp32));
    settings(right).apply(&mut encoder)?;
    assert!(encoder.linear_mut().iter().all(|of| of.linear.precision() == Precision::Int8));
    Ok(())
}

/// The human scores of STS 2014 images; names its folder in `STS2014_IMAGES`.
#[test]
fn captions_keep_their_embeddings_and_their_ranks() -> TestResult {
    let Some(folder) = std::env::var_os("STS2014_IMAGES") else {
        eprintln!("not run: STS2014_IMAGES names no folder with 2014-images.test.tsv");
        return Ok(());
    };
    let text = std::fs::read_to_string(Path::new(&folder).join("2014-images.test.tsv"))?;
    let mut sentences = Vec::new();
    for line in text.lines() {
        let columns: Vec<&str> = line.split('\t').collect();
        let [_, a, b] = columns[..] else { return Err(format!("{line:?}: not 3 columns").into()) };
        sentences.extend([a.to_string(), b.to_string()]);
    }
    assert_eq!(sentences.len(), 1500);
    let mut encoder = match std::env::var_os("STS_MODEL") {
        Some(folder) => TextEncoder::load_in(&ModelFiles::from_dir(folder)?, &CPU, Precision::F32)?,
        None => shipped()?,
    };
    let exact = vectors(&encoder, &sentences)?;
    let bounds = [(Precision::Int16, 0.99999, 0.99999), (Precision::Int8, 0.9993, 0.9997)];
    for (precision, least, least_mean) in bounds {
        encoder.set_precision(precision)?;
        let found = vectors(&encoder, &sentences)?;
        let cosines: Vec<f64> =
            exact.iter().zip(&found).map(|(a, b)| cosine(a, b).unwrap()).collect();
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let smallest = lowest(cosines);
        eprintln!("{precision:?}: smallest cosine {smallest:.7}, mean {mean:.7}");
        assert!(smallest >= least && mean >= least_mean, "{precision:?}: {smallest} {mean}");
    }
    Ok(())
}
