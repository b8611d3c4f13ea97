//! Encoders of every family: where their weights may be, what their inputs may be, and that the tools
//! for layered models work with each. What they compute is compared with candle-transformers in the
//! package `benches`, and here where that differs from Hugging Face.

mod common;

// Named, so that the files are in a folder of their own.
mod encoders {
    mod classifiers;
    mod sentence_files;

    use super::*;
}

use candle_core::{DType, Device, Tensor};
use candle_int8_attention::drift::linear::Substitutes;
use candle_int8_attention::drift::{Candidate, Recorder};
use candle_int8_attention::models::{
    CalibrationConfig, EncoderModel, LayerSettings, LayeredModel, ModelFiles, StaticScales,
    TextEncoder, calibrate, run_layers,
};
use candle_int8_attention::nn::{self, Precision};
use candle_int8_attention::{AttentionConfig, Backend, Error};
use common::tiny_encoders::{FAMILIES, HIDDEN, LAYERS, TOKENS, TinyEncoder, VOCAB};
use common::{largest, largest_difference, randn};
use serde_json::json;

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

const CPU: Device = Device::Cpu;

/// Both compute the same in f32, and round it differently.
const ROUNDING: f64 = 1e-5;

/// Ids of words, no special token among them.
fn ids(rows: usize, columns: usize) -> TestResult<Tensor> {
    let id = |i: usize| (4 + (i * 7) % (VOCAB - 4)) as u32;
    Ok(Tensor::from_iter((0..rows * columns).map(id), &CPU)?.reshape((rows, columns))?)
}

fn load(tiny: &TinyEncoder) -> TestResult<EncoderModel> {
    let folder = tempfile::tempdir()?;
    Ok(EncoderModel::load(&tiny.write(folder.path())?, &CPU)?)
}

/// The message of the error that loading must give.
fn refused(tiny: &TinyEncoder) -> TestResult<String> {
    let folder = tempfile::tempdir()?;
    match EncoderModel::load(&tiny.write(folder.path())?, &CPU) {
        Ok(_) => Err("it was loaded".into()),
        Err(error) => Ok(error.to_string()),
    }
}

#[test]
fn names_behind_any_prefix_and_in_several_files_are_the_same_model() -> TestResult {
    for family in FAMILIES {
        let plain = TinyEncoder::new(family, "");
        let expected = load(&plain)?.forward(&ids(2, 9)?, None, None)?;
        assert!(largest(&expected) > 0.5, "{family}: not all zeros");
        for prefix in [TinyEncoder::own_prefix(family), "0.auto_model."] {
            let mut other = TinyEncoder::new(family, prefix);
            for (name, tensor) in &mut other.tensors {
                *tensor = plain.tensors[name.strip_prefix(prefix).ok_or("a prefix")?].clone();
            }
            let found = load(&other)?.forward(&ids(2, 9)?, None, None)?;
            assert_eq!(largest_difference(&found, &expected), 0.0, "{family} {prefix}");
            let folder = tempfile::tempdir()?;
            other.write(folder.path())?;
            let files = other.write_shards(folder.path())?;
            let parts = ["part-0.safetensors", "part-1.safetensors"];
            let all = files.all()?;
            assert!(parts.iter().all(|part| all.contains(&folder.path().join(part))), "{all:?}");
            let model = EncoderModel::load(&files, &CPU)?;
            let found = model.forward(&ids(2, 9)?, None, None)?;
            assert_eq!(largest_difference(&found, &expected), 0.0, "{family} in shards");
        }
    }
    Ok(())
}

