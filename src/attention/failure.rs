//! Errors from inside a Candle op, as they are: Candle keeps the text of an error, with a backtrace in it if
//! one was asked for.

use crate::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};

/// The error of one call, which the op and its caller share.
#[derive(Clone, Default)]
pub(super) struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    /// Inside of the op: keeps an error for the caller, and tells Candle that there is one.
    pub(super) fn keep<T>(&self, result: Result<T>) -> candle_core::Result<T> {
        result.map_err(|error| {
            let text = error.to_string();
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            candle_core::Error::Msg(text)
        })
    }

    /// Outside: the error that was kept, or Candle's own.
    pub(super) fn of<T>(&self, result: candle_core::Result<T>) -> Result<T> {
        result.map_err(|candle| {
            let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            kept.unwrap_or(Error::Candle(candle))
        })
    }
}
