//! Files that are damaged or made to do harm, through the library: each is an error that names the
//! file, in bounded time and memory, or means what a whole file means.

mod common;

// Named, so that the files are in a folder of their own.
mod damaged {
    mod caches;
    mod gguf;
    #[cfg(feature = "drift")]
    mod mutations;
    #[cfg(feature = "drift")]
    mod results;
    mod tokenizer_files;
    mod weights;

    use super::*;
    use common::{tiny, tiny_encoders};
}

use candle_int8_attention::Error;
use std::path::Path;

/// The message of the `Error::Corrupt` that `result` must be, which names the file.
fn corrupt<T>(path: &Path, result: Result<T, Error>) -> String {
    match result {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(Error::Corrupt { path: named, problem }) => {
            assert_eq!(named, path, "{problem}");
            problem
        }
        Err(other) => panic!("{other:?} is not Error::Corrupt"),
    }
}

/// Numbers between -1 and 1 that differ from each other.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + seed) % 1009) as f32 / 505.0 - 1.0).collect()
}
