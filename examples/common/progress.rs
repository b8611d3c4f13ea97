//! How far a program is, on stderr, where somebody looks.

use indicatif::{ProgressBar, ProgressStyle};

/// For `length` of whatever is counted.
pub fn progress_bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style =
        ProgressStyle::with_template("{bar:40} {percent:>3} %  {elapsed} of {duration}  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}
