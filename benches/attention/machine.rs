//! The machine, and how much of it is used.

use anyhow::Result;
use serde::Serialize;
use std::fmt;
use std::num::NonZeroUsize;

/// What results depend on.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The processor's name, or its architecture where the system does not tell.
    pub processor: String,
    /// Logical processors that this process may use.
    pub cores: usize,
    /// Threads of rayon's global pool.
    pub threads: usize,
    /// The level of the processor that this crate uses.
    pub level: &'static str,
}

impl Machine {
    pub fn find() -> Result<Self> {
        Ok(Self {
            processor: processor().unwrap_or_else(|| std::env::consts::ARCH.to_string()),
            cores: std::thread::available_parallelism()?.get(),
            threads: rayon::current_num_threads(),
            level: candle_int8_attention::cpu::active_level()?,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, threads, level } = self;
        let noun = if *threads == 1 { "thread" } else { "threads" };
        write!(f, "{processor}, {cores} cores; {threads} {noun}, level {level}")?;
        if threads > cores {
            write!(f, "\nMore threads than cores: they take turns, and times are not comparable.")?;
        }
        Ok(())
    }
}

/// As Linux tells it.
fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Makes everyone use this many threads: rayon's global pool, and Candle, which has a pool of its
/// own and asks the same variable.
pub fn set_threads(threads: Option<NonZeroUsize>) -> Result<()> {
    if let Some(threads) = threads {
        // SAFETY: `main` has just begun and no other thread runs.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
    rayon::ThreadPoolBuilder::new().build_global()?;
    Ok(())
}
