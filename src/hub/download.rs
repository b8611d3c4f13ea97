//! What is seen of a download, and whether what arrived is what the hub has.
//!
//! hf-hub 1.0 checks neither: a body of any status and content would stay in the cache under the
//! name of the file that was asked for.

use hf_hub::progress::{DownloadEvent, FileStatus, ProgressEvent, ProgressHandler};
use indicatif::{ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The download of one file. Nothing is drawn before bytes arrive, nor if stderr is no terminal.
pub(super) struct Download {
    bar: ProgressBar,
    /// Whether bytes were asked for, and not found in the cache.
    started: AtomicBool,
    /// The size that the hub names; 0 if it names none.
    size: AtomicU64,
}

impl Download {
    pub(super) fn new(name: &str) -> Self {
        let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style =
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
        Self {
            bar: ProgressBar::new(0).with_style(style).with_message(name.to_string()),
            started: AtomicBool::new(false),
            size: AtomicU64::new(0),
        }
    }

    /// Compares a file that was downloaded with the hash and the size that the hub named, and
    /// removes it from the cache if it is another. A file that was in the cache already is not
    /// read.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidData`] with what the file is instead, or why it cannot be read.
    pub(super) fn verify(&self, path: &Path) -> std::io::Result<()> {
        if !self.started.load(Ordering::Relaxed) {
            return Ok(());
        }
        let blob = std::fs::canonicalize(path)?;
        let Some(problem) = problem(&blob, self.size.load(Ordering::Relaxed))? else {
            return Ok(());
        };
        // The content before its link: without content the link counts as no file, but content
        // without a link would be linked again, unseen.
        std::fs::remove_file(&blob)?;
        match std::fs::remove_file(path) {
            // Where the cache has no links, they are the same.
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Err(std::io::Error::new(ErrorKind::InvalidData, problem)),
        }
    }
}

impl ProgressHandler for Download {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.size.store(*total_bytes, Ordering::Relaxed);
                self.bar.set_length(*total_bytes);
            }
            DownloadEvent::Progress { files } => {
                for file in files {
                    // What is in the cache is complete without having started.
                    if file.status != FileStatus::Complete {
                        self.started.store(true, Ordering::Relaxed);
                    }
                    self.bar.set_position(file.bytes_completed);
                }
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                self.started.store(true, Ordering::Relaxed);
                self.bar.set_position(*bytes_completed);
            }
            DownloadEvent::Complete => self.bar.finish_and_clear(),
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        // A failed download sends no Complete.
        self.bar.finish_and_clear();
    }
}

/// In what a file of the cache is not what the hub has; `expected` is its size there, 0 if unknown.
/// A hash decides alone if there is one: a proxy that compresses names other sizes.
fn problem(blob: &Path, expected: u64) -> std::io::Result<Option<String>> {
    let size = std::fs::metadata(blob)?.len();
    let wrong_size = (expected != 0 && size != expected)
        .then(|| format!("has {size} bytes, expected {expected}"));
    let Some(name) = hash_in_name(blob) else { return Ok(wrong_size) };
    let (kind, found) = match name.len() {
        64 => ("SHA-256", hash(Sha256::new(), blob)?),
        _ => {
            let prefix = format!("blob {size}\0");
            ("git id", hash(Sha1::new().chain_update(prefix), blob)?)
        }
    };
    let wrong_hash = (found != name).then(|| format!("has the {kind} {found}, expected {name}"));
    Ok(wrong_hash.map(|wrong_hash| wrong_size.unwrap_or(wrong_hash)))
}

/// The cache names contents by the ETag of the hub: the SHA-256 of a large file, and of others the
/// id that git gives to their content. Other hubs may have ETags that are no hash.
fn hash_in_name(blob: &Path) -> Option<String> {
    let in_blobs = blob.parent()?.file_name()? == "blobs";
    let name = blob.file_name()?.to_str()?.to_lowercase();
    let is_hash = [40, 64].contains(&name.len()) && name.bytes().all(|b| b.is_ascii_hexdigit());
    (in_blobs && is_hash).then_some(name)
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
