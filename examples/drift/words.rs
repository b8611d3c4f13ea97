//! The words of a text, one after the other, however large the text is.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// More than any word has.
const LONGEST: usize = 1 << 16;

/// Reads words from a text that need not fit in memory.
pub struct Words<R> {
    reader: R,
    name: String,
    /// What was read of the word that is not complete yet.
    pending: Vec<u8>,
    line: usize,
    first: bool,
    /// Bytes read so far.
    pub bytes: u64,
}

impl Words<BufReader<File>> {
    /// The words of a file, and its size.
    pub fn open(path: &Path) -> Result<(Self, u64)> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
        let size = file.metadata().with_context(|| format!("cannot read {name}"))?.len();
        Ok((Words::new(BufReader::with_capacity(1 << 16, file), name), size))
    }
}

impl<R: BufRead> Words<R> {
    pub fn new(reader: R, name: String) -> Self {
        Self { reader, name, pending: Vec::new(), line: 1, first: true, bytes: 0 }
    }

    /// Adds the next few words to `words`; false at the end of the text.
    pub fn read(&mut self, words: &mut Vec<String>) -> Result<bool> {
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
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(error) => {
                let good = &bytes[..error.valid_up_to()];
                let line = self.line + good.iter().filter(|&&b| b == b'\n').count();
                bail!("{}:{line}: not UTF-8", self.name);
            }
        };
        let text = if self.first { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
        self.first = false;
        self.line += text.bytes().filter(|&b| b == b'\n').count();
        words.extend(text.split_whitespace().map(str::to_string));
        Ok(!at_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Result<Vec<String>> {
        let mut reader = Words::new(text, "text".into());
        let mut words = Vec::new();
        while reader.read(&mut words)? {}
        Ok(words)
    }

    #[test]
    fn words_are_what_stands_between_white_space() {
        assert_eq!(all("\u{feff}a  b\r\nc\td\n".as_bytes()).unwrap(), ["a", "b", "c", "d"]);
        assert!(all(b" \n ").unwrap().is_empty());
        let lines = "word\n".repeat(20_000);
        assert_eq!(all(lines.as_bytes()).unwrap().len(), 20_000);
    }

    #[test]
    fn bytes_that_are_not_text_are_reported_with_their_line() {
        assert!(all(b"a b\nc \xff d").unwrap_err().to_string().contains("text:2: not UTF-8"));
        let endless = vec![b'x'; 200_000];
        assert!(all(&endless).unwrap_err().to_string().contains("65536 bytes"));
    }
}