#[test]
fn padding_changes_nothing_of_the_tokens_before_it() -> TestResult {
    for family in FAMILIES {
        let model = load(&TinyEncoder::new(family, ""))?;
        let (alone, pad) = (ids(1, 9)?, model.config().pad_token_id);
        let expected = model.forward(&alone, None, None)?;
        let padding = Tensor::full(pad, (1, 5), &CPU)?;
        let padded = Tensor::cat(&[&alone, &padding], 1)?;
        let mask = Tensor::cat(&[alone.ones_like()?, padding.zeros_like()?], 1)?;
        let found = model.forward(&padded, None, Some(&mask))?.narrow(1, 0, 9)?;
        let difference = largest_difference(&found, &expected);
        assert!(difference < ROUNDING, "{family}: {difference}");
        let unmasked = model.forward(&padded, None, None)?.narrow(1, 0, 9)?;
        assert!(largest_difference(&unmasked, &expected) > 1e-3, "{family}: the mask does nothing");
    }
    Ok(())
}

#[test]
fn calibration_drift_and_settings_work_with_every_family() -> TestResult {
    for family in FAMILIES {
        let mut model = load(&TinyEncoder::new(family, ""))?;
        let inputs = [ids(1, 20)?, ids(1, 13)?];
        let ranges = calibrate(&model, &inputs, CalibrationConfig::default())?;
        assert_eq!((ranges.layers.len(), ranges.layers[0].q.len()), (LAYERS, 2), "{family}");

        let mut recorder = Recorder::new(vec![Candidate::default()])?;
        for (index, input) in (0..).zip(&inputs) {
            let words = vec![" word".to_string(); input.dim(1)?];
            recorder.record(&model, input, &words, index)?;
        }
        let mut substitutes = Substitutes::new(&mut model, Precision::Int8)?;
        for input in &inputs {
            recorder.record_linear(&mut model, &mut substitutes, input)?;
        }
        let report = recorder.report();
        assert_eq!((report.layers.len(), report.passages), (LAYERS, 2), "{family}");
        let linear = report.linear.ok_or("linear layers")?;
        assert_eq!(linear.products.len(), model.linear_mut().len(), "{family}");
        assert!(linear.products.iter().all(|of| of.alone.sqnr_db > 20.0), "{family}: {linear:?}");

        let exact = model.forward(&inputs[0], None, None)?;
        ranges.apply(&mut model, StaticScales::PerHead)?;
        let fixed = model.forward(&inputs[0], None, None)?;
        model.set_attention(&AttentionConfig::int8());
        let int8 = model.forward(&inputs[0], None, None)?;
        for found in [&fixed, &int8] {
            let difference = largest_difference(found, &exact);
            assert!(difference > 0.0 && difference < 0.2, "{family}: {difference}");
        }
        LayerSettings::new(vec![Backend::Fp32; LAYERS]).apply(&mut model)?;
        let back = model.forward(&inputs[0], None, None)?;
        assert_eq!(largest_difference(&back, &exact), 0.0, "{family}");
        let layer_by_layer = model.finish(&run_layers(&model, &inputs[0], &mut |_, _| Ok(()))?)?;
        assert_eq!(largest_difference(&layer_by_layer, &exact), 0.0, "{family}");
    }
    Ok(())
}

#[test]
fn local_layers_keep_their_window_whatever_attention_is_set() -> TestResult {
    let mut model = load(&TinyEncoder::new("modernbert", ""))?;
    for attention in [AttentionConfig::int8().window(Some(1), None), AttentionConfig::fp32()] {
        model.set_attention(&attention);
        let windows = model.attention().into_iter().map(|layer| {
            let spec = &layer.config().spec;
            (spec.window_left, spec.window_right)
        });
        let (all, near) = ((None, None), (Some(3), Some(3)));
        assert_eq!(windows.collect::<Vec<_>>(), [all, near, near, all]);
    }
    Ok(())
}

/// As Hugging Face writes them, too.
#[test]
fn what_is_switched_off_changes_nothing() -> TestResult {
    for family in FAMILIES {
        let mut tiny = TinyEncoder::new(family, "");
        let expected = load(&tiny)?.forward(&ids(1, 9)?, None, None)?;
        for (key, off) in [
            ("is_decoder", json!(false)),
            ("add_cross_attention", json!(null)),
            ("rope_scaling", json!(null)),
        ] {
            tiny.config[key] = off;
        }
        let found = load(&tiny)?.forward(&ids(1, 9)?, None, None)?;
        assert_eq!(largest_difference(&found, &expected), 0.0, "{family}");
    }
    Ok(())
}

