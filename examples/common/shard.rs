//! Parts of a text for as many machines.

use std::ops::Range;
use std::str::FromStr;

/// Part `index` (counted from 1) of `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: u64,
    pub count: u64,
}

impl Shard {
    /// Whether the passage with this number, counted from 0, is in this part.
    pub fn has(self, passage: u64) -> bool {
        passage % self.count == self.index - 1
    }

    /// Its bytes of a file of `size`: parts that follow each other.
    pub fn bytes(self, size: u64) -> Range<u64> {
        let end =
            |parts: u64| (u128::from(size) * u128::from(parts) / u128::from(self.count)) as u64;
        end(self.index - 1)..end(self.index)
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts =
            text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, count)) if (1..=count).contains(&index) => Ok(Self { index, count }),
            _ => Err("expected I/N with I from 1 to N, for example 2/8".into()),
        }
    }
}
