//! Plain definitions of what the kernels compute, to hold them against.

pub mod int_product;
