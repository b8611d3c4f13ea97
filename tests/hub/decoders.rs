//! Decoders: in several files, in one, and as GGUF.

use super::{FILES, Hub, ID, client, closed_endpoint, hub_error, offline};
use anyhow::Result;
use candle_int8_attention::hub::HubModel;
use std::collections::HashMap;

/// The files of a decoder whose weights are in two files.
fn decoder_in_shards() -> HashMap<&'static str, Vec<u8>> {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    HashMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("generation_config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.as_bytes().to_vec()),
        ("model-1.safetensors", b"one".to_vec()),
        ("model-2.safetensors", b"two".to_vec()),
    ])
}

#[test]
fn a_decoder_in_shards_is_downloaded_and_then_found_offline() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let files = decoder_in_shards();
    let hub = Hub::start(files.clone(), "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let folder = HubModel::new(ID).fetch_llama_from(&client, None)?;
    for (name, content) in &files {
        assert_eq!(&std::fs::read(folder.join(name))?, content, "{name}");
    }
    hub.requests();
    assert_eq!(offline().fetch_llama_from(&client, None)?, folder);
    assert_eq!(hub.requests(), [""; 0], "offline touched the network");
    std::fs::remove_file(folder.join("model-2.safetensors"))?;
    let message = hub_error(offline().fetch_llama_from(&client, None));
    assert!(message.contains("model-2.safetensors is not in the local cache"), "{message}");
    Ok(())
}

#[test]
fn a_decoder_in_one_file_is_downloaded_without_what_it_lacks() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let files = HashMap::from(FILES.map(|name| (name, name.as_bytes().to_vec())));
    let hub = Hub::start(files, "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let folder = HubModel::new(ID).fetch_llama_from(&client, None)?;
    assert!(FILES.iter().all(|name| folder.join(name).is_file()));
    assert!(!folder.join("model.safetensors.index.json").exists());
    assert_eq!(offline().fetch_llama_from(&client, None)?, folder);

    // Again: only whether the branch has moved is asked, not for the files that it lacks.
    hub.requests();
    assert_eq!(HubModel::new(ID).fetch_llama_from(&client, None)?, folder);
    assert_eq!(hub.requests(), [format!("HEAD /{ID}/resolve/main/config.json")]);
    // The hub is gone.
    let gone = self::client(&closed_endpoint(), cache.path())?;
    assert_eq!(HubModel::new(ID).fetch_llama_from(&gone, None)?, folder);
    Ok(())
}

#[test]
fn a_gguf_file_is_downloaded_alone() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::start(HashMap::from([("m.gguf", b"GGUF".to_vec())]), "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let path = HubModel::new(ID).fetch_llama_from(&client, Some("m.gguf"))?;
    assert_eq!(std::fs::read(path)?, b"GGUF");
    let message = hub_error(HubModel::new(ID).fetch_llama_from(&client, Some("other.gguf")));
    assert!(message.contains("no other.gguf"), "{message}");
    Ok(())
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let mut files = decoder_in_shards();
    let index = br#"{"weight_map": {"a": "../../secret"}}"#.to_vec();
    files.insert("model.safetensors.index.json", index);
    let hub = Hub::start(files, "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let error = HubModel::new(ID).fetch_llama_from(&client, None).unwrap_err();
    assert!(error.to_string().contains("\"../../secret\", expected a file beside it"), "{error}");
    Ok(())
}