/// Files of newer versions say it in words.
#[test]
fn both_forms_of_modernbert_s_configuration_are_the_same_model() -> TestResult {
    let old = TinyEncoder::new("modernbert", "");
    let expected = load(&old)?.forward(&ids(1, 20)?, None, None)?;
    let mut new = TinyEncoder::new("modernbert", "");
    new.tensors.clone_from(&old.tensors);
    let config = new.config.as_object_mut().ok_or("an object")?;
    for name in ["global_attn_every_n_layers", "global_rope_theta", "local_rope_theta"] {
        config.remove(name);
    }
    let (full, near) = ("full_attention", "sliding_attention");
    config.insert("layer_types".into(), json!([full, near, near, full]));
    let theta = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
    config.insert("rope_parameters".into(), json!({full: theta(160000.0), near: theta(10000.0)}));
    let found = load(&new)?.forward(&ids(1, 20)?, None, None)?;
    assert_eq!(largest_difference(&found, &expected), 0.0);
    new.config["rope_parameters"][full]["rope_type"] = json!("dynamic");
    assert!(refused(&new)?.contains("rope type \"dynamic\", expected \"default\""));
    new.config["layer_types"] = json!([full, near]);
    assert!(refused(&new)?.contains("2 layer_types for num_hidden_layers 4"));
    Ok(())
}

/// The positions of a text that holds padding: `pad + 1` for the first token, and on.
#[test]
fn roberta_counts_positions_from_behind_the_padding_token() -> TestResult {
    let mut tiny = TinyEncoder::new("roberta", "");
    let table = "embeddings.position_embeddings.weight";
    let model = load(&tiny)?;
    let ids = Tensor::new(&[[0u32, 9, 1, 1, 7, 2]], &CPU)?;
    let expected = model.embed(&ids)?;
    // Rows 2.., one for each token, and 1 for padding.
    let rows = Tensor::new(&[2u32, 3, 1, 1, 4, 5], &CPU)?;
    let own = tiny.tensors[table].index_select(&rows, 0)?;
    let words = model.word_embeddings().index_select(&ids.flatten_all()?, 0)?;
    let types = tiny.tensors["embeddings.token_type_embeddings.weight"].clone();
    let sum = (words + own)?.broadcast_add(&types)?;
    let norm = |part: &str| tiny.tensors[&format!("embeddings.LayerNorm.{part}")].clone();
    let plain = candle_nn::ops::layer_norm(&sum, &norm("weight"), &norm("bias"), 1e-5)?;
    let difference = largest_difference(&expected.squeeze(0)?, &plain);
    assert!(difference < ROUNDING, "{difference}");
    assert_eq!(model.config().max_tokens, TOKENS);
    model.forward(&self::ids(1, TOKENS)?, None, None)?;
    let error = model.forward(&self::ids(1, TOKENS + 1)?, None, None).unwrap_err().to_string();
    assert!(error.contains("[1, 25]") && error.contains("N <= 24"), "{error}");
    tiny.config["max_position_embeddings"] = json!(2);
    assert!(refused(&tiny)?.contains("max_position_embeddings 2 with pad_token_id 1"));
    Ok(())
}

