//! The words and sentences that int8 changes most, as text, with where attention moved.

use super::call::{Dims, Reference};
use crate::Result;
use crate::drift::metrics::{top_k, total_variation};
use serde::{Deserialize, Serialize};

/// How many words, and how many sentences, are kept.
pub(super) const KEPT: usize = 10;
/// How many of the most attended keys of each path are shown.
const TARGETS: usize = 3;
/// Characters of text around a word, on each side.
const CONTEXT: usize = 60;

/// A key that a word attends to, and how much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Target {
    /// Position of the key in its passage.
    pub position: usize,
    /// The word there.
    pub word: String,
    /// Its probability in fp32.
    pub fp32: f32,
    /// Its probability in int8.
    pub int8: f32,
}

/// A word whose attention moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MovedWord {
    /// Which passage, counted from 0.
    pub passage: u64,
    /// Position of the word in it.
    pub position: usize,
    /// The layer and the head where its attention moved most.
    pub layer: usize,
    /// See `layer`.
    pub head: usize,
    /// KL divergence of its probabilities there, in nats.
    pub kl: f64,
    /// Share of its probability that went elsewhere.
    pub total_variation: f64,
    /// The text before the word.
    pub before: String,
    /// The word.
    pub word: String,
    /// The text after it.
    pub after: String,
    /// The most attended keys of both paths, those whose share changed most first.
    pub targets: Vec<Target>,
}

/// A sentence whose words' attention moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MovedSentence {
    /// Which passage, counted from 0.
    pub passage: u64,
    /// Position of its first token.
    pub position: usize,
    /// The sentence.
    pub text: String,
    /// KL divergence, mean over its tokens and all heads of all layers.
    pub mean_kl: f64,
    /// The word in it that moved most.
    pub worst: MovedWord,
}

/// The worst of everything seen so far.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Worst {
    pub words: Vec<MovedWord>,
    pub sentences: Vec<MovedSentence>,
}

impl Worst {
    pub fn merge(&mut self, other: &Self) {
        self.words.extend_from_slice(&other.words);
        self.sentences.extend_from_slice(&other.sentences);
        self.trim();
    }

    /// Keeps the worst; among equals the first in the text, so that the order of merging does not
    /// show.
    fn trim(&mut self) {
        let place = |w: &MovedWord| (w.passage, w.position);
        self.words.sort_by(|a, b| b.kl.total_cmp(&a.kl).then(place(a).cmp(&place(b))));
        self.words.truncate(KEPT);
        let place = |s: &MovedSentence| (s.passage, s.position);
        self.sentences
            .sort_by(|a, b| b.mean_kl.total_cmp(&a.mean_kl).then(place(a).cmp(&place(b))));
        self.sentences.truncate(KEPT);
    }
}

/// Gathers what one passage's words go through, layer by layer.
pub(super) struct Passage<'a> {
    pub index: u64,
    pub words: &'a [String],
    /// Sum of the KL divergence over heads and layers, one a token.
    total: Vec<f64>,
    rows: usize,
    worst: Vec<Option<Moved>>,
}

/// Where the attention of one token moved most so far.
struct Moved {
    layer: usize,
    head: usize,
    kl: f64,
    total_variation: f64,
    targets: Vec<(usize, f32, f32)>,
}

impl<'a> Passage<'a> {
    pub fn new(index: u64, words: &'a [String]) -> Self {
        let worst = words.iter().map(|_| None).collect();
        Self { index, words, total: vec![0.0; words.len()], rows: 0, worst }
    }

    /// Adds a layer: the KL divergence of every query, and the probabilities of int8.
    pub fn add(
        &mut self,
        layer: usize,
        kl: &[Vec<f64>],
        reference: &Reference,
        int8: &[f32],
    ) -> Result<()> {
        let Dims { queries, keys, .. } = reference.dims;
        self.rows += kl.len();
        for (head, rows) in kl.iter().enumerate() {
            for (token, &kl) in rows.iter().enumerate().take(self.words.len()) {
                self.total[token] += kl;
                let known = self.worst[token].as_ref().map_or(0.0, |worst| worst.kl);
                if kl > known {
                    let row = (head * queries + token) * keys;
                    let (p, q) = (&reference.probabilities[row..][..keys], &int8[row..][..keys]);
                    self.worst[token] = Some(Moved::of(layer, head, kl, p, q)?);
                }
            }
        }
        Ok(())
    }

