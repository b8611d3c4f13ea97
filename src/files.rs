//! Files that are read and written whole.

mod new_file;

#[cfg(feature = "hub")]
pub(crate) use new_file::new_file;
pub(crate) use new_file::persist;

use crate::{Error, Result};
use new_file::beside;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Reads a file; `what` says what it is for, should it be missing.
pub(crate) fn read(what: &'static str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|problem| unreadable(what, path, problem))
}

/// [`read`] for text, without the mark of its encoding that some editors put in front.
pub(crate) fn read_text(what: &'static str, path: &Path) -> Result<String> {
    let text = String::from_utf8(read(what, path)?).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|&&byte| byte == b'\n').count();
        corrupt(path, format!("not UTF-8 in line {line} (byte {})", good.len()))
    })?;
    match text.strip_prefix('\u{feff}') {
        Some(rest) => Ok(rest.to_string()),
        None => Ok(text),
    }
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

/// Writes a file that takes its name when all of it is on the disk: whatever goes wrong, a power cut
/// included, what was there before, or nothing, is there after. A file that is replaced hands its
/// permissions on.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    let failed = |problem| Error::Io { path: path.to_path_buf(), problem };
    let target = target(path).map_err(failed)?;
    if target.exists() && !target.is_file() {
        // A device or a pipe is written to, not replaced.
        return std::fs::write(path, content).map_err(failed);
    }
    let mut file = beside(&target).map_err(failed)?;
    file.write_all(content).map_err(failed)?;
    persist(file, &target).map_err(failed)
}

/// Where the content of `path` is: a link keeps pointing where it points. A link to what does not
/// exist is refused, because nobody can tell whether the link or what it names is meant.
fn target(path: &Path) -> std::io::Result<PathBuf> {
    match path.canonicalize() {
        Ok(target) => Ok(target),
        Err(_) if path.is_symlink() => {
            Err(std::io::Error::new(ErrorKind::NotFound, "it is a link to what does not exist"))
        }
        Err(_) => Ok(path.to_path_buf()),
    }
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

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_replaced_hands_its_permissions_on() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("file"), folder.path().join("link"));
        write(&path, b"first").unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mode = || path.metadata().unwrap().permissions().mode() & 0o7777;
        for private in [0o600, 0o640, 0o400, 0o755] {
            for name in [&path, &link] {
                let permissions = std::fs::Permissions::from_mode(private);
                std::fs::set_permissions(&path, permissions).unwrap();
                write(name, b"second").unwrap();
                assert_eq!(mode(), private, "{private:o}");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_what_does_not_exist_is_refused_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (nothing, link) = (folder.path().join("nothing"), folder.path().join("link"));
        std::os::unix::fs::symlink(&nothing, &link).unwrap();
        let error = write(&link, b"content").unwrap_err().to_string();
        assert!(error.contains("link: it is a link to what does not exist"), "{error}");
        assert!(link.is_symlink() && !nothing.exists());
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn text_has_no_mark_of_its_encoding_and_bytes_that_are_no_text_have_a_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text");
        write(&path, "\u{feff}a \u{feff}b".as_bytes()).unwrap();
        assert_eq!(read_text("text", &path).unwrap(), "a \u{feff}b");
        write(&path, b"first\nsec\xffond").unwrap();
        let error = read_text("text", &path).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert!(error.to_string().contains("text: not UTF-8 in line 2 (byte 9)"), "{error}");
    }
}
