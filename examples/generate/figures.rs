//! How fast tokens were made, and what memory is in use.

use std::time::{Duration, Instant};

/// Tokens and the time they took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    pub tokens: usize,
    pub time: Duration,
}

impl Pace {
    /// Runs `work`, which makes `tokens` tokens.
    pub fn measure<T>(&mut self, tokens: usize, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let made = work();
        self.time += start.elapsed();
        self.tokens += tokens;
        made
    }

    /// `12 tokens, 34.5 tokens/s`.
    pub fn describe(&self) -> String {
        let seconds = self.time.as_secs_f64();
        let rate = if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 };
        let s = if self.tokens == 1 { "" } else { "s" };
        format!("{} token{s}, {rate:.1} tokens/s", self.tokens)
    }
}

/// `1.5 MB`.
pub fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Memory of this process that is in RAM, where the system tells it (Linux).
pub fn resident_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}
