//! Random tensors and the one comparison of tensors.

#![allow(dead_code, reason = "not all of it in each test program")]

use candle_core::{DType, Device, Shape, Tensor};
use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, StandardNormal};
use std::cell::RefCell;

thread_local! {
    // The test runner gives each test a thread of its own, so that each starts from this seed.
    static RNG: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(0x5eed));
}

/// Independent normal numbers with mean 0 and deviation 1, the same in every run (Candle's own
/// cannot be seeded on a CPU): a test that fails only now and then cannot be repaired.
pub fn randn(shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values: Vec<f32> = RNG
        .with_borrow_mut(|rng| StandardNormal.sample_iter(rng).take(shape.elem_count()).collect());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The largest magnitude, or NaN if there is one, so that no comparison with a bound holds: Candle's
/// own maximum steps over NaN.
pub fn largest(x: &Tensor) -> f64 {
    let x = x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    x.into_iter().map(f64::abs).max_by(f64::total_cmp).unwrap_or(0.0)
}

/// The largest difference of two tensors of the same shape.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let f64s = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    largest(&(f64s(a) - f64s(b)).unwrap())
}
