//! What was measured: which model, which texts, which part of them.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A model and the texts it read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Subject {
    /// The model's name, for people.
    pub model: String,
    /// Something that another model has not, a checksum of the weights for example. Results are
    /// merged only if it is the same.
    pub fingerprint: String,
    /// The texts.
    pub texts: Vec<Text>,
}

/// A text, or the part of it that was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// Its name, for people.
    pub name: String,
    /// How it was cut, for people.
    pub cut: String,
    /// Which of its `shard_count` parts were read, counted from 1.
    pub shards: Vec<u64>,
    /// Into how many parts it was divided.
    pub shard_count: u64,
}

impl Text {
    /// Whether all parts were read.
    pub fn is_whole(&self) -> bool {
        self.shards.len() as u64 == self.shard_count
    }

    /// A note on what is missing.
    pub fn missing(&self) -> Option<String> {
        let list = self.shards.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        (!self.is_whole()).then(|| format!("part {list} of {} of {}", self.shard_count, self.name))
    }

    /// Once nothing is missing, it does not matter into how many parts it was divided.
    fn normal(mut self) -> Self {
        self.shards.sort_unstable();
        if self.is_whole() {
            (self.shards, self.shard_count) = (vec![1], 1);
        }
        self
    }
}

impl Subject {
    /// Refuses parts of texts that there cannot be: for what was read from a file.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        for Text { name, shards, shard_count, .. } in &self.texts {
            let mut sorted = shards.clone();
            sorted.sort_unstable();
            let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
            if twice || shards.is_empty() || !shards.iter().all(|s| (1..=*shard_count).contains(s))
            {
                return Err(format!("parts {shards:?} of {shard_count} of {name:?}"));
            }
        }
        Ok(())
    }

    /// Both subjects in one.
    pub(super) fn merged(&self, other: &Self) -> Result<Self> {
        if self.fingerprint != other.fingerprint {
            return Err(Error::Mismatch(format!(
                "results of different models: {:?} (fingerprint {}) and {:?} (fingerprint {})",
                self.model, self.fingerprint, other.model, other.fingerprint
            )));
        }
        let mut texts = self.texts.clone();
        for text in &other.texts {
            match texts.iter_mut().find(|known| known.name == text.name) {
                None => texts.push(text.clone()),
                Some(known) => *known = join(known, text)?,
            }
        }
        texts.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { texts, ..self.clone() })
    }
}

/// Two parts of one text.
fn join(a: &Text, b: &Text) -> Result<Text> {
    if a.shard_count != b.shard_count || a.cut != b.cut {
        return Err(Error::Mismatch(format!(
            "{} was divided in two ways: {} into {} parts, and {} into {} parts",
            a.name, a.cut, a.shard_count, b.cut, b.shard_count
        )));
    }
    if let Some(twice) = a.shards.iter().find(|shard| b.shards.contains(shard)) {
        return Err(Error::Contradiction(format!(
            "part {twice} of {} of {} is there twice",
            a.shard_count, a.name
        )));
    }
    let shards = a.shards.iter().chain(&b.shards).copied().collect();
    Ok(Text { shards, ..a.clone() }.normal())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: &str, shards: &[u64], of: u64) -> Subject {
        let text = Text {
            name: name.into(),
            cut: "passages".into(),
            shards: shards.into(),
            shard_count: of,
        };
        Subject { model: "m".into(), fingerprint: "1".into(), texts: vec![text] }
    }

    #[test]
    fn parts_become_the_whole_in_any_order() {
        let merged = part("a", &[3], 3).merged(&part("a", &[1], 3)).unwrap();
        assert_eq!(merged.texts[0].missing().unwrap(), "part 1, 3 of 3 of a");
        let merged = merged.merged(&part("a", &[2], 3)).unwrap();
        assert_eq!(merged, part("a", &[1], 1));
        assert_eq!(merged.texts[0].missing(), None);
        assert_eq!(merged.merged(&part("b", &[1], 1)).unwrap().texts.len(), 2);
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let fails = |a: &Subject, b: &Subject| a.merged(b).unwrap_err().to_string();
        let a = part("a", &[1], 2);
        assert!(fails(&a, &a).contains("twice"));
        assert!(fails(&a, &part("a", &[2], 3)).contains("divided in two ways"));
        let other = Subject { fingerprint: "2".into(), ..part("a", &[2], 2) };
        assert!(fails(&a, &other).contains("different models"));
    }
}
