//! Memory for results and operands: written once, aligned, in huge pages where that helps.

mod aligned;
mod uninit;

pub(crate) use aligned::AlignedBytes;
pub(crate) use uninit::{overwrite, written};
