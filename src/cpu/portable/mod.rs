//! Plain Rust for every machine, compiled for the baseline of its architecture.

pub(crate) mod float_panels;
pub(crate) mod int16_panels;
pub(crate) mod int8_panels;
pub(crate) mod int8_product;
pub(crate) mod stored_int8;

pub(crate) const NAME: &str = "portable";

/// The same where the baseline has leaves of its own, for tests.
#[cfg(all(target_arch = "x86_64", test))]
pub(crate) const PLAIN: &str = "portable, in plain Rust";

plain_kernels!(NAME);
