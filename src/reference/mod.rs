//! The same numbers by plainer ways: what the kernels are held against, and what runs where they do
//! not.
//!
//! ```text
//! tensor_ops    int8 scores and attention by Candle's tensor operations   every device
//! unfused       attention step by step, with all M * N probabilities      fp32, probabilities to look at
//! int_product   the integer product as a plain triple loop                tests
//! ```

mod int_product;
mod steps;

pub mod tensor_ops;
pub mod unfused;

#[doc(hidden)]
pub use int_product::int_product;

pub(crate) use steps::repeat_heads;