/// The bits of `norm((word + type) + position)`, with what of it the family has.
#[test]
fn embeddings_have_the_bits_of_tensor_operations_in_every_family() -> TestResult {
    for family in FAMILIES {
        let tiny = TinyEncoder::new(family, "");
        let model = load(&tiny)?;
        let table = |name: &str| tiny.tensors.get(&format!("embeddings.{name}_embeddings.weight"));
        let ids = ids(3, 8)?;
        let look_up = |table: &Tensor, rows: &Tensor| -> TestResult<Tensor> {
            Ok(table.index_select(&rows.flatten_all()?, 0)?.reshape((3, 8, HIDDEN))?)
        };
        let mut sum = look_up(model.word_embeddings(), &ids)?;
        if let Some(types) = table("token_type") {
            sum = sum.broadcast_add(&types.narrow(0, 0, 1)?)?;
        }
        if let Some(positions) = table("position") {
            let first = if family == "roberta" { 2 } else { 0 };
            sum = sum.broadcast_add(&positions.narrow(0, first, 8)?)?;
        }
        let name = if family == "modernbert" { "norm" } else { "LayerNorm" };
        let weight = tiny.tensors[&format!("embeddings.{name}.weight")].clone();
        let bias = match tiny.tensors.get(&format!("embeddings.{name}.bias")) {
            Some(bias) => bias.clone(),
            None => weight.zeros_like()?,
        };
        let eps = if family == "distilbert" { 1e-12 } else { 1e-5 };
        let expected = nn::LayerNorm::new(weight, bias, eps)?.forward(&sum)?;
        assert_eq!(largest_difference(&model.embed(&ids)?, &expected), 0.0, "{family}");
    }
    Ok(())
}

/// Positions begin anew with each, and behind RoBERTa's padding too.
#[test]
fn packed_sequences_have_the_bits_that_they_have_alone_in_every_family() -> TestResult {
    for family in FAMILIES {
        let model = load(&TinyEncoder::new(family, ""))?;
        let sequences =
            [vec![5u32, 1, 7, 9, 1], vec![], vec![0, 9, 1, 1, 7, 2], vec![6], vec![1; TOKENS]];
        let packed = model.forward_sequences(&sequences)?;
        for (ids, packed) in sequences.iter().zip(&packed).filter(|(ids, _)| !ids.is_empty()) {
            let ids = Tensor::new(ids.as_slice(), &CPU)?.unsqueeze(0)?;
            let alone = model.forward(&ids, None, None)?.squeeze(0)?;
            assert_eq!(largest_difference(packed, &alone), 0.0, "{family} {ids}");
        }
    }
    Ok(())
}

#[test]
fn a_model_without_token_types_has_none_to_begin_with() -> TestResult {
    let mut tiny = TinyEncoder::new("bert", "");
    tiny.config["type_vocab_size"] = json!(0);
    let table = "embeddings.token_type_embeddings.weight";
    tiny.tensors.insert(table.into(), Tensor::zeros((0, HIDDEN), DType::F32, &CPU)?);
    let model = load(&tiny)?;
    let errors =
        [model.forward(&ids(1, 3)?, None, None).err(), model.forward_sequences(&[[4u32, 5]]).err()];
    for error in errors {
        let error = error.ok_or("it ran")?;
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        assert!(error.to_string().contains("token_type_ids holds 0, expected less than 0"));
    }
    Ok(())
}

