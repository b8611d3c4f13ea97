//! Contenders that take turns within one run, so that what disturbs the machine disturbs all.

use anyhow::Result;
use serde::Serialize;
use std::time::{Duration, Instant};

/// One way to compute, by name.
pub struct Contender<'a> {
    /// For people.
    pub name: &'static str,
    /// Computes once.
    pub run: Box<dyn FnMut() -> Result<()> + 'a>,
}

/// How long a contender takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    /// Of the contender.
    pub name: &'static str,
    /// Median seconds.
    pub seconds: f64,
    /// The fastest round: what a busy machine hides.
    pub best: f64,
    /// How often it ran.
    pub rounds: usize,
}

/// Lets everyone run once to warm up, then in turns until the time is over, at least three times.
pub fn in_turns(contenders: &mut [Contender<'_>], budget: Duration) -> Result<Vec<Timing>> {
    let mut times = vec![Vec::new(); contenders.len()];
    for contender in contenders.iter_mut() {
        (contender.run)()?;
    }
    let start = Instant::now();
    while times.iter().any(|times| times.len() < 3) || start.elapsed() < budget {
        for (contender, times) in contenders.iter_mut().zip(&mut times) {
            let start = Instant::now();
            (contender.run)()?;
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let timing = |(contender, times): (&Contender<'_>, &mut Vec<f64>)| {
        times.sort_by(f64::total_cmp);
        let (seconds, best) = (times[times.len() / 2], times[0]);
        Timing { name: contender.name, seconds, best, rounds: times.len() }
    };
    Ok(contenders.iter().zip(&mut times).map(timing).collect())
}
