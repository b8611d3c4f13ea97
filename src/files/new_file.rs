//! Files that take their name when they are complete. The programs in `examples` compile this file, too.

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::path::Path;
use tempfile::NamedTempFile;

/// A file without a name of its own in the folder of `target`, with its permissions if it exists.
pub(crate) fn beside(target: &Path) -> std::io::Result<NamedTempFile> {
    let folder = folder(target);
    let Ok(replaced) = target.metadata() else { return new_file(folder) };
    // Readable for nobody else until it has the permissions that it is to have.
    let file = NamedTempFile::new_in(folder)?;
    keep_mode(file.as_file(), &replaced)?;
    Ok(file)
}

/// A file with the permissions of any other new file; the umask takes its part.
pub(crate) fn new_file(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder)
}

#[cfg(unix)]
fn keep_mode(file: &File, replaced: &Metadata) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // Who may read, write and run it. Its owner is whoever writes it now, so no set-user-id.
    let mode = replaced.permissions().mode() & 0o777;
    file.set_permissions(std::fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn keep_mode(_file: &File, _replaced: &Metadata) -> std::io::Result<()> {
    Ok(())
}

/// Gives a file its name, once its content is on the disk.
pub(crate) fn persist(file: NamedTempFile, target: &Path) -> std::io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(target).map_err(|error| not_replaced(error.error))?;
    // The name is in the folder, which some systems cannot sync; the content is safe all the same.
    #[cfg(unix)]
    File::open(folder(target)).and_then(|folder| folder.sync_all()).ok();
    Ok(())
}

/// Says why a file cannot be renamed onto another, where the system's word for it does not.
fn not_replaced(error: std::io::Error) -> std::io::Error {
    match error.kind() {
        ErrorKind::ResourceBusy | ErrorKind::CrossesDevices => std::io::Error::new(
            error.kind(),
            format!(
                "it cannot be replaced ({error}), as a file that is mounted by itself cannot; \
                 mount its folder, or write to another file"
            ),
        ),
        _ => error,
    }
}

/// The folder in which a file lies.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_cannot_be_renamed_onto_says_so() {
        for kind in [ErrorKind::ResourceBusy, ErrorKind::CrossesDevices] {
            let text = not_replaced(kind.into()).to_string();
            assert!(text.contains("mounted") && text.contains("mount its folder"), "{text}");
        }
        let text = not_replaced(ErrorKind::PermissionDenied.into()).to_string();
        assert!(!text.contains("mounted"), "{text}");
    }
}
