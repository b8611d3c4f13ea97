//! Files that programs write.

// The library's own: no public item of it is for files.
#[path = "../../src/files/new_file.rs"]
mod new_file;

use anyhow::{Context, Result, ensure};
use new_file::{beside, persist};
use std::path::{Path, PathBuf, is_separator};
use tempfile::NamedTempFile;

/// A file that takes its name when it is complete.
pub struct NewFile {
    target: PathBuf,
    file: NamedTempFile,
}

impl NewFile {
    /// Before anything is computed, so that a place that cannot be written is known at once.
    pub fn create<'a>(path: &Path, inputs: impl IntoIterator<Item = &'a PathBuf>) -> Result<Self> {
        let target = target(path, inputs)?;
        let file = beside(&target).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { target, file })
    }

    /// Fills the file, and gives it its name once it is on the disk.
    pub fn write(mut self, fill: impl FnOnce(&mut NamedTempFile) -> Result<()>) -> Result<()> {
        let cannot = || format!("cannot write {}", self.target.display());
        fill(&mut self.file).with_context(cannot)?;
        persist(self.file, &self.target).with_context(cannot)
    }
}

/// Refuses what cannot be written, before minutes have gone into its content; where it is to be
/// written.
pub fn check_writable<'a>(
    path: &Path,
    inputs: impl IntoIterator<Item = &'a PathBuf>,
) -> Result<PathBuf> {
    Ok(NewFile::create(path, inputs)?.target)
}

/// What is written for `path`: a regular file or none yet, and none of the inputs.
fn target<'a>(path: &Path, inputs: impl IntoIterator<Item = &'a PathBuf>) -> Result<PathBuf> {
    let shown = path.display();
    ensure!(!path.is_dir(), "cannot write {shown}: it is a folder");
    let text = path.to_string_lossy();
    let name = text.rsplit(is_separator).next().unwrap_or_default();
    ensure!(
        !["", ".", ".."].contains(&name),
        "cannot write {shown}: expected the name of a file at its end"
    );
    ensure!(
        path.exists() || !path.is_symlink(),
        "cannot write {shown}: it is a link to what does not exist"
    );
    // A link keeps pointing where it points.
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    ensure!(
        !path.exists() || path.is_file(),
        "cannot write {shown}: expected a regular file, or none yet"
    );
    let is_input = |input: &PathBuf| input.canonicalize().is_ok_and(|input| input == path);
    ensure!(!inputs.into_iter().any(is_input), "cannot write {shown}: it is the input");
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn write(path: &Path) -> Result<()> {
        let file = NewFile::create(path, [])?;
        file.write(|file| Ok(file.write_all(b"new")?))
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_replaced_hands_its_permissions_on() {
        use std::fs::Permissions;
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for mode in [0o600, 0o640] {
            std::fs::write(&path, b"old").unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            write(&path).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, mode);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_what_does_not_exist_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (nothing, link) = (folder.path().join("nothing"), folder.path().join("link"));
        std::os::unix::fs::symlink(&nothing, &link).unwrap();
        let error = write(&link).unwrap_err().to_string();
        assert!(error.contains("it is a link to what does not exist"), "{error}");
        assert!(link.is_symlink() && !nothing.exists());
    }
}
