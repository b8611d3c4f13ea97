//! The machine, and how much of it is used.

use anyhow::Result;
use candle_int8_attention::cpu::{KernelInfo, active_level, levels};
use serde::Serialize;
use std::fmt;

/// What results depend on.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The processor's name, or its architecture where the system does not tell.
    pub processor: String,
    /// Logical processors that this process may use.
    pub cores: usize,
    /// Threads of rayon's global pool.
    pub threads: usize,
    /// The level of the processor that the crate uses.
    pub level: &'static str,
    /// Each operation of the crate, and the level whose instructions it uses.
    pub kernels: Vec<(&'static str, &'static str)>,
}

impl Machine {
    /// Asks the system and the crate.
    ///
    /// # Errors
    /// If a level is forced that cannot be used: the message lists those that can.
    pub fn find() -> Result<Self> {
        let level = active_level()?;
        let of_level = levels().into_iter().filter(|info| info.name == level);
        let pair = |KernelInfo { operation, kernel, .. }| (operation, kernel);
        Ok(Self {
            processor: processor().unwrap_or_else(|| std::env::consts::ARCH.to_string()),
            cores: std::thread::available_parallelism()?.get(),
            threads: rayon::current_num_threads(),
            level,
            kernels: of_level.flat_map(|info| info.kernels).map(pair).collect(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, cores, threads, level, kernels } = self;
        let noun = if *threads == 1 { "thread" } else { "threads" };
        write!(f, "{processor}, {cores} cores; {threads} {noun}, level {level}")?;
        for (operation, kernel) in kernels {
            write!(f, "\n  {operation}: {kernel}")?;
        }
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
