//! The Hugging Face Hub: unreachable, offline, and a small one on the loopback interface.

mod common;

// Named, so that the files are in a folder of their own.
mod hub {
    mod decoders;
    mod encoders;
    mod harm;

    use super::*;
}

use anyhow::Result;
use candle_int8_attention::Error;
use candle_int8_attention::hub::{HubClient, HubModel, HubOptions};
use common::hub_server::{COMMIT, FILES, Fault, Hub, ID, NO_HASH, WEIGHTS, closed_endpoint};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn client(endpoint: &str, cache: &Path) -> Result<HubClient> {
    let (endpoint, cache) = (Some(endpoint.to_string()), Some(cache.to_path_buf()));
    Ok(HubClient::new(HubOptions { endpoint, cache, retries: Some(0), ..HubOptions::default() })?)
}

fn offline() -> HubModel {
    HubModel { offline: true, ..HubModel::new(ID) }
}

/// The message of the `Error::Hub` that `result` must be.
fn hub_error<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error:?}");
    error.to_string()
}

/// The layout of the cache of all Hugging Face tools: a branch names a commit, a commit has files.
fn fill_cache(cache: &Path, files: &[&str]) -> Result<PathBuf> {
    let model = cache.join("models--someone--some-model");
    let snapshot = model.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(model.join("refs"))?;
    std::fs::create_dir_all(&snapshot)?;
    std::fs::write(model.join("refs/main"), COMMIT)?;
    for file in files {
        std::fs::write(snapshot.join(file), file)?;
    }
    Ok(snapshot)
}

#[test]
fn an_unreachable_hub_is_told() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let message =
        hub_error(HubModel::new(ID).fetch_from(&client(&closed_endpoint(), cache.path())?));
    for word in
        ["someone/some-model@main", "cannot be reached", "refused", "offline", "HF_ENDPOINT"]
    {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    Ok(())
}

#[test]
fn offline_with_an_empty_cache_says_which_file_is_missing() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let message = hub_error(offline().fetch_from(&client(&closed_endpoint(), cache.path())?));
    assert!(message.contains("config.json is not in the local cache"), "{message}");
    fill_cache(cache.path(), &["config.json", "tokenizer.json"])?;
    let message = hub_error(offline().fetch_from(&client(&closed_endpoint(), cache.path())?));
    assert!(message.contains("model.safetensors is not in the local cache"), "{message}");
    Ok(())
}

#[test]
fn offline_with_a_full_cache_finds_the_files() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let snapshot = fill_cache(cache.path(), &FILES)?;
    let client = client(&closed_endpoint(), cache.path())?;
    for revision in [None, Some("main"), Some(COMMIT)] {
        let model = HubModel { revision: revision.map(str::to_string), ..offline() };
        let files = model.fetch_from(&client)?;
        assert_eq!(files.weights, snapshot.join("model.safetensors"));
        assert_eq!(files.config, snapshot.join("config.json"));
        assert_eq!(files.tokenizer, snapshot.join("tokenizer.json"));
    }
    let model = HubModel { revision: Some("v2".into()), ..offline() };
    assert!(hub_error(model.fetch_from(&client)).contains("someone/some-model@v2"));
    Ok(())
}

#[test]
fn the_config_is_found_without_the_rest() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::start(HashMap::from([("config.json", b"{}".to_vec())]), "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;
    let config = HubModel::new(ID).fetch_config_from(&client)?;
    assert_eq!(std::fs::read(&config)?, b"{}");
    hub.requests();
    assert_eq!(offline().fetch_config_from(&client)?, config);
    assert_eq!(hub.requests(), [""; 0], "offline touched the network");
    let refused = HubModel::new("a/b/c").fetch_config_from(&client);
    assert!(hub_error(refused).contains("not a model id"));
    Ok(())
}

#[test]
fn a_commit_in_the_cache_needs_no_network() -> Result<()> {
    let cache = tempfile::tempdir()?;
    fill_cache(cache.path(), &FILES)?;
    let model = HubModel { revision: Some(COMMIT.into()), ..HubModel::new(ID) };
    model.fetch_from(&client(&closed_endpoint(), cache.path())?)?;
    Ok(())
}

