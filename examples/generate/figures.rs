//! How fast tokens were made, and what memory is in use.

use std::time::{Duration, Instant};

/// Tokens that the model has read, and the time it took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    pub tokens: usize,
    pub time: Duration,
}

impl Pace {
    /// Runs `work`, which reads `tokens` tokens.
    pub fn measure<T>(&mut self, tokens: usize, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let made = work();
        self.time += start.elapsed();
        self.tokens += tokens;
        made
    }

    /// `12 tokens, 34.5 tokens/s`.
    pub fn describe(&self) -> String {
        self.describe_text(self.tokens)
    }

    /// The same of a text of `tokens` tokens, the last of which need not have been read.
    pub fn describe_text(&self, tokens: usize) -> String {
        let s = if tokens == 1 { "" } else { "s" };
        let seconds = self.time.as_secs_f64();
        match seconds > 0.0 {
            true => {
                let rate = self.tokens as f64 / seconds;
                format!("{tokens} token{s}, {rate:.1} tokens/s")
            }
            false => format!("{tokens} token{s}"),
        }
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
