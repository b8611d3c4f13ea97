//! The output file: complete, or not there.

use crate::common::output::folder;
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file that takes its name when it is complete.
pub struct Output {
    path: PathBuf,
    file: NamedTempFile,
}

impl Output {
    /// Before anything is computed, so that a place that cannot be written is known at once.
    pub fn create(path: &Path, input: &Path) -> Result<Self> {
        let cannot = || format!("cannot write {path:?}");
        // A link keeps pointing where it points.
        let path = &path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        ensure!(!path.is_dir(), "cannot write {path:?}: it is a folder");
        ensure!(
            !path.exists() || path.is_file(),
            "cannot write {path:?}: expected a regular file, or none yet"
        );
        let same = input.canonicalize().is_ok_and(|input| input == *path);
        ensure!(!same, "cannot write {path:?}: it is the input");
        let mut builder = tempfile::Builder::new();
        builder.prefix(".attend-").suffix(".tmp");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As for any other new file; the umask takes its part.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder(path)).with_context(cannot)?;
        Ok(Self { path: path.clone(), file })
    }

    pub fn write(self, out: &Tensor, scores: Option<&Tensor>) -> Result<()> {
        let cannot = || format!("cannot write {:?}", self.path);
        let mut tensors = HashMap::from([("out", out.clone())]);
        tensors.extend(scores.map(|scores| ("scores", scores.clone())));
        let permissions = self.file.as_file().metadata().with_context(cannot)?.permissions();
        // It puts a file of its own, for the owner alone, in the place of ours.
        candle_core::safetensors::save(&tensors, self.file.path()).with_context(cannot)?;
        std::fs::set_permissions(self.file.path(), permissions).with_context(cannot)?;
        self.file.persist(&self.path).with_context(|| format!("cannot write {:?}", self.path))?;
        Ok(())
    }
}
