//! Files that programs write.

use anyhow::{Context, Result, ensure};
use std::path::Path;

/// The folder in which a file lies.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

/// Refuses what cannot be written, before minutes have gone into its content.
pub fn check_writable(path: &Path) -> Result<()> {
    let cannot = || format!("cannot write {}", path.display());
    ensure!(!path.is_dir(), "cannot write {}: it is a folder", path.display());
    tempfile::tempfile_in(folder(path)).with_context(cannot)?;
    Ok(())
}
