//! Files that programs write.

use anyhow::{Context, Result, ensure};
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
        let mut builder = tempfile::Builder::new();
        builder.prefix(".new-").suffix(".tmp");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As for any other new file; the umask takes its part.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder(&target));
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { target, file })
    }

    /// Fills the file, and gives it its name.
    pub fn write(mut self, fill: impl FnOnce(&mut NamedTempFile) -> Result<()>) -> Result<()> {
        let cannot = || format!("cannot write {}", self.target.display());
        fill(&mut self.file).with_context(cannot)?;
        // The error of `persist` itself tells its cause twice.
        self.file.persist(&self.target).map_err(|e| e.error).with_context(cannot)?;
        Ok(())
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

/// The folder in which a file lies.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}
