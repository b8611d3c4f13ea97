//! The Hugging Face Hub: unreachable, offline, and a small one on the loopback interface.

use anyhow::Result;
use candle_int8_attention::Error;
use candle_int8_attention::hub::HubModel;
use hf_hub::{HFClient, HFClientSync};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "someone/some-model";
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

fn client(endpoint: &str, cache: &Path) -> Result<HFClientSync> {
    let client =
        HFClient::builder().endpoint(endpoint).cache_dir(cache).retry_max_attempts(0).build()?;
    Ok(HFClientSync::from_inner(client)?)
}

/// A port on which nobody listens.
fn closed_endpoint() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
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

// ---- a hub of our own ---------------------------------------------------------------------------

/// Serves `files` of one model as the hub does, and notes the requests.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: HashMap<&'static str, Vec<u8>>, missing: &'static str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let requests = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&requests);
        // The thread ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &files, missing, &noted).ok();
            }
        });
        Ok(Self { endpoint, requests })
    }
}

fn answer(
    mut stream: TcpStream,
    files: &HashMap<&'static str, Vec<u8>>,
    missing: &str,
    requests: &Mutex<Vec<String>>,
) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    requests
        .lock()
        .unwrap()
        .push(request.rsplit_once(' ').map_or("", |(head, _)| head).to_string());
    let Some(body) = files.get(file) else {
        write!(stream, "HTTP/1.1 {missing}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        return Ok(());
    };
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nETag: \"etag-of-{file}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    if request.starts_with("GET") {
        stream.write_all(body)?;
    }
    Ok(())
}

#[test]
fn a_model_is_downloaded_once_and_then_found_offline() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let files = FILES.map(|name| (name, name.repeat(1000).into_bytes()));
    let hub = Hub::start(HashMap::from(files.clone()), "404 Not Found")?;
    let client = client(&hub.endpoint, cache.path())?;

    let found = HubModel::new(ID).fetch_from(&client)?;
    for ((name, content), path) in
        files.iter().zip([&found.config, &found.weights, &found.tokenizer])
    {
        assert_eq!(&std::fs::read(path)?, content, "{name}");
    }
    let requests = hub.requests.lock().unwrap().clone();
    // Once the branch is resolved, everything comes from its commit.
    assert!(requests.contains(&format!("GET /{ID}/resolve/main/config.json")), "{requests:?}");
    assert!(
        requests.contains(&format!("GET /{ID}/resolve/{COMMIT}/model.safetensors")),
        "{requests:?}"
    );

    assert_eq!(offline().fetch_from(&client)?, found);
    assert_eq!(hub.requests.lock().unwrap().len(), requests.len(), "offline touched the network");
    Ok(())
}

#[test]
fn what_the_hub_refuses_is_told() -> Result<()> {
    for (status, words) in [
        ("404 Not Found", ["no config.json", "does not exist"]),
        ("401 Unauthorized", ["HF_TOKEN", "private"]),
        ("403 Forbidden", ["HF_TOKEN", "gated"]),
        ("418 I'm a teapot", ["config.json could not be fetched", "418"]),
    ] {
        let cache = tempfile::tempdir()?;
        let hub = Hub::start(HashMap::new(), status)?;
        let message =
            hub_error(HubModel::new(ID).fetch_from(&client(&hub.endpoint, cache.path())?));
        for word in words {
            assert!(message.contains(word), "{status}: {word:?} is not in: {message}");
        }
    }
    Ok(())
}

// ---- decoders -----------------------------------------------------------------------------------

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
    let requests = hub.requests.lock().unwrap().len();
    assert_eq!(offline().fetch_llama_from(&client, None)?, folder);
    assert_eq!(hub.requests.lock().unwrap().len(), requests, "offline touched the network");
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
