//! A text in two parts: one to learn from, one to be judged on.

use super::cutter::Cutter;
use super::print::count;
use super::text::read;
use super::text_model::TextModel;
use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use serde::Serialize;
use std::path::PathBuf;

const BUILT_IN: &str = include_str!("../data/pride-and-prejudice.txt");

/// Which text is used for what.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Text")]
pub struct PassageArgs {
    /// Text (UTF-8), cut into passages as long as an encoder reads at once, 512 tokens of a decoder
    /// [default: the opening of Pride and Prejudice, which makes two short ones]
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Text to judge the result on [default: the second half of the passages of --file]
    #[arg(long, value_name = "FILE")]
    pub unseen: Option<PathBuf>,

    /// Use at most the first N passages of each
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least_one)]
    pub passages: usize,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".into()),
        Ok(count) => Ok(count),
        Err(error) => Err(format!("{error}")),
    }
}

/// Token ids `[1, N]` of passages.
pub struct Passages {
    pub seen: Vec<Tensor>,
    pub unseen: Vec<Tensor>,
    pub summary: Summary,
}

/// What the passages are.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub text: String,
    pub passages: usize,
    pub tokens: usize,
    pub unseen_text: String,
    pub unseen_passages: usize,
    pub unseen_tokens: usize,
}

impl PassageArgs {
    pub fn read(&self, model: &TextModel) -> Result<Passages> {
        let (name, text) = match &self.file {
            Some(file) => (file.display().to_string(), read(file)?),
            None => ("Pride and Prejudice (built in)".to_string(), BUILT_IN.to_string()),
        };
        let passages = |text: &str, name: &str, count| {
            at_least(count, model, text).with_context(|| name.to_string())
        };
        let (seen, unseen, unseen_name) = match &self.unseen {
            Some(file) => {
                let other = file.display().to_string();
                (passages(&text, &name, 1)?, passages(&read(file)?, &other, 1)?, other)
            }
            None => {
                let mut seen = passages(&text, &name, 2)?;
                ensure!(
                    seen.len() > 1,
                    "{name}: too short, expected a text that makes two passages"
                );
                let unseen = seen.split_off(seen.len() / 2);
                (seen, unseen, format!("the rest of {name}"))
            }
        };
        let (mut seen, mut unseen) = (seen, unseen);
        seen.truncate(self.passages);
        unseen.truncate(self.passages);
        let tokens = |ids: &[Tensor]| ids.iter().map(Tensor::elem_count).sum();
        let summary = Summary {
            text: name,
            passages: seen.len(),
            tokens: tokens(&seen),
            unseen_text: unseen_name,
            unseen_passages: unseen.len(),
            unseen_tokens: tokens(&unseen),
        };
        Ok(Passages { seen, unseen, summary })
    }
}

impl Summary {
    /// For the head of a report.
    pub fn render(&self, purpose: &str, judged: &str) -> String {
        let part = |tokens, passages, text: &str| {
            format!("{} in {} of {text}", count(tokens, "token"), count(passages, "passage"))
        };
        let seen = part(self.tokens, self.passages, &self.text);
        let unseen = part(self.unseen_tokens, self.unseen_passages, &self.unseen_text);
        format!("  {purpose} {seen}\n  {judged} {unseen}\n")
    }
}

/// All of a text in as few passages as the model needs, but `count` if it has as many tokens.
fn at_least(count: usize, model: &TextModel, text: &str) -> Result<Vec<Tensor>> {
    let mut cutter = model.cutter(None)?;
    let passages = cut(&mut *cutter, text)?;
    let special = cutter.special_tokens();
    let tokens: usize = passages.iter().map(|ids| ids.elem_count() - special).sum();
    let tokens = (tokens.div_ceil(count) + special).max(cutter.fewest_tokens());
    match passages.iter().any(|ids| ids.elem_count() > tokens) {
        true => cut(&mut *model.cutter(Some(tokens))?, text),
        false => Ok(passages),
    }
}

/// All passages of a text.
fn cut(cutter: &mut dyn Cutter, text: &str) -> Result<Vec<Tensor>> {
    cutter.push(text)?;
    cutter.check()?;
    let mut passages = Vec::new();
    while let Some(passage) = cutter.next(true)? {
        passages.push(passage.ids);
    }
    Ok(passages)
}
