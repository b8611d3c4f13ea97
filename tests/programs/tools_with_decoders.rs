//! The examples `drift`, `calibrate` and `search`, run on a decoder as a user runs them.

use super::generate_and_perplexity::Model;
use super::start::{assert_narrow, expect_failure, run, texts};
use crate::common::tiny::{HEADS, KV_HEADS, LAYERS, Tiny};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_int8_attention::models::llama::LlamaTokenizer;
use serde_json::Value;
use std::path::Path;

/// The model as `config.json`, `tokenizer.json` and safetensors.
fn folder() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let tiny = Tiny::new(true)?;
    tiny.write_folder(folder.path())?;
    let gguf = tiny.gguf(GgmlDType::F32)?.write(folder.path())?;
    let saved =
        LlamaTokenizer::load(&gguf)?.tokenizer().save(path(&folder, "tokenizer.json"), false);
    saved.map_err(anyhow::Error::msg)?;
    std::fs::remove_file(gguf)?;
    Ok(folder)
}

fn path(folder: &tempfile::TempDir, name: &str) -> String {
    folder.path().join(name).to_string_lossy().into_owned()
}

/// What it prints as JSON; nothing is on stderr.
fn json(name: &str, args: &[&str]) -> Result<Value> {
    let output = run(name, &[args, &["--json"]].concat());
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success() && stderr.is_empty(), "{name} {args:?}: {stderr}");
    Ok(serde_json::from_str(&stdout)?)
}

fn array<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn ranges_of_a_decoder_are_collected_saved_and_loaded() -> Result<()> {
    let folder = folder()?;
    let model = folder.path().to_string_lossy().into_owned();
    let ranges = path(&folder, "ranges.json");
    let collect = ["--model", &model, "--observer", "min-max", "--output", &ranges];
    let report = json("calibrate", &collect)?;
    assert_eq!(report["passages"], 2, "{report}");
    let rows = array(&report, "rows");
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_eq!(array(row, "layer_sqnr_db").len(), LAYERS);
        assert!(row["worst_head_db"].as_f64() > Some(20.0), "{row}");
    }
    let saved: Value = serde_json::from_slice(&std::fs::read(&ranges)?)?;
    let layer = &saved["calibration"]["layers"][0];
    assert_eq!((array(layer, "q").len(), array(layer, "k").len()), (HEADS, KV_HEADS));

    // The same model in another format, with the same ranges.
    let gguf = Model::of(&Tiny::new(true)?.gguf(GgmlDType::F32)?)?;
    let loaded = json("calibrate", &["--model", &gguf.path, "--ranges", &ranges])?;
    let db = |report: &Value| report["rows"][2]["worst_head_db"].as_f64().unwrap_or(f64::NAN);
    assert!((db(&loaded) - db(&report)).abs() < 0.2, "{loaded} {report}");

    let int8 = run("calibrate", &["--model", &model, "--precision", "int8"]);
    expect_failure(&int8, &["--precision int8 is for the linear layers of an encoder"]);
    let encoder = run("calibrate", &["--ranges", &ranges]);
    expect_failure(&encoder, &["ranges of 2 layers for a model of 3"]);
    let mut wrong = saved;
    if let Some(heads) = wrong["calibration"]["layers"][1]["k"].as_array_mut() {
        heads.extend(heads.clone());
    }
    std::fs::write(&ranges, wrong.to_string())?;
    let message = "ranges of 4 key heads in layer 1 for a model of 2";
    gguf.fail("calibrate", &["--ranges", &ranges], &[message]);
    Ok(())
}

/// Some tokenizers put more than one token in front of a text.
#[test]
fn a_window_of_perplexity_has_room_behind_what_stands_in_front() -> Result<()> {
    let folder = folder()?;
    let model = folder.path().to_string_lossy().into_owned();
    let file = path(&folder, "tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let start = serde_json::json!({"SpecialToken": {"id": "<|start|>", "type_id": 0}});
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    tokenizer["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing", "single": [start, start, start, text], "pair": [text],
        "special_tokens": {
            "<|start|>": {"id": "<|start|>", "ids": [259], "tokens": ["<|start|>"]},
        },
    });
    std::fs::write(&file, tokenizer.to_string())?;
    let perplexity = |context: &str| {
        run("perplexity", &["--model", &model, "--chunks", "1", "--context", context])
    };
    expect_failure(&perplexity("3"), &["a context of 3 tokens, 3 of which", "in front"]);
    let (_, stderr) = texts(&perplexity("4"));
    assert!(perplexity("4").status.success(), "{stderr}");
    Ok(())
}

