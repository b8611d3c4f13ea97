//! Pairs of sentences, built in or from a file.

use crate::common::text;
use anyhow::{Context, Result, bail, ensure};
use std::path::Path;

/// Two sentences, and how similar people found them, if anybody asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub score: Option<f64>,
    pub a: String,
    pub b: String,
}

/// Written for this example; the scores (0 to 5) are the author's own.
const BUILT_IN: [(f64, &str, &str); 10] = [
    (5.0, "A dog is chasing a ball in the park.", "In the park, a dog runs after a ball."),
    (
        4.6,
        "The train to the coast was late again.",
        "Once more the train to the seaside was delayed.",
    ),
    (4.2, "She is slicing onions for a soup.", "A woman cuts vegetables in the kitchen."),
    (3.6, "Two children are building a sandcastle.", "Kids play with sand on the beach."),
    (3.0, "A man is repairing his old bicycle.", "A man is riding his old bicycle."),
    (2.4, "The orchestra rehearsed until midnight.", "A pianist gave a concert in the evening."),
    (1.8, "Heavy rain flooded the valley.", "The farmers hope for a dry summer."),
    (1.0, "The library opens at nine.", "The bakery closes at six."),
    (0.4, "He forgot the password of his laptop.", "A cat sleeps on the warm roof."),
    (0.0, "Interest rates were raised on Monday.", "Penguins cannot fly."),
];

/// The pairs of this example.
pub fn built_in() -> Vec<Pair> {
    BUILT_IN
        .iter()
        .map(|&(score, a, b)| Pair { score: Some(score), a: a.into(), b: b.into() })
        .collect()
}

/// Reads a file of lines `score<TAB>sentence<TAB>sentence` or `sentence<TAB>sentence`; empty lines
/// are skipped.
pub fn read(path: &Path) -> Result<Vec<Pair>> {
    let name = path.display();
    let text = text::read(path)?;
    let pairs = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty())
        .map(|(i, line)| parse(line).with_context(|| format!("{name}:{}", i + 1)))
        .collect::<Result<Vec<_>>>()?;
    ensure!(!pairs.is_empty(), "{name}: no pairs in it; {FORMAT}");
    Ok(pairs)
}

const FORMAT: &str = "a line is score<TAB>sentence<TAB>sentence, or sentence<TAB>sentence";

fn parse(line: &str) -> Result<Pair> {
    let columns: Vec<&str> = line.split('\t').map(str::trim).collect();
    let (score, a, b) = match columns[..] {
        // A number alone is no sentence: more likely a column is missing.
        [a, b] if a.parse::<f64>().is_ok() => bail!("a score and one sentence ({b:?}); {FORMAT}"),
        [a, b] => (None, a, b),
        [score, a, b] => (Some(parse_score(score)?), a, b),
        _ => {
            bail!("{} column{}; {FORMAT}", columns.len(), if columns.len() == 1 { "" } else { "s" })
        }
    };
    ensure!(!a.is_empty() && !b.is_empty(), "an empty sentence; {FORMAT}");
    Ok(Pair { score, a: a.into(), b: b.into() })
}

fn parse_score(text: &str) -> Result<f64> {
    match text.parse::<f64>() {
        Ok(score) if score.is_finite() => Ok(score),
        _ => bail!("score {text:?}, expected a finite number; {FORMAT}"),
    }
}
