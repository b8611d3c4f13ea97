//! The bytes of a file on their way into the cache: shown, and compared with what the hub says that
//! they are before they get a name there.

use super::cache::{Cache, Known};
use super::client::{Answer, Failure, HubClient, RemoteFile};
use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The path of a file in the cache, after it was downloaded if it must be.
pub(super) fn fetch(
    client: &HubClient,
    cache: &Cache,
    file: &RemoteFile<'_>,
    offline: bool,
) -> Result<PathBuf, Failure> {
    let known = |otherwise: Failure| match cache.find(file.revision, file.name) {
        Known::File(path) => Ok(path),
        Known::Missing => Err(Failure::Status { status: 404, commit: None }),
        Known::Nothing => Err(otherwise),
    };
    // What a commit has stays so.
    if offline || super::client::is_commit(file.revision) {
        match known(Failure::NotCached) {
            Err(Failure::NotCached) if !offline => {}
            done => return done,
        }
    }
    match client.ask(file) {
        Ok(answer) => {
            if !cache.blob(&answer.etag).is_file() {
                download(client, cache, file, &answer)?;
            }
            cache.link(&answer, file.revision, file.name)
        }
        Err(Failure::Status { status: 404, commit }) => {
            if let Some(commit) = commit.as_ref().filter(|commit| super::client::is_commit(commit))
            {
                cache.mark_missing(file.revision, commit, file.name)?;
            }
            Err(Failure::Status { status: 404, commit })
        }
        Err(failure) if failure.is_transient() => known(failure),
        Err(failure) => Err(failure),
    }
}

/// Brings the content that `answer` names into the cache.
fn download(
    client: &HubClient,
    cache: &Cache,
    file: &RemoteFile<'_>,
    answer: &Answer,
) -> Result<(), Failure> {
    let _lock = cache.lock(&answer.etag);
    // Another process may have brought it meanwhile.
    if cache.blob(&answer.etag).is_file() {
        return Ok(());
    }
    // Of this very commit, even if the branch has moved since it was asked.
    let body = client.get(&RemoteFile { revision: &answer.commit, ..*file })?;
    let mut content = cache.new_blob()?;
    copy(body, &mut content, file.name, answer)?;
    let failed = |error| Failure::Cache(content.path().to_path_buf(), error);
    match problem(content.path(), answer).map_err(failed)? {
        Some(problem) => Err(Failure::Damaged(problem)),
        None => cache.keep(content, &answer.etag),
    }
}

/// Writes what arrives, with a progress bar on stderr if that is a terminal.
fn copy(
    mut from: impl Read,
    to: &mut NamedTempFile,
    name: &str,
    answer: &Answer,
) -> Result<(), Failure> {
    let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style =
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(answer.size.unwrap_or(0)).with_style(style);
    let bar = Shown(bar.with_message(name.to_string()));
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        let read = from.read(&mut buffer).map_err(Failure::of_reading)?;
        if read == 0 {
            return Ok(());
        }
        let written = to.as_file_mut().write_all(&buffer[..read]);
        written.map_err(|error| Failure::Cache(to.path().to_path_buf(), error))?;
        bar.0.inc(read as u64);
    }
}

/// Goes away however a download ends.
struct Shown(ProgressBar);

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// In what a content is not what the hub has. A hash decides alone if there is one: a proxy that
/// compresses names other sizes.
fn problem(content: &Path, answer: &Answer) -> std::io::Result<Option<String>> {
    let size = std::fs::metadata(content)?.len();
    let wrong_size = match answer.size {
        Some(expected) if expected != size => {
            Some(format!("has {size} bytes, expected {expected}"))
        }
        _ => None,
    };
    let expected = answer.etag.to_lowercase();
    let (kind, found) = match expected.len() {
        _ if !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) => return Ok(wrong_size),
        64 => ("SHA-256", hash(Sha256::new(), content)?),
        40 => {
            let prefix = format!("blob {size}\0");
            ("git id", hash(Sha1::new().chain_update(prefix), content)?)
        }
        _ => return Ok(wrong_size),
    };
    let wrong_hash =
        (found != expected).then(|| format!("has the {kind} {found}, expected {expected}"));
    Ok(wrong_hash.map(|wrong_hash| wrong_size.unwrap_or(wrong_hash)))
}

/// The hash of what is in `hasher` already and a file's content, in hexadecimal.
fn hash(mut hasher: impl Digest, path: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
