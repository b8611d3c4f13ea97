//! The example `embed`: files of texts in, files of embeddings out.

use super::start::{assert_narrow, fail, json, succeed};
use crate::common::randn;
use crate::common::tiny_encoders::{HIDDEN, TinyEncoder};
use candle_core::safetensors::load;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::Path;

const EMBED: &str = "embed";

/// Nine lines: six texts, of which one is cut, two that are empty, one that is no UTF-8.
fn lines() -> Vec<u8> {
    let long = "much ".repeat(600);
    let text = format!("A cat sleeps.\n\nIt rains.\r\n{long}\nno \x01 break\n   \nThe sun.\n");
    [text.as_bytes(), b"\xff\xfe\n", "Zuletzt schläft sie.".as_bytes()].concat()
}

/// A folder with the file, the path of the file, and paths beside it.
fn folder(content: &[u8]) -> (tempfile::TempDir, String, impl Fn(&str) -> String + use<>) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().to_path_buf();
    let beside = move |name: &str| root.join(name).to_str().unwrap().to_string();
    let input = beside("input.txt");
    std::fs::write(&input, content).unwrap();
    (folder, input, beside)
}

fn tensors(path: &str) -> (Vec<Vec<f32>>, Vec<i64>) {
    let file: HashMap<String, Tensor> = load(path, &Device::Cpu).unwrap();
    let embeddings = file["embeddings"].to_vec2().unwrap();
    (embeddings, file["bytes"].to_vec1().unwrap())
}

#[test]
fn lines_become_tensors_and_what_is_no_text_is_counted() {
    let (_folder, input, beside) = folder(&lines());
    let output = beside("out.safetensors");
    let report = json(EMBED, &[&input, "--output", &output]);
    for (name, expected) in
        [("texts", 6), ("cut_texts", 1), ("cut_tokens", 90), ("empty", 2), ("not_utf8", 1)]
    {
        assert_eq!(report[name], expected, "{name}: {report}");
    }
    for name in ["tokens", "seconds", "texts_per_second"] {
        assert!(report[name].as_f64().unwrap() > 0.0, "{name}: {report}");
    }
    let (embeddings, bytes) = tensors(&output);
    assert_eq!((embeddings.len(), embeddings[0].len()), (6, 384));
    let text = lines();
    let starts: Vec<usize> = bytes.iter().map(|&at| at as usize).collect();
    assert!(starts.iter().all(|&at| at == 0 || text[at - 1] == b'\n'), "{starts:?}");
    assert!(text[starts[1]..].starts_with(b"It rains.") && text[starts[5]..].starts_with(b"Zu"));
    let text = succeed(EMBED, &[&input, "-o", &output]);
    assert!(text.contains("6 texts") && text.contains("2 empty, 1 not UTF-8"), "{text}");
    assert_narrow(&text.replace(&input, "input.txt").replace(&output, "out.safetensors"));
}

#[test]
fn parts_are_the_whole() {
    let (_folder, input, beside) = folder(&lines());
    let whole = beside("whole.safetensors");
    json(EMBED, &[&input, "-o", &whole, "--precision", "int8"]);
    let (mut embeddings, mut bytes) = (Vec::new(), Vec::new());
    for part in ["1/3", "2/3", "3/3"] {
        let output = beside("part.safetensors");
        // The long line begins in the first part and leaves none for the second, which is no mistake.
        json(EMBED, &[&input, "-o", &output, "--precision", "int8", "--shard", part]);
        let (more, places) = tensors(&output);
        embeddings.extend(more);
        bytes.extend(places);
    }
    assert!((embeddings, bytes) == tensors(&whole));
}

/// Several poolings are put one after the other, and a dense layer has a width of its own.
#[test]
fn embeddings_may_be_wider_or_narrower_than_hidden_states() {
    let (folder, input, beside) = folder(b"the sea\na ship sails\nthe storm\n");
    TinyEncoder::new("bert", "").write(folder.path()).unwrap();
    let (model, output) = (folder.path().to_str().unwrap(), beside("out.safetensors"));
    let put = |name: &str, content: serde_json::Value| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content.to_string()).unwrap();
    };
    let width = || {
        json(EMBED, &["--model", model, &input, "--output", &output]);
        let (embeddings, bytes) = tensors(&output);
        assert_eq!(bytes, [0, 8, 21]);
        assert_eq!(embeddings.len(), 3);
        embeddings[0].len()
    };
    let pooling = serde_json::json!({
        "word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": true,
        "pooling_mode_cls_token": true,
    });
    put("1_Pooling/config.json", pooling);
    assert_eq!(width(), 2 * HIDDEN);

    let module = |class: &str, path: &str| serde_json::json!({"path": path, "type": format!("sentence_transformers.models.{class}")});
    let modules =
        [module("Transformer", ""), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")];
    put("modules.json", modules.into());
    let dense = serde_json::json!({"in_features": 2 * HIDDEN, "out_features": 5, "bias": false});
    put("2_Dense/config.json", dense);
    let weight = HashMap::from([("linear.weight", randn((5, 2 * HIDDEN)))]);
    let path = folder.path().join("2_Dense/model.safetensors");
    candle_core::safetensors::save(&weight, path).unwrap();
    assert_eq!(width(), 5);
}

#[test]
fn objects_become_objects() {
    let content = "{\"id\": 1, \"text\": \"It rains.\"}\n{\"text\": 7}\nnot JSON\n{\"text\": \"\"}\n\
                   {\"other\": \"x\"}\n{\"text\": \"The sun.\"}\n";
    let (_folder, input, beside) = folder(content.as_bytes());
    let output = beside("out.jsonl");
    let args = [&input, "--field", "text", "--normalize", "-o", &output];
    let report = json(EMBED, &args);
    assert_eq!(
        (&report["texts"], &report["no_field"], &report["empty"]),
        (&2.into(), &3.into(), &1.into())
    );
    let text = std::fs::read_to_string(&output).unwrap();
    let objects: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 2);
    for (object, start) in objects.iter().zip(["{\"id\"", "{\"text\": \"The sun"]) {
        assert!(content[object["byte"].as_u64().unwrap() as usize..].starts_with(start));
        let vector = object["embedding"].as_array().unwrap();
        let length: f64 = vector.iter().map(|x| x.as_f64().unwrap().powi(2)).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }
}

#[test]
fn what_goes_wrong_is_said_and_leaves_no_file() {
    let (_folder, input, beside) = folder(b"\n \n\n");
    let output = beside("out.safetensors");
    fail(EMBED, &[&input, "-o", &output], "no text in");
    fail(EMBED, &[&input, "-o", &output, "--field", "text"], "no text in");
    fail(EMBED, &[&input, "-o", &beside("out.txt")], "ends in .safetensors or .jsonl");
    fail(EMBED, &["no/such/file", "-o", &output], "no/such/file");
    fail(EMBED, &[&input, "-o", &input], "it is the input");
    fail(EMBED, &[&input, "-o", &output, "--shard", "0/2"], "I from 1 to N");
    fail(EMBED, &[&input, "-o", &output, "--model", "no/such/folder"], "no/such/folder");
    assert!(!Path::new(&output).exists());
    let left: Vec<_> = std::fs::read_dir(Path::new(&input).parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}
