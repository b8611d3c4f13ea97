//! The cache of all Hugging Face tools, as this one writes it.
//!
//! ```text
//! models--owner--name/
//!   refs/REVISION             the commit that a branch or tag names
//!   snapshots/COMMIT/FILE     a link to its content
//!   blobs/ETAG                contents
//!   .no_exist/COMMIT/FILE     files that a commit does not have
//! .locks/models--owner--name/ETAG.lock
//! ```
//!
//! A content takes its name in `blobs` when all of it is there and is what the hub has: whatever
//! finds it there may trust it as much as the hub. Until then it has a name of its own, which goes
//! away with the process, so that two processes do not write to one file.

use super::client::{Answer, Failure, is_commit};
use crate::files;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The folder of one model.
pub(super) struct Cache {
    root: PathBuf,
    folder: String,
}

/// What the cache knows of a file of a revision.
pub(super) enum Known {
    File(PathBuf),
    /// The commit has no such file.
    Missing,
    Nothing,
}

impl Cache {
    /// Of the model `id`, whose parts are plain names.
    pub(super) fn new(root: &Path, id: &str) -> Self {
        Self { root: root.to_path_buf(), folder: format!("models--{}", id.replace('/', "--")) }
    }

    fn path(&self, parts: [&str; 3]) -> PathBuf {
        let [kind, middle, name] = parts;
        let path = self.root.join(&self.folder).join(kind).join(middle);
        if name.is_empty() { path } else { path.join(name) }
    }

    /// Looks a file up without the hub.
    pub(super) fn find(&self, revision: &str, name: &str) -> Known {
        let named = match is_commit(revision) {
            true => Some(revision.to_string()),
            false => std::fs::read_to_string(self.path(["refs", revision, ""])).ok(),
        };
        // Whoever wrote it: no other name than that of a commit leads anywhere.
        let commit = named.map(|text| text.trim().to_string()).filter(|text| is_commit(text));
        let Some(commit) = commit else { return Known::Nothing };
        let path = self.path(["snapshots", &commit, name]);
        match (path.exists(), self.path([".no_exist", &commit, name]).exists()) {
            (true, _) => Known::File(path),
            (false, true) => Known::Missing,
            (false, false) => Known::Nothing,
        }
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.path(["blobs", etag, ""])
    }

    /// Waits for other processes that download this content, as other tools do too. Where the
    /// system has no such locks, both download it.
    pub(super) fn lock(&self, etag: &str) -> Option<File> {
        let folder = self.root.join(".locks").join(&self.folder);
        std::fs::create_dir_all(&folder).ok()?;
        let file = File::create(folder.join(format!("{etag}.lock"))).ok()?;
        file.lock().ok()?;
        Some(file)
    }

    /// A file for a content that is not there yet.
    pub(super) fn new_blob(&self) -> Result<NamedTempFile, Failure> {
        let folder = self.path(["blobs", "", ""]);
        let make = || {
            std::fs::create_dir_all(&folder)?;
            files::new_file(&folder)
        };
        make().map_err(|error| Failure::Cache(folder.clone(), error))
    }

    /// Gives a content that is the hub's its name.
    pub(super) fn keep(&self, content: NamedTempFile, etag: &str) -> Result<(), Failure> {
        let blob = self.blob(etag);
        files::persist(content, &blob).map_err(|error| Failure::Cache(blob, error))
    }

    /// Writes down what a revision and a file of it are, and gives the file's path.
    pub(super) fn link(
        &self,
        answer: &Answer,
        revision: &str,
        name: &str,
    ) -> Result<PathBuf, Failure> {
        let path = self.path(["snapshots", &answer.commit, name]);
        let failed = |error| Failure::Cache(path.clone(), error);
        self.refer(revision, &answer.commit)?;
        let folder = path.parent().unwrap_or(&self.root);
        std::fs::create_dir_all(folder).map_err(failed)?;
        point(&path, &self.blob(&answer.etag), name.split('/').count()).map_err(failed)?;
        Ok(path)
    }

    /// Writes down that a commit does not have a file.
    pub(super) fn mark_missing(
        &self,
        revision: &str,
        commit: &str,
        name: &str,
    ) -> Result<(), Failure> {
        let path = self.path([".no_exist", commit, name]);
        let failed = |error| Failure::Cache(path.clone(), error);
        std::fs::create_dir_all(path.parent().unwrap_or(&self.root)).map_err(failed)?;
        std::fs::write(&path, b"").map_err(failed)?;
        self.refer(revision, commit)
    }

    fn refer(&self, revision: &str, commit: &str) -> Result<(), Failure> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.path(["refs", revision, ""]);
        let folder = path.parent().unwrap_or(&self.root);
        let write = || {
            std::fs::create_dir_all(folder)?;
            let mut file = files::new_file(folder)?;
            file.write_all(commit.as_bytes())?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        write().map_err(|error| Failure::Cache(path.clone(), error))
    }
}

/// Makes `path`, `depth` names below its commit, a link to a content.
#[cfg(unix)]
fn point(path: &Path, blob: &Path, depth: usize) -> std::io::Result<()> {
    let name = blob.file_name().unwrap_or_default();
    let target = PathBuf::from("../".repeat(depth + 1)).join("blobs").join(name);
    if std::fs::read_link(path).is_ok_and(|known| known == target) {
        return Ok(());
    }
    // Beside, then renamed: another process finds a whole link or none.
    let folder = path.parent().unwrap_or(Path::new("."));
    let beside = tempfile::Builder::new()
        .make_in(folder, |link| std::os::unix::fs::symlink(&target, link))?;
    std::fs::rename(beside.path(), path)?;
    // The name is gone, so there is nothing to remove.
    beside.into_temp_path().keep().ok();
    Ok(())
}

/// Where links need rights that users do not have, a snapshot holds copies.
#[cfg(not(unix))]
fn point(path: &Path, blob: &Path, _depth: usize) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut copy = files::new_file(folder)?;
    std::io::copy(&mut File::open(blob)?, &mut copy)?;
    files::persist(copy, path)
}

impl Failure {
    /// Whether the cache may serve in the place of the hub.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Failure::Unreachable(_) => true,
            Failure::Status { status, .. } => super::client::is_transient(*status),
            Failure::Cache(_, error) => error.kind() == ErrorKind::Interrupted,
            _ => false,
        }
    }
}
