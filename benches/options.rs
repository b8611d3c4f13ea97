//! The options that all benches have.

use crate::machine::Machine;
use crate::turns::Pace;
use anyhow::Result;
use candle_int8_attention::cpu::LEVEL_VARIABLE;
use std::num::NonZeroUsize;
use std::time::Duration;

/// On what a bench runs, and for how long.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Level of the processor to use, as the variable CANDLE_INT8_CPU forces it [default: the best]
    #[arg(long, value_name = "NAME")]
    pub level: Option<String>,

    /// Threads [default: RAYON_NUM_THREADS, or one for each core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// Seconds of measuring for each shape; everyone is timed at least three times in any case
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    pub seconds: f64,

    /// Time the first call after 100 ms in which nothing runs, instead of a steady state
    #[arg(long)]
    pub after_silence: bool,

    /// Small shapes and three calls each: shows that everything runs, not how fast
    #[arg(long)]
    pub short: bool,

    /// What cargo adds when it runs a bench
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// Starts in the project's folder, with these threads and this level. For the beginning of `main`.
    ///
    /// # Errors
    /// If the level cannot be used: the message lists those that can.
    pub fn start(&self) -> Result<Machine> {
        crate::start_in_project()?;
        if let Some(level) = &self.level {
            // SAFETY: `main` has just begun and no other thread runs.
            unsafe { std::env::set_var(LEVEL_VARIABLE, level) };
        }
        if let Some(threads) = self.threads {
            // For Candle too, which has a pool of its own and asks the same variable.
            // SAFETY: as above.
            unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
        }
        rayon::ThreadPoolBuilder::new().build_global()?;
        Machine::find()
    }

    /// How to measure.
    pub fn pace(&self) -> Pace {
        let budget = Duration::from_secs_f64(self.seconds);
        if self.short {
            Pace::Short
        } else if self.after_silence {
            Pace::AfterSilence(budget)
        } else {
            Pace::Steady(budget)
        }
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|&s| Duration::try_from_secs_f64(s).is_ok());
    seconds.ok_or_else(|| "expected a number of seconds, 0 or more".to_string())
}
