//! Reads the text, runs the model, records.

use crate::args::RunArgs;
use crate::common::model::shown;
use crate::pairs::{self, Judged, Pair, Sentences};
use crate::passages::{Cutter, Passage};
use crate::results::Results;
use crate::words::Words;
use anyhow::{Context, Result, ensure};
use candle_int8_attention::drift::{Embeddings, Recorder, Subject, Text};
use candle_int8_attention::models::{ModelFiles, TextEncoder};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::BufRead;
use std::path::Path;

const BUILT_IN: &str = include_str!("../data/pride-and-prejudice.txt");

/// Runs everything that the flags ask for.
pub fn record(args: &RunArgs) -> Result<Results> {
    let pairs = args.pairs.as_deref().map(pairs::read).transpose()?;
    let words = args.file.as_deref().map(Words::open).transpose()?;
    let (encoder, model, files) = args.model.encoder_and_files()?;
    let recorder = Recorder::new(args.candidates())?;
    let subject = Subject { model, fingerprint: fingerprint(&files)?, texts: Vec::new() };
    let run = Run { args, encoder: &encoder, recorder, subject };
    match (&pairs, words) {
        (Some(pairs), _) => run.pairs(pairs),
        (None, Some((words, size))) => {
            let name = args.file.as_deref().map(shown).unwrap_or_default();
            run.text(&name, words, size)
        }
        (None, None) => {
            let name = "Pride and Prejudice, chapter 1 (built in)";
            let words = Words::new(BUILT_IN.as_bytes(), name.into());
            run.text(name, words, BUILT_IN.len() as u64)
        }
    }
}

struct Run<'a> {
    args: &'a RunArgs,
    encoder: &'a TextEncoder,
    recorder: Recorder,
    subject: Subject,
}

impl Run<'_> {
    fn text<R: BufRead>(mut self, name: &str, mut source: Words<R>, size: u64) -> Result<Results> {
        let mut cutter = Cutter::new(self.encoder, self.args.passage_tokens)?;
        let progress = progress_bar(size);
        let (mut words, mut more, mut index) = (Vec::new(), true, 0);
        while more {
            more = source.read(&mut words)?;
            cutter.push(&mut words)?;
            while let Some(passage) = cutter.next(!more)? {
                if self.args.shard.has(index) {
                    self.record(&passage, index)?;
                }
                index += 1;
                // The words that wait are read, but not yet behind us.
                progress.set_position(source.bytes.saturating_sub(cutter.waiting_bytes()));
            }
        }
        progress.finish_and_clear();
        ensure!(index > 0, "the text has no word or sign in it ({name})");
        ensure!(
            cutter.unknown < cutter.tokens,
            "the model knows no word of the text ({name}): every token is [UNK]"
        );
        let tokens = cutter.passage_tokens();
        let limit = match self.args.passage_tokens {
            None => ", as many as the model reads at once",
            Some(_) => "",
        };
        let cut = match index {
            1 => "one passage".to_string(),
            n => format!("cut into {n} passages of at most {tokens} tokens{limit}"),
        };
        let lost = match cutter.lost {
            0 => String::new(),
            n => format!("; {n} tokens of words that no passage holds are left out"),
        };
        self.finish(name.to_string(), cut + &lost, Vec::new())
    }

    fn pairs(mut self, pairs: &[Pair]) -> Result<Results> {
        let path = self.args.pairs.as_deref().unwrap_or(Path::new(""));
        let name = shown(path);
        let progress = progress_bar(pairs.len() as u64);
        let (mut judged, mut sentences) = (Vec::new(), Sentences::default());
        for (index, pair) in (0u64..).zip(pairs) {
            progress.set_position(index);
            let [a, b] = &pair.sentences;
            // Of all pairs, so that the parts of a corpus say the same.
            sentences.add(self.encoder, a)?;
            sentences.add(self.encoder, b)?;
            if !self.args.shard.has(index) {
                continue;
            }
            let mut embed = |sentence: &str, side: u64| -> Result<Embeddings> {
                let mut cutter = Cutter::new(self.encoder, None)?;
                cutter.push(&mut sentence.split_whitespace().map(str::to_string).collect())?;
                let passage = cutter.next(true)?;
                let passage =
                    passage.with_context(|| format!("{name}: no word or sign in {sentence:?}"))?;
                self.record(&passage, 2 * index + side)
            };
            let embeddings = [embed(a, 0)?, embed(b, 1)?];
            judged.push(Judged::new(&name, index, pair.score, embeddings));
        }
        progress.finish_and_clear();
        let how = sentences.describe().with_context(|| format!("cannot use the pairs {name}"))?;
        self.finish(name, how, judged)
    }

    fn record(&mut self, passage: &Passage, index: u64) -> Result<Embeddings> {
        let Passage { ids, words } = passage;
        let recorded = self.recorder.record(&self.encoder.model, ids, words, index);
        recorded.with_context(|| format!("passage {index}"))
    }

    fn finish(mut self, name: String, cut: String, pairs: Vec<Judged>) -> Result<Results> {
        let shard = self.args.shard;
        self.subject.texts.push(Text {
            name,
            cut,
            shards: vec![shard.index],
            shard_count: shard.count,
        });
        self.recorder.set_subject(self.subject);
        Ok(Results { recorder: self.recorder, pairs })
    }
}

/// On stderr, and only if that is a terminal.
fn progress_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = ProgressStyle::with_template("{bar:40} {percent:>3} %  {elapsed} of {duration}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

/// A checksum of the model's files, which tells models apart whatever their folders are called.
fn fingerprint(files: &ModelFiles) -> Result<String> {
    let mut hasher = Checksum(crc32fast::Hasher::new());
    let mut size = 0;
    for path in [&files.weights, &files.config, &files.tokenizer] {
        let cannot = || format!("cannot read {}", path.display());
        let mut file = std::fs::File::open(path).with_context(cannot)?;
        size += std::io::copy(&mut file, &mut hasher).with_context(cannot)?;
    }
    Ok(format!("{:08x}-{size}", hasher.0.finalize()))
}

struct Checksum(crc32fast::Hasher);

impl std::io::Write for Checksum {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
