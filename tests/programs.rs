//! The programs in `examples`, run as a user and as a CI job run them: on good input, on bad input,
//! into a closed pipe. `start` starts them. The parts of them that have tests of their own are
//! compiled into this test program, where those tests run.

mod common;

// The programs compile a copy each, and there is no library to take it from.
#[path = "../examples/common/mod.rs"]
mod parts;

// Named, so that the files are in a folder of their own.
mod programs {
    mod affine_walkthrough;
    mod attend;
    mod calibrate_and_search;
    #[cfg(feature = "drift")]
    mod drift;
    mod embed;
    mod embeddings;
    mod generate_and_perplexity;
    #[cfg(feature = "hub")]
    mod hub;
    mod passages;
    mod rerank;
    mod start;
    mod tools_with_decoders;
}
