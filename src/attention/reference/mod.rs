//! Attention by plainer ways: what the kernels are held against, and what runs where they do not.
//!
//! ```text
//! tensor_ops    int8 scores and attention by Candle's tensor operations   every device
//! unfused       attention step by step, with all M * N probabilities      fp32, probabilities to look at
//! steps         what both do with scores, whoever computes them
//! ```

mod steps;

pub mod tensor_ops;
pub mod unfused;
