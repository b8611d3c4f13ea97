//! Everyone in turns, so that whatever else the machine does hits everyone alike.

use crate::contenders::Contender;
use candle_core::Result;
use serde::Serialize;
use statrs::statistics::{Data, Max, Min, OrderStatistics};
use std::time::{Duration, Instant};

/// How long someone goes on before the next one has its turn, and the calls that everyone makes at
/// least in all turns together.
const TURN: Duration = Duration::from_millis(50);
const FEWEST_CALLS: usize = 3;

/// Seconds of one call, over all calls.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    pub median: f64,
    pub lower_quartile: f64,
    pub upper_quartile: f64,
    pub fastest: f64,
    pub slowest: f64,
    pub calls: usize,
}

impl Timing {
    fn of(seconds: Vec<f64>) -> Self {
        let calls = seconds.len();
        let mut data = Data::new(seconds);
        Self {
            median: data.median(),
            lower_quartile: data.lower_quartile(),
            upper_quartile: data.upper_quartile(),
            fastest: data.min(),
            slowest: data.max(),
            calls,
        }
    }

    /// Half of what lies between the quartiles, as a part of the median.
    pub fn spread(&self) -> f64 {
        (self.upper_quartile - self.lower_quartile) / 2.0 / self.median
    }
}

/// Lets everyone make a call to warm up, and then take turns until the time is over. Whose first
/// call fails is left out, with the reason.
pub fn in_turns(contenders: &mut [Contender], budget: Duration) -> Vec<Result<Timing>> {
    let mut times: Vec<Result<Vec<f64>>> =
        contenders.iter_mut().map(|contender| contender.call().map(|_| Vec::new())).collect();
    let turn = TURN.min(budget);
    let start = Instant::now();
    for round in 0.. {
        // Each round starts with another one: nobody always follows the same neighbour.
        for i in 0..contenders.len() {
            let who = (round + i) % contenders.len();
            if let Ok(seconds) = &mut times[who]
                && let Err(error) = take_turn(&mut contenders[who], turn, seconds)
            {
                times[who] = Err(error);
            }
        }
        let enough = |seconds: &Vec<f64>| seconds.len() >= FEWEST_CALLS;
        if times.iter().flatten().all(enough) && start.elapsed() >= budget {
            break;
        }
    }
    times.into_iter().map(|seconds| seconds.map(Timing::of)).collect()
}

/// Calls until the turn is over, at least once.
fn take_turn(contender: &mut Contender, turn: Duration, seconds: &mut Vec<f64>) -> Result<()> {
    let start = Instant::now();
    loop {
        seconds.push(contender.call()?);
        if start.elapsed() >= turn {
            return Ok(());
        }
    }
}
