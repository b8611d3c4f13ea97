//! Reads the text, runs the model, records.

use crate::args::RunArgs;
use crate::common::cutter::{Cutter, Passage};
use crate::common::llama::Weights;
use crate::common::model::shown;
use crate::common::progress::progress_bar;
use crate::common::text::Pieces;
use crate::common::text_model::{Loaded, TextModel};
use crate::pairs::{self, Judged, Pair, Sentences};
use crate::results::Results;
use anyhow::{Context, Result, bail, ensure};
use candle_int8_attention::drift::linear::Substitutes;
use candle_int8_attention::drift::{Embeddings, Recorder, Subject, Text};
use candle_int8_attention::models::TextEncoder;
use candle_int8_attention::nn::Precision;
use std::io::BufRead;
use std::path::{Path, PathBuf};

const BUILT_IN: &str = include_str!("../data/pride-and-prejudice.txt");

/// Runs everything that the flags ask for.
pub fn record(args: &RunArgs) -> Result<Results> {
    let pairs = args.pairs.as_deref().map(pairs::read).transpose()?;
    let text = args.file.as_deref().map(Pieces::open).transpose()?;
    let Loaded { model, name, files } = args.model.load()?;
    let recorder = Recorder::new(args.candidates())?;
    let fingerprint = fingerprint(&files, args.model.format.weights)?;
    let subject = Subject { model: name.clone(), fingerprint, texts: Vec::new() };
    let linear = args.linear.map(|precision| Switched::load(args, precision)).transpose()?;
    let run = Run { args, model: &model, linear, recorder, subject };
    match (&pairs, text) {
        (Some(pairs), _) => match &model {
            TextModel::Encoder(encoder) => run.pairs(encoder, pairs),
            TextModel::Decoder(_) => bail!(
                "--pairs compares embeddings of sentences, and {name} is a decoder, which has \
                 none; expected an encoder, or a text by --file"
            ),
        },
        (None, Some((text, size))) => {
            let name = args.file.as_deref().map(shown).unwrap_or_default();
            run.text(&name, text, size)
        }
        (None, None) => {
            let name = "Pride and Prejudice, chapter 1 (built in)";
            let text = Pieces::new(BUILT_IN.as_bytes(), name.into());
            run.text(name, text, BUILT_IN.len() as u64)
        }
    }
}

struct Run<'a> {
    args: &'a RunArgs,
    model: &'a TextModel,
    linear: Option<Switched>,
    recorder: Recorder,
    subject: Subject,
}

/// The model once more, whose linear layers are switched while the other one cuts the text.
struct Switched {
    model: TextModel,
    substitutes: Substitutes,
}

impl Switched {
    fn load(args: &RunArgs, precision: Precision) -> Result<Self> {
        let of_model = args.model.linear.precision;
        ensure!(
            of_model == Precision::F32,
            "--linear {precision} measures linear layers against f32, and --precision {of_model} says that \
             they are not; expected one of the two"
        );
        let Loaded { mut model, name, .. } = args.model.load()?;
        let substitutes = Substitutes::new(&mut model, precision).with_context(|| {
            format!("--linear {precision} is for an encoder, and {name} is none")
        })?;
        Ok(Self { model, substitutes })
    }
}

impl Run<'_> {
    fn text<R: BufRead>(mut self, name: &str, mut source: Pieces<R>, size: u64) -> Result<Results> {
        let mut cutter = self.model.cutter(self.args.passage_tokens)?;
        let progress = progress_bar(size);
        let (mut text, mut more, mut index) = (String::new(), true, 0);
        while more {
            more = source.read(&mut text)?;
            cutter.push(&text)?;
            text.clear();
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
        cutter.check().with_context(|| format!("cannot use the text {name}"))?;
        let cut = self.describe(&*cutter, index);
        self.finish(name.to_string(), cut, Vec::new())
    }

    /// How a text was cut into `count` passages.
    fn describe(&self, cutter: &dyn Cutter, count: u64) -> String {
        let limit = match self.args.passage_tokens {
            None if cutter.passage_tokens() == self.model.longest() => {
                ", as many as the model reads at once"
            }
            _ => "",
        };
        let cut = match count {
            1 => "one passage".to_string(),
            n => {
                let tokens = cutter.passage_tokens();
                format!("cut into {n} passages of at most {tokens} tokens{limit}")
            }
        };
        match cutter.lost() {
            0 => cut,
            n => format!("{cut}; {n} tokens of words that no passage holds are left out"),
        }
    }

    fn pairs(mut self, encoder: &TextEncoder, pairs: &[Pair]) -> Result<Results> {
        let path = self.args.pairs.as_deref().unwrap_or(Path::new(""));
        let name = shown(path);
        let progress = progress_bar(pairs.len() as u64);
        let (mut judged, mut sentences) = (Vec::new(), Sentences::default());
        for (index, pair) in (0u64..).zip(pairs) {
            progress.set_position(index);
            let [a, b] = &pair.sentences;
            // Of all pairs, so that the parts of a corpus say the same.
            sentences.add(encoder, a)?;
            sentences.add(encoder, b)?;
            if !self.args.shard.has(index) {
                continue;
            }
            let mut embed = |sentence: &str, side: u64| -> Result<Embeddings> {
                let mut cutter = self.model.cutter(None)?;
                cutter.push(sentence)?;
                let passage = cutter.next(true)?;
                let passage =
                    passage.with_context(|| format!("{name}: no word or sign in {sentence:?}"))?;
                self.record(&passage, 2 * index + side)
            };
            let embeddings = [embed(a, 0)?, embed(b, 1)?];
            judged.push(Judged::new(&name, index, pair.score, embeddings)?);
        }
        progress.finish_and_clear();
        let how = sentences.describe().with_context(|| format!("cannot use the pairs {name}"))?;
        self.finish(name, how, judged)
    }

    fn record(&mut self, passage: &Passage, index: u64) -> Result<Embeddings> {
        let Passage { ids, words } = passage;
        let of_passage = || format!("passage {index}");
        let embeddings =
            self.recorder.record(self.model, ids, words, index).with_context(of_passage)?;
        if let Some(Switched { model, substitutes }) = &mut self.linear {
            self.recorder.record_linear(model, substitutes, ids).with_context(of_passage)?;
        }
        Ok(embeddings)
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

/// A checksum of the model's files, which tells models apart whatever their folders are called; with
/// how weights are held, if that was chosen, because it changes what they compute.
fn fingerprint(files: &[PathBuf], weights: Weights) -> Result<String> {
    let mut hasher = Checksum(crc32fast::Hasher::new());
    let mut size = 0;
    for path in files {
        let cannot = || format!("cannot read {}", path.display());
        let mut file = std::fs::File::open(path).with_context(cannot)?;
        size += std::io::copy(&mut file, &mut hasher).with_context(cannot)?;
    }
    let held = match weights {
        Weights::Auto => "",
        Weights::Quantized => "-quantized",
        Weights::F32 => "-f32",
    };
    Ok(format!("{:08x}-{size}{held}", hasher.0.finalize()))
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
