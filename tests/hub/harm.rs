//! A hub that means harm, and processes that get into each other's way.

use super::common::hub_server::{COMMIT, FILES, Hub, ID};
use super::{client, hub_error, offline, whole_files};
use anyhow::Result;
use candle_int8_attention::hub::HubModel;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Everything below a folder.
fn everything(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(everything(&path));
        }
        found.push(path);
    }
    found
}

/// Names that lead out of the cache, or are none.
fn names(outside: &Path) -> Vec<String> {
    let mut names = [
        "../../../outside/NAME",
        "..",
        ".",
        "",
        "a/b",
        "/",
        "..\\..\\outside",
        "C:\\outside",
        ".hidden",
        "%2e%2e%2fx",
        "a:b",
        "a\u{1b}[2J",
    ]
    .map(String::from)
    .to_vec();
    names.push(outside.join("NAME").display().to_string());
    names.push("x".repeat(300));
    names
}

/// `../../../outside/NAME` was written to, and the fetch said Ok.
#[test]
fn etags_and_commits_that_are_no_plain_names_are_refused_before_anything_is_written() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let (cache, outside) = (folder.path().join("a/b/cache"), folder.path().join("outside"));
    std::fs::create_dir_all(&cache)?;
    std::fs::create_dir(&outside)?;
    let before = everything(folder.path());
    for name in names(&outside) {
        let cases = [(Some(name.as_str()), None), (None, Some(name.as_str()))];
        for (etag, commit) in cases {
            let hub = Hub::of_a_model()?;
            hub.set_names(etag, commit);
            let client = client(&hub.endpoint, &cache)?;
            let message = hub_error(HubModel::new(ID).fetch_from(&client));
            assert!(message.contains("config.json"), "{name:?}: {message}");
            assert!(
                HubModel::new(ID).fetch_llama_from(&client, Some("model.safetensors")).is_err()
            );
            assert_eq!(everything(folder.path()), before, "{name:?}");
            // Only asked: nothing that could have been written was fetched.
            assert!(hub.requests().iter().all(|request| request.starts_with("HEAD")), "{name:?}");
        }
    }
    Ok(())
}

/// Also the commit of a file that is missing becomes a name.
#[test]
fn the_commit_of_a_missing_file_is_a_plain_name_or_not_written_down() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().join("a/cache");
    std::fs::create_dir_all(&cache)?;
    let before = everything(folder.path());
    for name in names(folder.path()) {
        let hub = Hub::start(HashMap::from([("other", vec![1])]), "404 Not Found")?;
        hub.set_names(None, Some(&name));
        let message = hub_error(HubModel::new(ID).fetch_from(&client(&hub.endpoint, &cache)?));
        assert!(message.contains("config.json"), "{name:?}: {message}");
        assert_eq!(everything(folder.path()), before, "{name:?}");
    }
    Ok(())
}

/// A hub may answer in another way the second time, once it was believed.
#[test]
fn a_hub_that_changes_its_mind_writes_nothing_outside() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().join("a/cache");
    let hub = Hub::of_a_model()?;
    let client = client(&hub.endpoint, &cache)?;
    HubModel::new(ID).fetch_config_from(&client)?;
    hub.set_names(Some("../../../outside"), None);
    assert!(HubModel::new(ID).fetch_from(&client).is_err());
    hub.set_names(None, Some("../../../outside"));
    assert!(HubModel::new(ID).fetch_from(&client).is_err());
    let all = everything(folder.path());
    assert!(all.iter().all(|path| *path == folder.path().join("a") || path.starts_with(&cache)));
    // What was fetched before is still good.
    assert!(offline().fetch_config_from(&client).is_ok());
    Ok(())
}

/// A reference that leads elsewhere, whoever wrote it.
#[test]
fn a_branch_of_the_cache_that_names_no_commit_leads_nowhere() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().join("cache");
    let model = cache.join("models--someone--some-model");
    std::fs::create_dir_all(model.join("refs"))?;
    std::fs::create_dir_all(model.join("snapshots"))?;
    std::fs::write(model.join("refs/main"), "../..")?;
    std::fs::write(cache.join("config.json"), "{}")?;
    let client = client("http://127.0.0.1:1", &cache)?;
    let message = hub_error(offline().fetch_config_from(&client));
    assert!(message.contains("not in the local cache"), "{message}");
    Ok(())
}

/// What was renamed into the cache but not yet verified was trusted by others.
#[test]
fn a_content_has_no_name_before_it_is_verified() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::of_a_model()?;
    let client = client(&hub.endpoint, cache.path())?;
    hub.set_slow(true);
    std::thread::scope(|scope| -> Result<()> {
        let fetching = scope.spawn(|| HubModel::new(ID).fetch_from(&client));
        let known: Vec<&Vec<u8>> = hub.files.values().collect();
        let mut seen_early = 0;
        while !fetching.is_finished() {
            // At any time: what has a name is whole.
            let named = everything(&cache.path().join("models--someone--some-model/blobs"));
            for path in named.iter().filter(|path| {
                path.file_name().is_some_and(|name| name.len() == 40 || name.len() == 64)
            }) {
                let content = std::fs::read(path)?;
                assert!(known.iter().any(|known| **known == content), "{}", path.display());
            }
            seen_early +=
                usize::from(named.iter().any(|path| path.to_string_lossy().contains(".tmp")));
        }
        assert!(seen_early > 0, "the test saw no download under way");
        hub.check_files(&fetching.join().expect("no panic")?)
    })
}

#[test]
fn processes_that_download_a_model_at_once_all_end_with_good_files() -> Result<()> {
    for _ in 0..5 {
        let cache = tempfile::tempdir()?;
        let hub = Hub::of_a_model()?;
        let fetch = || {
            HubModel::new(ID)
                .fetch_from(&client(&hub.endpoint, cache.path())?)
                .map_err(anyhow::Error::from)
        };
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..6).map(|_| scope.spawn(fetch)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        for files in all {
            hub.check_files(&files?)?;
        }
        let contents = whole_files(cache.path());
        assert!(contents.iter().all(|found| hub.files.values().any(|whole| whole == found)));
    }
    Ok(())
}

/// What a process that was killed left behind is neither taken for a file nor in the way.
#[test]
fn what_a_killed_process_left_is_not_taken_for_a_file() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let hub = Hub::of_a_model()?;
    let client = client(&hub.endpoint, cache.path())?;
    let blobs = cache.path().join("models--someone--some-model/blobs");
    std::fs::create_dir_all(&blobs)?;
    std::fs::write(blobs.join(".tmpAbCdEf"), b"half")?;
    let files = HubModel::new(ID).fetch_from(&client)?;
    hub.check_files(&files)?;
    for name in FILES {
        let content = std::fs::read(files.config.with_file_name(name))?;
        assert!(content == hub.files[name]);
    }
    assert!(
        files
            .config
            .starts_with(cache.path().join("models--someone--some-model/snapshots").join(COMMIT))
    );
    Ok(())
}
