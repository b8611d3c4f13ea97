//! Where reports go.

use anyhow::{Context, Result, ensure};
use candle_int8_attention::drift::{Gate, Report};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A page to be written: a temporary file beside it becomes the page when it is complete.
pub struct Html {
    path: PathBuf,
    file: NamedTempFile,
}

impl Html {
    /// Fails at once where nothing can be written.
    pub fn create(path: &Path) -> Result<Self> {
        ensure!(!path.is_dir(), "cannot write {}: it is a folder", path.display());
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let file = new_file(folder).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    pub fn write(mut self, page: &str) -> Result<()> {
        let failed = || format!("cannot write {}", self.path.display());
        self.file.write_all(page.as_bytes()).with_context(failed)?;
        self.file.persist(&self.path).with_context(failed)?;
        Ok(())
    }
}

/// A temporary file is for its owner alone, but a page is for everyone the umask lets read it.
fn new_file(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    let permissions: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions);
    builder.prefix(".drift-").tempfile_in(folder)
}

/// The report for the terminal, with the gate's verdict.
pub fn render(report: &Report, gate: Option<&Gate>) -> String {
    let mut text = report.to_text();
    if let Some(gate) = gate {
        let _ = match gate.violations(report).len() {
            0 => writeln!(text, "\nGate: every threshold holds."),
            1 => writeln!(text, "\nGate: a threshold does not hold in one place."),
            n => writeln!(text, "\nGate: thresholds do not hold in {n} places."),
        };
    }
    text
}
