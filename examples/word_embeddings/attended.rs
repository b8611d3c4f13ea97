//! Where one word looks: the keys with the largest probabilities, in fp32 and in int8.

use crate::heads::{Path, flat};
use anyhow::Result;
use serde::Serialize;

/// One attended token.
#[derive(Debug, Clone, Serialize)]
pub struct Target {
    pub position: usize,
    pub token: String,
    pub probability: f32,
}

/// The most attended tokens of one query in one head, largest first.
#[derive(Debug, Serialize)]
pub struct Attended {
    pub word: String,
    pub position: usize,
    pub head: usize,
    pub fp32: Vec<Target>,
    pub int8: Vec<Target>,
}

impl Attended {
    /// The `count` most attended tokens of the token at `position`.
    pub fn of(
        (fp32, int8): (&Path, &Path),
        tokens: &[String],
        position: usize,
        head: usize,
        count: usize,
    ) -> Result<Self> {
        let top = |path: &Path| -> Result<Vec<Target>> {
            let row = flat(&path.probs.narrow(1, head, 1)?.narrow(2, position, 1)?)?;
            Ok(largest(&row, tokens, count))
        };
        let word = tokens[position].clone();
        Ok(Self { word, position, head, fp32: top(fp32)?, int8: top(int8)? })
    }
}

fn largest(row: &[f32], tokens: &[String], count: usize) -> Vec<Target> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order
        .into_iter()
        .take(count)
        .map(|position| Target {
            position,
            token: tokens[position].clone(),
            probability: row[position],
        })
        .collect()
}
