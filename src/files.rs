//! Files that are read and written whole.

use crate::{Error, Result};
use std::io::{ErrorKind, Write};
use std::path::Path;

/// Reads a file; `what` says what it is for, should it be missing.
pub(crate) fn read(what: &'static str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|problem| unreadable(what, path, problem))
}

/// [`read`] for text.
pub(crate) fn read_text(what: &'static str, path: &Path) -> Result<String> {
    String::from_utf8(read(what, path)?).map_err(|e| corrupt(path, format!("not UTF-8: {e}")))
}

/// Tells a file that is missing from one that cannot be read.
pub(crate) fn unreadable(what: &'static str, path: &Path, problem: std::io::Error) -> Error {
    match problem.kind() {
        ErrorKind::NotFound => Error::MissingFile { what, path: path.to_path_buf() },
        _ => Error::Io { path: path.to_path_buf(), problem },
    }
}

pub(crate) fn corrupt(path: &Path, problem: impl ToString) -> Error {
    Error::Corrupt { path: path.to_path_buf(), problem: problem.to_string() }
}

/// Writes a file that takes its name when all of it is written: whatever goes wrong, what was there
/// before, or nothing, is there after.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let failed = |problem| Error::Io { path: path.to_path_buf(), problem };
    // A link keeps pointing where it points.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    if target.exists() && !target.is_file() {
        // A device or a pipe is written to, not replaced.
        return std::fs::write(path, content).map_err(failed);
    }
    let folder = target.parent().filter(|folder| *folder != Path::new(""));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // As for any other new file; the umask takes its part.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder.unwrap_or(Path::new("."))).map_err(failed)?;
    file.write_all(content).map_err(failed)?;
    file.persist(&target).map_err(|e| failed(e.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_unreadable_files_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let missing = read("notes", &folder.path().join("none"));
        assert!(matches!(missing, Err(Error::MissingFile { what: "notes", .. })), "{missing:?}");
        let unreadable = read("notes", folder.path());
        assert!(matches!(unreadable, Err(Error::Io { .. })), "{unreadable:?}");
    }

    #[test]
    fn a_file_is_replaced_whole_or_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, b"a longer first content").unwrap();
        write(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert!(matches!(write(folder.path(), b"x"), Err(Error::Io { .. })));
        let nowhere = write(Path::new("no/such/folder/file"), b"x").unwrap_err().to_string();
        assert!(nowhere.starts_with("no/such/folder/file: "), "{nowhere}");
        assert!(matches!(write(&path.join("below"), b"x"), Err(Error::Io { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left over");
    }

    #[cfg(unix)]
    #[test]
    fn links_and_readers_of_the_old_content_keep_theirs() {
        use std::io::Read;
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("file"), folder.path().join("link"));
        write(&path, b"first").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut reader = std::fs::File::open(&path).unwrap();
        write(&link, b"second").unwrap();
        assert!(link.is_symlink());
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        let mut old = String::new();
        reader.read_to_string(&mut old).unwrap();
        assert_eq!(old, "first");
    }
}