    /// Adds the passage to the worst of all.
    pub fn finish(self, all: &mut Worst) {
        let mut words: Vec<(usize, &Moved)> =
            self.worst.iter().enumerate().filter_map(|(i, w)| Some((i, w.as_ref()?))).collect();
        words.sort_by(|(i, a), (j, b)| b.kl.total_cmp(&a.kl).then(i.cmp(j)));
        let sentences = sentences(self.words);
        let chosen = words.iter().take(KEPT).map(|&(i, moved)| self.word(i, moved));
        all.words.extend(chosen);
        let mut ranked: Vec<(f64, std::ops::Range<usize>)> = sentences
            .into_iter()
            .map(|range| {
                let tokens = range.len() as f64;
                (self.total[range.clone()].iter().sum::<f64>() / tokens, range)
            })
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.start.cmp(&b.1.start)));
        for (kl, range) in ranked.into_iter().take(KEPT) {
            let worst = words.iter().find(|(i, _)| range.contains(i));
            let Some(&(i, moved)) = worst else { continue };
            all.sentences.push(MovedSentence {
                passage: self.index,
                position: range.start,
                text: self.words[range].concat().trim().to_string(),
                mean_kl: kl / self.rows.max(1) as f64,
                worst: self.word(i, moved),
            });
        }
        all.trim();
    }

    fn word(&self, position: usize, moved: &Moved) -> MovedWord {
        let label = |i: usize| self.words.get(i).map_or("", String::as_str).trim().to_string();
        // A label that starts a word brings the space before it, which is no part of the word.
        let own = &self.words[position];
        let space = &own[..own.len() - own.trim_start().len()];
        let before: Vec<char> = self.words[..position].concat().chars().collect();
        let before = before[before.len().saturating_sub(CONTEXT)..].iter().collect::<String>();
        let after = self.words[position + 1..].iter().take(CONTEXT).cloned().collect::<String>();
        MovedWord {
            passage: self.index,
            position,
            layer: moved.layer,
            head: moved.head,
            kl: moved.kl,
            total_variation: moved.total_variation,
            before: before + space,
            word: label(position),
            after: after.chars().take(CONTEXT).collect(),
            targets: (moved.targets.iter())
                .map(|&(i, fp32, int8)| Target { position: i, word: label(i), fp32, int8 })
                .collect(),
        }
    }
}

impl Moved {
    fn of(layer: usize, head: usize, kl: f64, p: &[f32], q: &[f32]) -> Result<Self> {
        let mut places = top_k(p, TARGETS);
        places.extend(top_k(q, TARGETS));
        places.sort_unstable();
        places.dedup();
        let mut targets: Vec<(usize, f32, f32)> =
            places.into_iter().map(|i| (i, p[i], q[i])).collect();
        let change = |t: &(usize, f32, f32)| (t.1 - t.2).abs();
        targets.sort_by(|a, b| change(b).total_cmp(&change(a)));
        Ok(Self { layer, head, kl, total_variation: total_variation(p, q)?, targets })
    }
}

/// Shorter runs are more likely "Mr." than a sentence.
const SHORTEST: usize = 4;

/// Runs of tokens that end with a full stop, a question or an exclamation mark.
fn sentences(words: &[String]) -> Vec<std::ops::Range<usize>> {
    // A closing quote belongs to what it closes.
    let closes = |word: &str| ["\"", "'", "\u{201d}", "\u{2019}", ")", "]"].contains(&word);
    let mut found = Vec::new();
    let (mut start, mut ended) = (0, false);
    for (i, word) in words.iter().enumerate() {
        ended = word.ends_with(['.', '!', '?']) || (ended && closes(word));
        let goes_on = words.get(i + 1).is_some_and(|next| closes(next));
        let long_enough = i + 1 - start >= SHORTEST;
        if (ended && !goes_on && long_enough) || i + 1 == words.len() {
            found.push(start..i + 1);
            (start, ended) = (i + 1, false);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_at_their_marks_and_at_the_end() {
        let words = ["Mr", ".", " B", " is", " rich", ".", " Why", " is", " he", "?", " So"];
        assert_eq!(sentences(&words.map(String::from)), [0..6, 6..10, 10..11]);
        let words = [" \"", "Oh", " my", " dear", "!", "\"", " he", " said", " twice", "."];
        assert_eq!(sentences(&words.map(String::from)), [0..6, 6..10]);
        assert!(sentences(&[]).is_empty());
    }
}