/// candle-transformers computes DistilBERT's GELU by its tanh approximation, Hugging Face does not.
#[test]
fn distilbert_equals_its_definition_in_tensor_operations() -> TestResult {
    let tiny = TinyEncoder::new("distilbert", "");
    let t = |name: &str| tiny.tensors[name].clone();
    let linear = |x: &Tensor, name: String| -> TestResult<Tensor> {
        let weight = t(&format!("{name}.weight")).t()?;
        Ok(x.matmul(&weight)?.broadcast_add(&t(&format!("{name}.bias")))?)
    };
    let norm = |x: &Tensor, name: String| -> TestResult<Tensor> {
        let [weight, bias] = ["weight", "bias"].map(|part| t(&format!("{name}.{part}")));
        Ok(candle_nn::ops::layer_norm_slow(x, &weight, &bias, 1e-12)?)
    };
    let ids = ids(1, 11)?;
    let words = t("embeddings.word_embeddings.weight").index_select(&ids.flatten_all()?, 0)?;
    let positions = t("embeddings.position_embeddings.weight").narrow(0, 0, 11)?;
    let mut x = norm(&(words + positions)?, "embeddings.LayerNorm".into())?;
    for layer in 0..LAYERS {
        let name = |part: &str| format!("transformer.layer.{layer}.{part}");
        let heads = |part: &str| -> TestResult<Tensor> {
            let x = linear(&x, name(&format!("attention.{part}")))?;
            Ok(x.reshape((11, 2, HIDDEN / 2))?.transpose(0, 1)?.contiguous()?)
        };
        let scores =
            (heads("q_lin")?.matmul(&heads("k_lin")?.t()?)? / ((HIDDEN / 2) as f64).sqrt())?;
        let context = candle_nn::ops::softmax(&scores, 2)?.matmul(&heads("v_lin")?)?;
        let context = context.transpose(0, 1)?.reshape((11, HIDDEN))?;
        let context = linear(&context, name("attention.out_lin"))?;
        x = norm(&(x + context)?, name("sa_layer_norm"))?;
        let inner = linear(&x, name("ffn.lin1"))?.gelu_erf()?;
        x = norm(&(&x + linear(&inner, name("ffn.lin2"))?)?, name("output_layer_norm"))?;
    }
    let found = load(&tiny)?.forward(&ids, None, None)?.squeeze(0)?;
    let difference = largest_difference(&found, &x);
    assert!(difference < ROUNDING, "{difference}");
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_named_in_every_family() -> TestResult {
    for family in FAMILIES {
        let model = load(&TinyEncoder::new(family, ""))?;
        let (good, types) = (ids(1, 3)?, model.config().type_vocab_size as u32);
        let error = |ids: &Tensor, types: Option<&Tensor>, mask: Option<&Tensor>| -> String {
            model.forward(ids, types, mask).unwrap_err().to_string()
        };
        let far = Tensor::full(VOCAB as u32, (1, 3), &CPU)?;
        assert!(error(&far, None, None).contains("input_ids holds 20, expected less than 20"));
        let kind = Tensor::full(types, (1, 3), &CPU)?;
        let message = format!("token_type_ids holds {types}, expected less than {types}");
        assert!(error(&good, Some(&kind), None).contains(&message), "{family}");
        assert!(error(&good, Some(&ids(1, 2)?), None).contains("token_type_ids has shape [1, 2]"));
        assert!(error(&good, None, Some(&ids(1, 2)?)).contains("attention_mask has shape [1, 2]"));
        let wide = good.to_dtype(DType::I64)?;
        assert!(error(&wide, None, None).contains("input_ids has dtype I64"));
        assert!(error(&ids(1, TOKENS + 1)?, None, None).contains("N <= 24"), "{family}");
        let layer = model.layer(LAYERS, &randn((1, 3, HIDDEN)), &mut |q, _, _, _| Ok(q.clone()));
        assert!(layer.unwrap_err().to_string().contains("layer 4, expected less than 4"));
    }
    Ok(())
}

#[test]
fn files_of_a_model_that_contradict_each_other_are_named() -> TestResult {
    for family in FAMILIES {
        let layers = if family == "distilbert" { "n_layers" } else { "num_hidden_layers" };
        let mut tiny = TinyEncoder::new(family, "");
        tiny.config[layers] = json!(LAYERS - 1);
        assert!(refused(&tiny)?.contains("but the weights hold more"), "{family}");
        tiny.config[layers] = json!(LAYERS + 1);
        assert!(refused(&tiny)?.contains("no tensor named"), "{family}");
        let mut tiny = TinyEncoder::new(family, "");
        tiny.config["vocab_size"] = json!(VOCAB + 1);
        let message = refused(&tiny)?;
        assert!(message.contains("[20, 16]") && message.contains("[21, 16]"), "{message}");
        tiny.config["quantization_config"] = json!({"quant_method": "fp8"});
        assert!(refused(&tiny)?.contains("quantization_config with the method \"fp8\""));
    }
    for (family, key, value, message) in [
        ("modernbert", "num_attention_heads", json!(3), "num_attention_heads 3"),
        ("modernbert", "num_attention_heads", json!(16), "heads of 1 elements"),
        ("modernbert", "norm_eps", json!(-1.0), "layer_norm_eps -1"),
        ("modernbert", "global_attn_every_n_layers", json!(0), "expected at least 1"),
        ("modernbert", "global_rope_theta", json!(0.0), "expected two positive numbers"),
        ("modernbert", "mlp_bias", json!(true), "mlp_bias true, expected false"),
        ("modernbert", "hidden_activation", json!("silu"), "silu"),
        ("distilbert", "n_heads", json!(0), "num_attention_heads 0"),
        ("distilbert", "activation", json!("silu"), "not the configuration of DistilBERT"),
        ("roberta", "position_embedding_type", json!("relative_key"), "relative_key"),
        ("bert", "is_decoder", json!(true), "is_decoder true, expected an encoder"),
        ("roberta", "is_decoder", json!(true), "is_decoder true, expected an encoder"),
        ("bert", "add_cross_attention", json!(true), "add_cross_attention true"),
        ("modernbert", "rope_scaling", json!({"type": "yarn"}), "rope type \"yarn\""),
        ("modernbert", "rope_scaling", json!({"rope_type": "linear", "factor": 2.0}), "\"linear\""),
        ("bert", "model_type", json!("mpnet"), "model_type \"mpnet\", expected one of [\"bert\""),
    ] {
        let mut tiny = TinyEncoder::new(family, "");
        tiny.config[key] = value;
        let found = refused(&tiny)?;
        assert!(found.contains(message), "{family} {key}: {found}");
    }
    Ok(())
}

#[test]
fn packed_layers_are_the_same_model_in_every_family_and_precision() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("packed.safetensors");
    for family in FAMILIES {
        let tiny = TinyEncoder::new(family, "");
        for precision in [Precision::Int8, Precision::Int16, Precision::F32] {
            let mut packed = load(&tiny)?;
            packed.set_linear(precision)?;
            packed.save_linear(&path)?;
            let mut model = load(&tiny)?;
            model.load_linear(&path)?;
            let found = model.forward(&ids(2, 9)?, None, None)?;
            let expected = packed.forward(&ids(2, 9)?, None, None)?;
            assert_eq!(largest_difference(&found, &expected), 0.0, "{family} {precision:?}");
        }
    }
    Ok(())
}

