//! The layers around attention, in fused and vectorized form for f32 on a CPU.
//!
//! ```text
//! Embeddings  rows of tables, added up and normalized in one pass over the result
//! Linear      x·W^T + b, an activation or a residual in the same pass over the result
//! LayerNorm   of each row; after a Linear in the memory of its result
//! ```
//!
//! Weights are packed once, in a [`Precision`], when a model is loaded or in a file ([`save_linear`]), and
//! multiplied by the room `product`. Norms and activations are loops over `pulp`'s vectors, those of the level
//! in use. A row of a result depends on nothing but its own row of the input, so the number of threads
//! changes nothing.
//!
//! The fused form has no gradient. Where one is asked for (an input depends on a variable), and on
//! other devices and for other dtypes, the same layers are made of Candle's own operations.

mod activation;
mod embeddings;
mod layer_norm;
mod linear;
mod plain;

pub use activation::Activation;
pub(crate) use embeddings::{Embeddings, Tokens};
pub use layer_norm::LayerNorm;
pub use linear::{Linear, Precision, load_linear, save_linear};

#[cfg(test)]
use candle_core::Tensor;

/// Every instruction set that the tests can run here, plain scalars included.
#[cfg(test)]
fn all_vectors() -> Vec<pulp::Arch> {
    let mut all = vec![pulp::Arch::Scalar, pulp::Arch::new()];
    #[cfg(target_arch = "x86_64")]
    all.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
    all
}

/// A layer gives the same bits, whatever the number of threads.
#[cfg(test)]
fn assert_threads_change_nothing(forward: impl Fn() -> Tensor + Sync) {
    let with_threads = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&forward)
    };
    let one = with_threads(1);
    for threads in [2, 3, 16] {
        let difference = crate::testing::largest_difference(&one, &with_threads(threads));
        assert_eq!(difference, 0.0, "{threads}");
    }
}
