//! What several test programs need.

use candle_core::{Device, Shape, Tensor};
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
