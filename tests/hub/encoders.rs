//! Encoders: what sentence-transformers stores beside them, and weights in several files.

use super::{Hub, ID, client, offline};
use anyhow::Result;
use candle_int8_attention::hub::HubModel;
use std::collections::HashMap;

/// The files of an encoder in two parts, with these modules.
fn encoder(modules: &str) -> HashMap<&'static str, Vec<u8>> {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    HashMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("modules.json", modules.as_bytes().to_vec()),
        ("1_Pooling/config.json", b"{}".to_vec()),
        ("2_Dense/config.json", b"{}".to_vec()),
        ("sentence_bert_config.json", b"{}".to_vec()),
        ("config_sentence_transformers.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.as_bytes().to_vec()),
        ("model-1.safetensors", b"one".to_vec()),
        ("model-2.safetensors", b"two".to_vec()),
    ])
}

#[test]
fn an_encoder_comes_with_its_modules_and_all_parts_of_its_weights() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let modules = r#"[{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1_Pooling"},
                      {"type": "a.Dense", "path": "2_Dense"}, {"type": "a.Normalize", "path": "3"}]"#;
    let hub = Hub::start(encoder(modules), "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let found = HubModel::new(ID).fetch_from(&client)?;
    let folder = found.config.parent().expect("a folder");
    assert_eq!(found.weights, folder.join("model.safetensors.index.json"));
    for name in [
        "model-1.safetensors",
        "model-2.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
    ] {
        assert!(folder.join(name).is_file(), "{name}");
    }
    hub.requests();
    assert_eq!(offline().fetch_from(&client)?, found);
    assert_eq!(hub.requests(), [""; 0], "offline touched the network");
    // Again: whether the branch has moved is asked, and nothing is fetched.
    assert_eq!(HubModel::new(ID).fetch_from(&client)?, found);
    let requests = hub.requests();
    assert!(requests.iter().all(|r| r.starts_with("HEAD")), "{requests:?}");
    Ok(())
}

#[test]
fn modules_that_lead_elsewhere_are_refused() -> Result<()> {
    for path in ["../2_Dense", "/2_Dense", "2 Dense"] {
        let cache = tempfile::tempdir()?;
        let modules = format!(r#"[{{"type": "a.Dense", "path": "{path}"}}]"#);
        let hub = Hub::start(encoder(&modules), "404 Not Found")?;
        let client = client(&hub.endpoint, cache.path())?;
        let error = HubModel::new(ID).fetch_from(&client).unwrap_err().to_string();
        assert!(error.contains("modules.json") && error.contains("2"), "{error}");
        let requests = hub.requests();
        assert!(!requests.iter().any(|request| request.contains("Dense")), "{requests:?}");
    }
    Ok(())
}