#[test]
fn settings_of_a_decoder_are_searched_and_written() -> Result<()> {
    let model = Model::new()?;
    let folder = tempfile::tempdir()?;
    let layers = path(&folder, "layers.json");
    for budget in [["--attention", "25"], ["--embedding", "25"]] {
        let args =
            ["--model", &model.path, "--rounds", "1", "--passages", "2", "--output", &layers];
        let found = json("search", &[&args[..], &budget].concat())?;
        assert_eq!(found["holds"], true, "{found}");
        assert_eq!(array(&found, "layers").len(), LAYERS);
        let written: Value = serde_json::from_slice(&std::fs::read(&layers)?)?;
        assert_eq!(array(&written, "layers").len(), LAYERS);
        std::fs::remove_file(&layers)?;
    }
    Ok(())
}

#[test]
fn linear_layers_of_a_decoder_are_refused_by_name() -> Result<()> {
    let model = Model::new()?;
    let reason = "no linear layer whose precision can be chosen";
    model.fail("search", &["--embedding", "25", "--linear"], &["cannot search", reason]);
    model.fail("drift", &["--linear", "int8"], &["--linear int8 is for an encoder", reason]);
    Ok(())
}

#[test]
fn short_texts_make_two_passages_or_an_error() -> Result<()> {
    let model = Model::new()?;
    let folder = tempfile::tempdir()?;
    let file = path(&folder, "text.txt");
    std::fs::write(&file, "twelve bytes")?;
    let report = json("calibrate", &["--model", &model.path, "--file", &file])?;
    assert_eq!((&report["tokens"], &report["unseen_tokens"]), (&8.into(), &4.into()));
    std::fs::write(&file, "short")?;
    model.fail("calibrate", &["--file", &file], &["text.txt: too short", "two passages"]);
    std::fs::write(&file, " \n")?;
    model.fail("calibrate", &["--file", &file], &["text.txt", "no word or sign"]);
    Ok(())
}

/// The examples that take encoders and decoders; `drift` is built only with its feature.
fn tools() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    let tools = [("calibrate", &[][..]), ("search", &["--attention", "20"]), ("drift", &[])];
    tools.into_iter().filter(|(name, _)| cfg!(feature = "drift") || *name != "drift")
}

#[test]
fn files_tell_which_kind_of_model_they_hold() -> Result<()> {
    let folder = folder()?;
    let model = folder.path().to_string_lossy().into_owned();
    let config = path(&folder, "config.json");
    let text = std::fs::read_to_string(&config)?;
    for (name, flags) in tools() {
        let fail = |args: &[&str], parts: &[&str]| {
            expect_failure(&run(name, &[flags, args].concat()), parts);
        };
        fail(&["--weights", "f32"], &["--weights is for the GGUF file of a decoder", "encoder"]);
        fail(&["--model", &config], &["not a GGUF file"]);
        fail(&["--model", "no/such.gguf"], &["no/such.gguf"]);
        for (kind, parts) in [
            (
                "mixtral",
                &[
                    "config.json",
                    "model_type \"mixtral\"",
                    "expected \"llama\" or one of [\"bert\"",
                ][..],
            ),
            ("bert", &["not the configuration of BERT"]),
        ] {
            std::fs::write(&config, text.replace("\"llama\"", &format!("{kind:?}")))?;
            fail(&["--model", &model], parts);
        }
        std::fs::write(&config, &text)?;
        std::fs::rename(&config, folder.path().join("c"))?;
        fail(&["--model", &model], &["config not found", "config.json"]);
        std::fs::rename(folder.path().join("c"), &config)?;
    }
    assert!(Path::new(&config).exists());
    Ok(())
}

#[cfg(feature = "drift")]
mod drift {
    use super::*;

    const SHORT: [&str; 2] = ["--passage-tokens", "64"];