#[test]
fn names_that_are_no_names_are_refused() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let client = client(&closed_endpoint(), cache.path())?;
    for id in ["", "/", "a/", "a/b/c", "../b", "a b/c", "a/b?c"] {
        let message = hub_error(HubModel::new(id).fetch_from(&client));
        assert!(message.contains("not a model id"), "{id:?}: {message}");
    }
    for revision in ["", "..", "../main", "a//b"] {
        let model = HubModel { revision: Some(revision.into()), ..HubModel::new(ID) };
        let message = hub_error(model.fetch_from(&client));
        assert!(message.contains("not a revision"), "{revision:?}: {message}");
    }
    Ok(())
}

/// Everything in the cache under the name of a file that is whole, by its content.
fn whole_files(cache: &Path) -> Vec<Vec<u8>> {
    let model = cache.join("models--someone--some-model");
    let mut contents = Vec::new();
    for folder in [model.join("blobs"), model.join("snapshots").join(COMMIT)] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "incomplete") {
                contents.extend(std::fs::read(path));
            }
        }
    }
    contents
}

#[test]
fn a_model_is_downloaded_once() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::of_a_model()?;
    let client = client(&hub.endpoint, cache.path())?;
    let model = HubModel::new(ID);

    let found = model.fetch_from(&client)?;
    hub.check_files(&found)?;
    let requests = hub.requests();
    let asked = |request: &str| requests.iter().any(|r| r == request);
    // Once the branch is resolved, everything comes from its commit; weights from the store.
    assert!(asked(&format!("GET /{ID}/resolve/{COMMIT}/config.json")), "{requests:?}");
    assert!(asked(&format!("HEAD /{ID}/resolve/main/config.json")), "{requests:?}");
    assert!(asked(&format!("HEAD /{ID}/resolve/{COMMIT}/model.safetensors")), "{requests:?}");
    assert!(asked("GET /store/model.safetensors"), "{requests:?}");

    // Again: whether the branch has moved is asked, and nothing is fetched.
    assert_eq!(model.fetch_from(&client)?, found);
    let requests = hub.requests();
    assert!(!requests.is_empty() && requests.iter().all(|r| r.starts_with("HEAD")), "{requests:?}");

    // Offline: nothing is asked.
    assert_eq!(offline().fetch_from(&client)?, found);
    assert_eq!(hub.requests(), [""; 0]);

    // The hub is gone: what is in the cache is used.
    let gone = self::client(&closed_endpoint(), cache.path())?;
    for model in [HubModel::new(ID), offline()] {
        assert_eq!(model.fetch_from(&gone)?, found);
    }
    Ok(())
}

#[test]
fn a_renamed_model_is_followed() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::of_a_model()?;
    let found =
        HubModel::new("someone/old-name").fetch_from(&client(&hub.endpoint, cache.path())?)?;
    hub.check_files(&found)
}

/// A redirect names a path of the host, in which that of the hub is.
#[test]
fn a_renamed_model_is_followed_in_a_hub_below_a_path() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::of_a_model()?;
    let endpoint = format!("{}/hf/", hub.endpoint);
    let found = HubModel::new("someone/old-name").fetch_from(&client(&endpoint, cache.path())?)?;
    hub.check_files(&found)?;
    for request in hub.requests() {
        let path = request.split_once(' ').map_or("", |(_, path)| path);
        let below = ["/hf/someone/old-name/", "/hf/someone/some-model/", "/store/"];
        assert!(below.iter().any(|start| path.starts_with(start)), "{request}");
    }
    Ok(())
}

/// After a fault with `file`: nothing in the cache is damaged, the file is not in it, and without the
/// fault everything arrives.
fn check_recovery(hub: &Hub, client: &HubClient, (file, cache): (&str, &Path)) -> Result<()> {
    assert!(whole_files(cache).iter().all(|x| hub.files.values().any(|y| x == y)));
    let message = hub_error(offline().fetch_from(client));
    assert!(message.contains(&format!("{file} is not in the local cache")), "{message}");
    hub.set_fault(None);
    hub.check_files(&HubModel::new(ID).fetch_from(client)?)
}

