//! Texts out of a file, line by line, and what is no text.

use crate::common::model::shown;
use crate::common::shard::Shard;
use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// More bytes than any text has: a line beyond is none.
const LONGEST: u64 = 1 << 26;

/// The byte order mark.
const MARK: &str = "\u{feff}";

/// Lines that are no text.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Counts {
    /// Lines without anything but white space, and such fields.
    pub empty: u64,
    pub not_utf8: u64,
    /// Lines that are no JSON object, or one without the field or with something else than a text in it.
    pub no_field: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { empty, not_utf8, no_field } = self;
        write!(f, "{empty} empty, {not_utf8} not UTF-8, {no_field} without the field")
    }
}

/// The texts of a part of a file.
pub struct Texts {
    part: Range<u64>,
    state: RefCell<State>,
}

struct State {
    path: PathBuf,
    field: Option<String>,
    reader: BufReader<File>,
    /// Where the next line begins.
    at: u64,
    /// Where the lines begin whose texts were given out, and were not asked for yet.
    places: VecDeque<u64>,
    counts: Counts,
    failed: Option<anyhow::Error>,
}

impl Texts {
    pub fn open(path: &Path, field: Option<&str>, shard: Shard) -> Result<Self> {
        let cannot = || format!("cannot read {}", shown(path));
        let file = File::open(path).with_context(cannot)?;
        let about = file.metadata().with_context(cannot)?;
        ensure!(about.is_file(), "cannot read {}: expected a regular file", shown(path));
        let part = shard.bytes(about.len());
        let mut reader = BufReader::with_capacity(1 << 16, file);
        let mut at = part.start;
        if at > 0 {
            // A line belongs to the part in which it begins.
            reader.seek(SeekFrom::Start(at - 1)).with_context(cannot)?;
            at += reader.skip_until(b'\n').with_context(cannot)? as u64 - 1;
        }
        let state = State {
            path: path.to_path_buf(),
            field: field.map(str::to_string),
            reader,
            at,
            places: VecDeque::new(),
            counts: Counts::default(),
            failed: None,
        };
        Ok(Self { part, state: RefCell::new(state) })
    }

    /// The texts, first to last. Ends early if the file cannot be read; [`Texts::finish`] tells.
    pub fn iter(&self) -> impl Iterator<Item = String> {
        std::iter::from_fn(|| {
            let mut state = self.state.borrow_mut();
            let text = state.next(self.part.end);
            text.unwrap_or_else(|error| {
                state.failed = Some(error);
                None
            })
        })
    }

    /// Where the line of the next text begins, of those that were given out and not asked for.
    pub fn next_place(&self) -> u64 {
        self.state.borrow_mut().places.pop_front().expect("a text that was given out")
    }

    /// How many bytes there are to read.
    pub fn bytes(&self) -> u64 {
        self.part.end - self.part.start
    }

    /// How many bytes were read.
    pub fn read(&self) -> u64 {
        self.state.borrow().at.saturating_sub(self.part.start).min(self.bytes())
    }

    pub fn counts(&self) -> Counts {
        self.state.borrow().counts
    }

    /// What went wrong, if anything did.
    pub fn finish(&self) -> Result<()> {
        self.state.borrow_mut().failed.take().map_or(Ok(()), Err)
    }
}

impl State {
    fn next(&mut self, end: u64) -> Result<Option<String>> {
        let mut line = Vec::new();
        while self.at < end {
            line.clear();
            let start = self.at;
            let cannot = || format!("cannot read {}", shown(&self.path));
            let mut limited = (&mut self.reader).take(LONGEST);
            self.at += limited.read_until(b'\n', &mut line).with_context(cannot)? as u64;
            if line.is_empty() {
                break;
            }
            if line.len() as u64 == LONGEST {
                let path = shown(&self.path);
                return Err(anyhow!("{path}: a line of {LONGEST} bytes or more at byte {start}"));
            }
            let Ok(text) = str::from_utf8(&line) else {
                self.counts.not_utf8 += 1;
                continue;
            };
            let text = if start == 0 { text.strip_prefix(MARK).unwrap_or(text) } else { text };
            if text.trim().is_empty() {
                self.counts.empty += 1;
                continue;
            }
            let text = match &self.field {
                None => text.trim_end_matches(['\r', '\n']).to_string(),
                Some(field) => match field_of(text, field) {
                    Some(text) => text,
                    None => {
                        self.counts.no_field += 1;
                        continue;
                    }
                },
            };
            if text.trim().is_empty() {
                self.counts.empty += 1;
                continue;
            }
            self.places.push_back(start);
            return Ok(Some(text));
        }
        Ok(None)
    }
}

/// A text in a JSON object.
fn field_of(line: &str, field: &str) -> Option<String> {
    let mut object: serde_json::Map<_, _> = serde_json::from_str(line).ok()?;
    match object.remove(field)? {
        serde_json::Value::String(text) => Some(text),
        _ => None,
    }
}
