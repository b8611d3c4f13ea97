//! The examples with models of a hub, run as a user runs them.

use super::start::{command, expect_failure, texts};
use crate::common::hub_server::{COMMIT, Hub, ID, closed_endpoint};
use crate::common::tiny::Tiny;
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_int8_attention::models::llama::LlamaTokenizer;
use std::collections::HashMap;
use std::path::Path;
use std::process::Output;

/// The examples that take a BERT encoder, with what keeps them short.
const ENCODERS: [(&str, &[&str]); 6] = [
    ("word_embeddings", &[]),
    ("sentence_similarity", &[]),
    ("affine_walkthrough", &["--data", "bert", "--heads", "1", "--tokens", "64"]),
    ("calibrate", &[]),
    ("search", &["--attention", "40", "--rounds", "1"]),
    ("drift", &[]),
];
/// The examples that take a Llama-family decoder, and whether they read a text.
const DECODERS: [(&str, &[&str], bool); 5] = [
    ("generate", &["--prompt", "the", "--max-tokens", "4"], false),
    ("perplexity", &["--context", "32", "--chunks", "2"], true),
    ("calibrate", &["--observer", "min-max"], true),
    ("search", &["--attention", "20", "--rounds", "1"], true),
    ("drift", &[], true),
];

/// `drift` is built only with its feature.
fn is_built(name: &str) -> bool {
    cfg!(feature = "drift") || name != "drift"
}

fn encoders() -> impl Iterator<Item = (&'static str, &'static [&'static str])> {
    ENCODERS.into_iter().filter(|(name, _)| is_built(name))
}

fn decoders() -> impl Iterator<Item = (&'static str, &'static [&'static str], bool)> {
    DECODERS.into_iter().filter(|(name, ..)| is_built(name))
}

fn run(name: &str, args: &[&str], endpoint: &str, home: &Path) -> Output {
    let mut command = command(name);
    for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"] {
        command.env_remove(variable);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("NO_PROXY", "127.0.0.1");
    command.args(args).output().unwrap()
}

/// What it prints.
fn succeed(name: &str, args: &[&str], endpoint: &str, home: &Path) -> String {
    let output = run(name, args, endpoint, home);
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{name} {args:?}: {stderr}");
    stdout
}

/// Fails with a message that contains all of `words`.
fn fail(name: &str, args: &[&str], endpoint: &str, home: &Path, words: &[&str]) {
    expect_failure(&run(name, args, endpoint, home), words);
}

#[test]
fn every_example_with_a_model_has_the_flags() -> Result<()> {
    let home = tempfile::tempdir()?;
    let gone = closed_endpoint();
    for name in encoders().map(|(name, _)| name).chain(decoders().map(|(name, ..)| name)) {
        let help = succeed(name, &["--help"], &gone, home.path());
        for flag in ["--model-id <OWNER/NAME>", "--revision <REVISION>", "--offline"] {
            assert!(help.contains(flag), "{flag} is not in the help of {name}: {help}");
        }
    }
    Ok(())
}

#[test]
fn encoders_are_downloaded_once_and_found_offline() -> Result<()> {
    let home = tempfile::tempdir()?;
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/paraphrase-MiniLM-L3-v2");
    let read = |name: &str| std::fs::read(bundled.join(name));
    let hub = Hub::start(
        HashMap::from([
            ("config.json", read("config.json")?),
            ("tokenizer.json", read("tokenizer.json")?),
            ("model.safetensors", read("model-f16.safetensors")?),
        ]),
        "404 Not Found",
    )?;
    for (number, (name, args)) in encoders().enumerate() {
        let of = |more: &[&'static str]| [args, &["--model-id", ID], more].concat();
        fail(name, &of(&["--revision", "a b"]), &hub.endpoint, home.path(), &["not a revision"]);
        if number == 0 {
            let words = ["config.json is not in the local cache", "without offline mode"];
            fail(name, &of(&["--offline"]), &hub.endpoint, home.path(), &words);
            assert_eq!(hub.requests(), [""; 0], "nothing is asked offline");
        }
        let report = succeed(name, &of(&[]), &hub.endpoint, home.path());
        let got = hub.requests().iter().filter(|request| request.starts_with("GET")).count();
        // Three files, one of them after a redirect.
        assert_eq!(got, if number == 0 { 4 } else { 0 }, "{name}");
        assert!(report.contains(ID), "{name}: {report}");
        // The hub is gone: neither offline nor with a commit is it asked.
        let gone = closed_endpoint();
        succeed(name, &of(&["--offline"]), &gone, home.path());
        let report = succeed(name, &of(&["--revision", COMMIT]), &gone, home.path());
        assert!(report.contains(COMMIT), "{name}: {report}");
    }
    Ok(())
}

/// A decoder as safetensors and as GGUF.
fn decoder() -> Result<HashMap<&'static str, Vec<u8>>> {
    let folder = tempfile::tempdir()?;
    let tiny = Tiny::new(true)?;
    tiny.write_folder(folder.path())?;
    let gguf = tiny.gguf(GgmlDType::Q8_0)?.write(folder.path())?;
    let tokenizer = folder.path().join("tokenizer.json");
    let saved = LlamaTokenizer::load(&gguf)?.tokenizer().save(&tokenizer, false);
    saved.map_err(anyhow::Error::msg)?;
    let read = |name: &str| std::fs::read(folder.path().join(name));
    Ok(HashMap::from([
        ("config.json", read("config.json")?),
        ("tokenizer.json", read("tokenizer.json")?),
        ("model.safetensors", read("model.safetensors")?),
        ("tiny.gguf", std::fs::read(gguf)?),
    ]))
}

#[test]
fn decoders_are_downloaded_once_and_found_offline() -> Result<()> {
    let home = tempfile::tempdir()?;
    let text = home.path().join("text.txt");
    std::fs::write(&text, "the cat and the dog, ".repeat(20))?;
    let file = ["--file", text.to_str().unwrap()];
    let hub = Hub::start(decoder()?, "404 Not Found")?;
    for (name, args, reads) in decoders() {
        let args = [args, if reads { &file } else { &[] }].concat();
        for gguf in [&[][..], &["--gguf", "tiny.gguf"]] {
            let of = |more: &[&'static str]| [&args[..], &["--model-id", ID], gguf, more].concat();
            let first = succeed(name, &of(&[]), &hub.endpoint, home.path());
            assert!(!first.is_empty(), "{name}");
            hub.requests();
            succeed(name, &of(&["--offline"]), &hub.endpoint, home.path());
            assert_eq!(hub.requests(), [""; 0], "nothing is asked offline");
            let gone = closed_endpoint();
            succeed(name, &of(&["--revision", COMMIT]), &gone, home.path());
        }
        let missing = ["--model-id", ID, "--gguf", "other.gguf"];
        let missing = [&args[..], &missing].concat();
        fail(name, &missing, &hub.endpoint, home.path(), &["no other.gguf", "check"]);
    }
    Ok(())
}

#[test]
fn what_a_hub_refuses_is_told() -> Result<()> {
    let home = tempfile::tempdir()?;
    for (status, words) in [
        ("401 Unauthorized", ["private or gated", "HF_TOKEN"]),
        ("404 Not Found", ["does not exist", "check how both are written"]),
    ] {
        let hub = Hub::start(HashMap::new(), status)?;
        for name in ["word_embeddings", "generate"] {
            fail(name, &["--model-id", ID], &hub.endpoint, home.path(), &words);
        }
    }
    Ok(())
}
