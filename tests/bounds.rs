//! Tensors that are made to do harm: shapes larger than memory, numbers at the end of their range,
//! arguments that make no sense. Each is an error of this crate that says what is wrong, or gives what
//! ordinary tensors give.

mod common;

// Named, so that the files are in a folder of their own.
mod bounds {
    mod arguments;
    mod errors;
    mod numbers;
    mod sizes;

    use super::*;
}

use candle_core::{Device, Tensor};
use candle_int8_attention::{AttentionConfig, Error};
use common::tiny_bert;

/// Both backends, with their names.
fn backends() -> [(&'static str, AttentionConfig); 2] {
    [("int8", AttentionConfig::int8()), ("fp32", AttentionConfig::fp32())]
}

/// Zeros of any shape without any memory: all strides are 0.
fn nothing_of(shape: &[usize]) -> Tensor {
    Tensor::zeros(vec![1; shape.len()], candle_core::DType::F32, &Device::Cpu)
        .and_then(|zero| zero.broadcast_as(shape))
        .unwrap()
}
