//! Memory for results and operands: sizes that are checked, written once, aligned, in huge pages where that
//! helps, kept by threads as long as it is little.

mod aligned;
mod kept;
mod prefetch;
mod sizes;
mod uninit;

pub(crate) use aligned::Aligned;
pub(crate) use kept::{Footprint, Kept, footprint};
pub(crate) use prefetch::{LINE, prefetch, prefetch_slice};
pub(crate) use sizes::check_size;
pub(crate) use uninit::{overwrite, written};
