//! The one scheduler: a loop that the calling thread shares with rayon's pool, and how much work is worth
//! waking a thread for.
//!
//! * `share` is the loop itself, which says nothing about what is worth it.
//! * `work` is an amount of work, and runs its parts on as many threads as pay.

mod share;
mod work;

pub(crate) use share::map;
pub(crate) use work::{Pace, Work};