#[test]
fn a_download_that_breaks_off_starts_anew() -> Result<()> {
    for file in FILES {
        let cache = tempfile::tempdir()?;
        let hub = Hub::of_a_model()?;
        let client = client(&hub.endpoint, cache.path())?;
        hub.set_fault(Some((file, Fault::BreaksOff)));
        let message = hub_error(HubModel::new(ID).fetch_from(&client));
        for word in [&format!("download of {file} broke off"), "run it again", "anew"] {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
        check_recovery(&hub, &client, (file, cache.path()))?;
    }
    Ok(())
}

#[test]
fn what_arrives_damaged_is_not_kept() -> Result<()> {
    for file in FILES {
        for fault in [Fault::Shorter, Fault::EndsEarly, Fault::OtherBit] {
            let cache = tempfile::tempdir()?;
            let hub = Hub::of_a_model()?;
            let client = client(&hub.endpoint, cache.path())?;
            hub.set_fault(Some((file, fault)));
            // The second time, nothing of the first is taken for the file.
            for _ in 0..2 {
                let message = hub_error(HubModel::new(ID).fetch_from(&client));
                for word in [file, "damaged and was not kept", "expected", "run it again"] {
                    assert!(message.contains(word), "{fault:?}: {word:?} is not in: {message}");
                }
                if fault == Fault::OtherBit {
                    let kind = if file == WEIGHTS { "SHA-256" } else { "git id" };
                    assert!(message.contains(kind), "{message}");
                }
            }
            check_recovery(&hub, &client, (file, cache.path()))?;
        }
    }
    Ok(())
}

/// A page of an error was once kept as the file.
#[test]
fn another_answer_than_the_file_is_told_and_not_kept() -> Result<()> {
    for file in FILES {
        for (status, says) in [
            ("500 Internal Server Error", "the hub has a problem (status 500)"),
            ("401 Unauthorized", "may not be read"),
            ("404 Not Found", "does not exist, or lacks the file"),
            ("418 I'm a teapot", "could not be fetched: status 418"),
        ] {
            let cache = tempfile::tempdir()?;
            let hub = Hub::of_a_model()?;
            let client = client(&hub.endpoint, cache.path())?;
            hub.set_fault(Some((file, Fault::Status(status))));
            for _ in 0..2 {
                let message = hub_error(HubModel::new(ID).fetch_from(&client));
                assert!(message.contains(says), "{message}");
            }
            check_recovery(&hub, &client, (file, cache.path()))?;
        }
    }
    Ok(())
}

#[test]
fn without_a_hash_the_size_is_compared() -> Result<()> {
    let hub = Hub::start(HashMap::from([(NO_HASH, b"GGUF".repeat(5000))]), "404 Not Found")?;
    for fault in [Fault::Shorter, Fault::EndsEarly] {
        let cache = tempfile::tempdir()?;
        let client = client(&hub.endpoint, cache.path())?;
        hub.set_fault(Some((NO_HASH, fault)));
        let message = hub_error(HubModel::new(ID).fetch_llama_from(&client, Some(NO_HASH)));
        for word in ["was not kept", "bytes, expected 20000", "run it again"] {
            assert!(message.contains(word), "{fault:?}: {word:?} is not in: {message}");
        }
        assert!(whole_files(cache.path()).is_empty());
        hub.set_fault(None);
        let path = HubModel::new(ID).fetch_llama_from(&client, Some(NO_HASH))?;
        assert!(std::fs::read(path)? == hub.files[NO_HASH]);
    }
    Ok(())
}

/// What answers may be a page that wants a login.
#[test]
fn what_is_no_hub_is_told() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::start(HashMap::new(), "200 OK")?;
    let message = hub_error(HubModel::new(ID).fetch_from(&client(&hub.endpoint, cache.path())?));
    assert!(message.contains("no hub; check HF_ENDPOINT"), "{message}");
    assert!(whole_files(cache.path()).is_empty());
    Ok(())
}

#[test]
fn what_the_hub_refuses_is_told() -> Result<()> {
    for (status, words) in [
        ("404 Not Found", ["no config.json", "does not exist"]),
        ("401 Unauthorized", ["HF_TOKEN", "private"]),
        ("403 Forbidden", ["HF_TOKEN", "gated"]),
        ("429 Too Many Requests", ["so many requests", "later"]),
        ("500 Internal Server Error", ["500", "try again later"]),
        ("503 Service Unavailable", ["503", "offline mode"]),
        ("418 I'm a teapot", ["config.json could not be fetched", "418"]),
    ] {
        let cache = tempfile::tempdir()?;
        let hub = Hub::start(HashMap::new(), status)?;
        let message =
            hub_error(HubModel::new(ID).fetch_from(&client(&hub.endpoint, cache.path())?));
        for word in words {
            assert!(message.contains(word), "{status}: {word:?} is not in: {message}");
        }
        assert!(whole_files(cache.path()).is_empty());
    }
    Ok(())
}
