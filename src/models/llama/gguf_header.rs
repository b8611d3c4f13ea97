//! The header of a GGUF file, read over before Candle reads it, and reads at a place of a file.
//!
//! Candle's reader divides by the alignment, makes a value of 24 bytes or more of each byte of an
//! array, and keeps the last of two keys or tensors with one name.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Error, ErrorKind, Read, Result, Seek, SeekFrom};

/// More elements than the arrays of any vocabulary have together: tokens, scores, types and merges
/// of a million tokens are a quarter of it.
const MAX_ELEMENTS: u64 = 1 << 24;

/// Arrays in arrays; Candle reads no more.
const MAX_DEPTH: usize = 64;

/// More characters than any key or tensor name has.
const MAX_NAME: u64 = 1 << 16;

/// A file that is read from a place of its own: readers in several threads do not move each other,
/// as they would with the one position that the system keeps for an open file.
pub(super) struct Positioned<'a> {
    file: &'a File,
    at: u64,
    len: u64,
}

impl<'a> Positioned<'a> {
    /// From the beginning of a file of `len` bytes.
    pub(super) fn new(file: &'a File, len: u64) -> Self {
        Self { file, at: 0, len }
    }
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let read = read_at(self.file, buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| Error::from(ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

#[cfg(unix)]
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, at)
}

#[cfg(windows)]
fn read_at(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, at)
}

/// Where the system has no such call, readers take turns.
#[cfg(not(any(unix, windows)))]
fn read_at(mut file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    file.seek(SeekFrom::Start(at))?;
    file.read(buffer)
}

/// What is wrong with the header of a file of `len` bytes; nothing where Candle's reader finds that
/// it is none.
pub(super) fn problem(file: &File, len: u64) -> Option<String> {
    let reader = BufReader::new(Positioned::new(file, len));
    match (Header { reader, wide: true, elements: 0 }).check() {
        Ok(()) => None,
        Err(error) if error.kind() == ErrorKind::InvalidData => Some(error.to_string()),
        // Ends in the middle, or cannot be read: that is told with its reason by whoever reads on.
        Err(_) => None,
    }
}

struct Header<R: Read> {
    reader: BufReader<R>,
    /// Whether lengths have eight bytes; four in version 1.
    wide: bool,
    elements: u64,
}

fn invalid<T>(problem: String) -> Result<T> {
    Err(Error::new(ErrorKind::InvalidData, problem))
}

impl<R: Read + Seek> Header<R> {
    fn check(&mut self) -> Result<()> {
        let _magic = self.u32()?;
        self.wide = self.u32()? != 1;
        let (tensors, keys) = (self.length()?, self.length()?);
        let mut names = HashSet::new();
        for _ in 0..keys {
            let key = self.name()?;
            let kind = self.u32()?;
            if key == b"general.alignment" {
                self.alignment(kind)?;
            } else {
                self.skip_value(kind, 0)?;
            }
            self.once(&mut names, key, "metadata key")?;
        }
        names.clear();
        for _ in 0..tensors {
            let name = self.name()?;
            let dims = u64::from(self.u32()?);
            let width = if self.wide { 8 } else { 4 };
            self.skip(dims.saturating_mul(width))?;
            // Type and offset.
            self.skip(4 + 8)?;
            self.once(&mut names, name, "tensor")?;
        }
        Ok(())
    }

    fn once(&self, names: &mut HashSet<Vec<u8>>, name: Vec<u8>, what: &str) -> Result<()> {
        let shown = String::from_utf8_lossy(&name).into_owned();
        match names.insert(name) {
            true => Ok(()),
            false => invalid(format!("{what} {shown:?} is there twice")),
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn length(&mut self) -> Result<u64> {
        match self.wide {
            true => Ok(u64::from_le_bytes(self.bytes()?)),
            false => Ok(u64::from(self.u32()?)),
        }
    }

    fn name(&mut self) -> Result<Vec<u8>> {
        let len = self.length()?;
        if len > MAX_NAME {
            return invalid(format!("a name of {len} bytes, expected at most {MAX_NAME}"));
        }
        let mut name = vec![0; len as usize];
        self.reader.read_exact(&mut name)?;
        // As Candle reads it.
        while name.last() == Some(&0) {
            name.pop();
        }
        Ok(name)
    }

    /// The multiple at which tensors lie, as other readers take it too.
    fn alignment(&mut self, kind: u32) -> Result<()> {
        // Unsigned and signed integers of up to 32 bits.
        let value = match kind {
            0 | 1 => u64::from(self.bytes::<1>()?[0]),
            2 | 3 => u64::from(u16::from_le_bytes(self.bytes()?)),
            4 | 5 => u64::from(self.u32()?),
            other => return invalid(format!("general.alignment of type {other}, expected U32")),
        };
        match value.is_power_of_two() {
            true => Ok(()),
            false => invalid(format!("general.alignment {value}, expected a power of two")),
        }
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        match i64::try_from(bytes) {
            Ok(bytes) => self.reader.seek_relative(bytes),
            Err(_) => Err(ErrorKind::UnexpectedEof.into()),
        }
    }

    fn skip_value(&mut self, kind: u32, depth: usize) -> Result<()> {
        match kind {
            8 => {
                let len = self.length()?;
                self.skip(len)
            }
            9 if depth < MAX_DEPTH => self.skip_array(depth),
            _ => match size(kind) {
                Some(size) => self.skip(size),
                None => Err(ErrorKind::UnexpectedEof.into()),
            },
        }
    }

    fn skip_array(&mut self, depth: usize) -> Result<()> {
        let (kind, len) = (self.u32()?, self.length()?);
        self.elements = self.elements.saturating_add(len);
        if self.elements > MAX_ELEMENTS {
            return invalid(format!("arrays of more than {MAX_ELEMENTS} elements together"));
        }
        if let Some(size) = size(kind) {
            return self.skip(len * size);
        }
        (0..len).try_for_each(|_| self.skip_value(kind, depth + 1))
    }
}

/// Bytes of a value, of those types that have a fixed size.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
