//! What the examples share: where models and text come from, which int8 configuration is used, how
//! tables and errors are printed.

// Each example compiles its own copy of this module and uses a part of it.
#![allow(dead_code)]

pub mod cache;
pub mod config;
pub mod correlation;
pub mod cutter;
pub mod extremes;
pub mod llama;
pub mod model;
pub mod output;
pub mod passages;
pub mod precision;
pub mod print;
pub mod progress;
pub mod shard;
pub mod text;
pub mod text_model;
pub mod windows;
pub mod words;
