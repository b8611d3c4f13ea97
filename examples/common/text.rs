//! Text files: the one way in which all examples read them, whole or piece by piece.
//!
//! The mark of their encoding that some editors put in front is no part of a text, and bytes that
//! are no UTF-8 are an error that names the file and the line.

use anyhow::{Context, Result, anyhow, bail};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// More than any word has.
const LONGEST: usize = 1 << 16;

/// The byte order mark.
const MARK: char = '\u{feff}';

/// The text of a file.
pub fn read(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {name}"))?;
    let text = decoded(&bytes, &name, 1)?;
    Ok(text.strip_prefix(MARK).unwrap_or(text).to_string())
}

/// Bytes of the text `name` as text; they start in the line with this number.
fn decoded<'a>(bytes: &'a [u8], name: &str, line: usize) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let good = &bytes[..error.valid_up_to()];
        let line = line + good.iter().filter(|&&byte| byte == b'\n').count();
        anyhow!("{name}:{line}: not UTF-8")
    })
}

/// Reads a text that need not fit in memory.
pub struct Pieces<R> {
    reader: R,
    name: String,
    /// What was read of the word that is not complete yet.
    pending: Vec<u8>,
    line: usize,
    first: bool,
    /// Bytes read so far.
    pub bytes: u64,
}

impl Pieces<BufReader<File>> {
    /// Those of a file, and its size.
    pub fn open(path: &Path) -> Result<(Self, u64)> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        let size = file.metadata().with_context(|| format!("cannot read {name}"))?.len();
        Ok((Pieces::new(BufReader::with_capacity(1 << 16, file), name), size))
    }
}

impl<R: BufRead> Pieces<R> {
    pub fn new(reader: R, name: String) -> Self {
        Self { reader, name, pending: Vec::new(), line: 1, first: true, bytes: 0 }
    }

    /// Adds the next piece to `text`, as whole words; false at the end.
    pub fn read(&mut self, text: &mut String) -> Result<bool> {
        let chunk = self.reader.fill_buf().with_context(|| format!("cannot read {}", self.name))?;
        let (len, at_end) = (chunk.len(), chunk.is_empty());
        self.pending.extend_from_slice(chunk);
        self.reader.consume(len);
        self.bytes += len as u64;
        // The last word may go on in the next chunk.
        let last = self.pending.iter().rposition(u8::is_ascii_whitespace);
        let cut = if at_end { self.pending.len() } else { last.map_or(0, |at| at + 1) };
        let rest = self.pending.split_off(cut);
        let bytes = std::mem::replace(&mut self.pending, rest);
        if self.pending.len() > LONGEST {
            bail!("{}:{}: a word of more than {LONGEST} bytes", self.name, self.line);
        }
        let piece = decoded(&bytes, &self.name, self.line)?;
        let piece = match piece.strip_prefix(MARK) {
            Some(rest) if self.first => rest,
            _ => piece,
        };
        self.first = false;
        self.line += piece.bytes().filter(|&b| b == b'\n').count();
        text.push_str(piece);
        Ok(!at_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<String> {
        let mut reader = Pieces::new(bytes, "text".into());
        let mut text = String::new();
        while reader.read(&mut text)? {}
        Ok(text)
    }

    #[test]
    fn a_text_comes_as_it_is_without_a_mark_of_its_encoding() {
        assert_eq!(all("\u{feff}a  b\r\nc\td".as_bytes()).unwrap(), "a  b\r\nc\td");
        assert_eq!(all(b" \n ").unwrap(), " \n ");
        let lines = "word\n".repeat(20_000);
        assert_eq!(all(lines.as_bytes()).unwrap(), lines);
    }

    #[test]
    fn whole_files_are_read_as_pieces_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.txt");
        std::fs::write(&path, "\u{feff}a \u{feff}b\n").unwrap();
        assert_eq!(read(&path).unwrap(), "a \u{feff}b\n");
        std::fs::write(&path, b"a\nb\nc \xff").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.ends_with("text.txt:3: not UTF-8"), "{error}");
        let error = format!("{:#}", read(&folder.path().join("none")).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("none"), "{error}");
    }

    #[test]
    fn pieces_end_between_words() {
        let text = "some words ".repeat(20_000);
        let mut reader = Pieces::new(std::io::BufReader::new(text.as_bytes()), "text".into());
        let mut piece = String::new();
        while reader.read(&mut piece).unwrap() {
            assert!(piece.ends_with(' '), "{piece:?}");
            piece.clear();
        }
    }

    #[test]
    fn bytes_that_are_not_text_are_reported_with_their_line() {
        assert!(all(b"a b\nc \xff d").unwrap_err().to_string().contains("text:2: not UTF-8"));
        let endless = vec![b'x'; 200_000];
        assert!(all(&endless).unwrap_err().to_string().contains("65536 bytes"));
    }
}