    #[test]
    fn every_layer_and_head_is_reported() -> Result<()> {
        let model = Model::new()?;
        let page = Path::new(&model.path).with_extension("html");
        let page = page.to_string_lossy();
        let args = ["--model", &model.path, "--compare", "tensor", "--html", &page];
        let report = json("drift", &args)?;
        assert_eq!(array(&report, "configs").len(), 3);
        let layers = array(&report["configs"][0], "layers");
        assert_eq!(layers.len(), LAYERS);
        for layer in layers {
            assert_eq!(array(layer, "heads").len(), HEADS);
            for head in array(layer, "heads") {
                for stage in ["q", "k", "scores", "output"] {
                    let db = head["alone"][stage]["sqnr_db"]["mean"].as_f64();
                    assert!(db > Some(25.0), "{stage}: {head}");
                }
            }
        }
        let notes = report["notes"].to_string();
        assert!(notes.contains("passages of at most 512 tokens\""), "{notes}");
        assert!(std::fs::read_to_string(&*page)?.trim_end().ends_with("</html>"));

        let (text, _) = model.succeed("drift", &[]);
        assert!(text.contains("2 layers of 4 heads"), "{text}");
        assert_narrow(&text);
        Ok(())
    }

    #[test]
    fn parts_of_a_decoder_s_text_are_merged() -> Result<()> {
        let folder = folder()?;
        let model = folder.path().to_string_lossy().into_owned();
        let base = [&["--model", &model], &SHORT[..]].concat();
        let mut parts = Vec::new();
        for part in ["1/2", "2/2"] {
            let file = path(&folder, &format!("part-{}.json", &part[..1]));
            let result = json("drift", &[&base[..], &["--shard", part]].concat())?;
            std::fs::write(&file, result.to_string())?;
            parts.push(file);
        }
        let merged = json("drift", &["merge", &parts[1], &parts[0]])?;
        let whole = json("drift", &base)?;
        assert!(whole["passages"].as_u64() > Some(20), "{}", whole["passages"]);
        for key in ["passages", "tokens", "notes", "words", "fingerprint"] {
            assert_eq!(merged[key], whole[key], "{key}");
        }
        for key in ["layers", "output", "embedding"] {
            assert_eq!(merged["configs"][0][key], whole["configs"][0][key], "{key}");
        }
        Ok(())
    }

    #[test]
    fn how_weights_are_held_makes_another_model() -> Result<()> {
        let model = Model::new()?;
        let mut parts = Vec::new();
        for (part, weights) in [("1/2", "f32"), ("2/2", "quantized")] {
            let args = ["--model", &model.path, "--weights", weights, "--shard", part];
            let file = Path::new(&model.path).with_file_name(weights);
            std::fs::write(&file, json("drift", &[&args[..], &SHORT].concat())?.to_string())?;
            parts.push(file.to_string_lossy().into_owned());
        }
        let merged = run("drift", &["merge", &parts[0], &parts[1]]);
        expect_failure(&merged, &["results of different models", "-f32", "-quantized"]);
        Ok(())
    }

    #[test]
    fn a_gate_holds_a_decoder() -> Result<()> {
        let model = Model::new()?;
        let gate =
            |db: &str| model.run("drift", &[&SHORT[..], &["--min-head-sqnr-db", db]].concat());
        assert_eq!(gate("10").status.code(), Some(0));
        let output = gate("90");
        assert_eq!(output.status.code(), Some(2));
        assert!(texts(&output).1.contains("layer 0 head 0: min_head_sqnr_db"), "{output:?}");
        Ok(())
    }

    #[test]
    fn small_texts_work_and_what_a_decoder_cannot_do_is_told() -> Result<()> {
        let model = Model::new()?;
        let folder = tempfile::tempdir()?;
        let file = path(&folder, "text.txt");
        std::fs::write(&file, "a")?;
        let report = json("drift", &["--model", &model.path, "--file", &file])?;
        assert_eq!((&report["passages"], &report["tokens"]), (&1.into(), &1.into()));
        std::fs::write(&file, " \n")?;
        model.fail("drift", &["--file", &file], &["text.txt", "no word or sign"]);
        let few = ["--passage-tokens", "7"];
        model.fail("drift", &few, &["passages of 7 tokens; expected 8 to 640"]);
        model.fail("drift", &["--passage-tokens", "641"], &["passages of 641 tokens"]);
        std::fs::write(&file, "5\tA cat sleeps.\tA cat is sleeping.\n")?;
        let parts = ["--pairs compares embeddings of sentences", "a decoder", "--file"];
        model.fail("drift", &["--pairs", &file], &parts);
        Ok(())
    }
}
