//! Everyone in turns within one run, so that whatever else the machine does hits everyone alike.

use serde::Serialize;
use statrs::statistics::{Data, Max, Min, OrderStatistics};
use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long someone goes on before the next one has its turn. Calls that end in the first third are not
/// counted: the caches are those of the one before, and threads wake up.
const TURN: Duration = Duration::from_millis(600);
/// What a server sleeps between two requests.
const SILENCE: Duration = Duration::from_millis(100);
/// The calls of everyone that are counted at least, in all turns together.
const FEWEST_CALLS: usize = 3;

/// What a turn is.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// One call, three times.
    Short,
    /// Calls one after the other for 0.6 s, of which the first third is not counted; turns go round for at
    /// least so long.
    Steady(Duration),
    /// The first call after 100 ms in which nothing runs; turns go round for at least so long.
    AfterSilence(Duration),
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pace::Short => "too few calls to say how fast",
            Pace::Steady(_) => "in a steady state",
            Pace::AfterSilence(_) => "the first call after 100 ms of silence",
        })
    }
}

/// Seconds of one call, over all calls that count.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Timing {
    /// Half of the calls took less.
    pub median: f64,
    /// A quarter of the calls took less.
    pub lower_quartile: f64,
    /// A quarter of the calls took more.
    pub upper_quartile: f64,
    /// What a busy machine hides.
    pub fastest: f64,
    /// The slowest call.
    pub slowest: f64,
    /// How many calls count.
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

/// Seconds of one call.
///
/// # Errors
/// That of the call.
pub fn seconds<E>(call: impl FnOnce() -> Result<(), E>) -> Result<f64, E> {
    let start = Instant::now();
    call()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Lets everyone make a call to warm up, and then take turns. Who has an error is left out, with the
/// error.
pub fn in_turns<E>(
    contenders: &mut [impl FnMut() -> Result<(), E>],
    pace: Pace,
) -> Vec<Result<Timing, E>> {
    let mut times: Vec<Result<Vec<f64>, E>> =
        contenders.iter_mut().map(|call| call().map(|()| Vec::new())).collect();
    let budget = match pace {
        Pace::Short => Duration::ZERO,
        Pace::Steady(budget) | Pace::AfterSilence(budget) => budget,
    };
    let start = Instant::now();
    for round in 0.. {
        // Each round starts with another one: nobody always follows the same neighbour.
        for i in 0..contenders.len() {
            let who = (round + i) % contenders.len();
            if let Ok(seconds) = &mut times[who]
                && let Err(error) = take_turn(&mut contenders[who], pace, seconds)
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

fn take_turn<E>(
    call: &mut impl FnMut() -> Result<(), E>,
    pace: Pace,
    counted: &mut Vec<f64>,
) -> Result<(), E> {
    match pace {
        Pace::Short => counted.push(seconds(call)?),
        Pace::AfterSilence(_) => {
            sleep(SILENCE);
            counted.push(seconds(call)?);
        }
        Pace::Steady(_) => {
            let start = Instant::now();
            while start.elapsed() < TURN {
                let seconds = seconds(&mut *call)?;
                if start.elapsed() > TURN / 3 {
                    counted.push(seconds);
                }
            }
        }
    }
    Ok(())
}
