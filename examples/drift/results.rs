//! Results that can be written, read back and merged.

use crate::common::text;
use crate::pairs::{Judged, similarity};
use anyhow::{Context, Result, ensure};
use candle_int8_attention::drift::{Recorder, Report};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::path::{Path, PathBuf};

/// Everything that was gathered.
#[derive(Serialize, Deserialize)]
pub struct Results {
    pub recorder: Recorder,
    pub pairs: Vec<Judged>,
}

/// What --json prints: figures for people and programs, and what `merge` needs.
#[derive(Serialize)]
struct Printed<'a> {
    format: &'static str,
    #[serde(flatten)]
    report: &'a Report,
    /// On one line: it is long, and for `merge` alone.
    state: Box<RawValue>,
}

/// Changes whenever the state changes its meaning.
const FORMAT: &str = "candle-int8-attention drift 1";

impl Results {
    pub fn report(&self) -> Report {
        let mut report = self.recorder.report();
        report.similarity = similarity(&self.pairs, &self.recorder);
        report
    }

    pub fn to_json(&self, report: &Report) -> Result<String> {
        let state = serde_json::value::to_raw_value(self)?;
        Ok(serde_json::to_string_pretty(&Printed { format: FORMAT, report, state })?)
    }

    fn load(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Read {
            format: String,
            state: Box<RawValue>,
        }
        let text = text::read(path)?;
        ensure!(!text.trim().is_empty(), "is empty; the run that should have written it failed");
        let read: Read = serde_json::from_str(&text).context("no result of drift --json")?;
        ensure!(
            read.format == FORMAT,
            "written in the format {:?}, expected {FORMAT:?}",
            read.format
        );
        let results: Self =
            serde_json::from_str(read.state.get()).context("its state is damaged")?;
        let configs = results.recorder.configs().count();
        let damaged = results.pairs.iter().find(|pair| !pair.is_of(configs));
        ensure!(damaged.is_none(), "its state is damaged: a pair without its numbers");
        Ok(results)
    }
}

/// All results in one.
pub fn merge(files: &[PathBuf]) -> Result<Results> {
    let load = |path: &PathBuf| Results::load(path).with_context(|| path.display().to_string());
    let mut merged: Option<Results> = None;
    for path in files {
        let results = load(path)?;
        match &mut merged {
            None => merged = Some(results),
            Some(merged) => {
                merged
                    .recorder
                    .merge(&results.recorder)
                    .with_context(|| format!("cannot merge {}", path.display()))?;
                merged.pairs.extend(results.pairs);
            }
        }
    }
    merged.context("no results to merge")
}