#[test]
fn packed_layers_of_another_model_are_refused_and_change_nothing() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("packed.safetensors");
    let mut bert = load(&TinyEncoder::new("bert", ""))?;
    let before = bert.forward(&ids(1, 5)?, None, None)?;
    let mut refused = |layers: Vec<(String, nn::Linear)>| -> TestResult<String> {
        nn::save_linear(&path, layers.iter().map(|(name, layer)| (name.as_str(), layer)))?;
        let error = bert.load_linear(&path).err().ok_or("it was loaded")?;
        assert!(matches!(error, Error::Mismatch(_)), "{error}");
        assert_eq!(largest_difference(&bert.forward(&ids(1, 5)?, None, None)?, &before), 0.0);
        Ok(error.to_string())
    };
    let all = || -> TestResult<Vec<(String, nn::Linear)>> {
        let mut other = load(&TinyEncoder::new("bert", ""))?;
        let layers = other.linear_mut().into_iter().map(|named| {
            let name = format!("{}.{}", named.layer, named.name);
            Ok((name, named.linear.to_precision(Precision::Int8)?))
        });
        layers.collect()
    };
    let mut missing = all()?;
    missing.remove(1);
    assert!(refused(missing)?.contains("no layer \"0.output\", which the model has"));
    let mut wide = all()?;
    wide[0].1 = nn::Linear::new(&randn(&[3 * HIDDEN, HIDDEN + 1]), None, Precision::Int8)?;
    let shapes = format!("(48, {}), expected (48, {HIDDEN})", HIDDEN + 1);
    assert!(refused(wide)?.contains(&format!("layer \"0.qkv\" has shape {shapes}")));
    let mut more = all()?;
    more.push(("9.up".into(), nn::Linear::new(&randn(&[2, 2]), None, Precision::F32)?));
    assert!(refused(more)?.contains("a layer \"9.up\", which the model does not have"));
    Ok(())
}
