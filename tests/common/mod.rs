//! What several test programs need.

#![allow(dead_code, unused_imports, reason = "not all of it in each of them")]

#[cfg(feature = "hub")]
pub mod hub_server;
pub mod json;
pub mod numbers;
pub mod tiny;
pub mod tiny_bert;
pub mod tiny_encoders;

pub use numbers::{largest, largest_difference, randn};
