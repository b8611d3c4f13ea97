//! Tables, numbers and the end of the program.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use std::borrow::Cow;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

/// No line is wider, so that a terminal of 100 columns does not fold them.
const WIDTH: u16 = 100;

/// An empty table. The first column is text, the others are numbers (aligned to the right).
///
/// The lines are those of a Markdown table: a report can be pasted into an issue as it is.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Running text, in lines that are not wider than a table.
pub fn wrapped(text: &str) -> String {
    textwrap::fill(text, usize::from(WIDTH))
}

/// Like [`wrapped`], two columns to the right, and what is folded two more.
pub fn indented(text: &str) -> String {
    let options = textwrap::Options::new(usize::from(WIDTH));
    textwrap::fill(text, options.initial_indent("  ").subsequent_indent("    "))
}

/// `1 passage`, `2 passages`.
pub fn count(number: usize, noun: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{s}")
}

/// A signal-to-noise ratio: one decimal; equal data has none.
pub fn decibel(sqnr: f64) -> String {
    if sqnr == f64::INFINITY { "exact".into() } else { format!("{sqnr:.1}") }
}

/// Small numbers with two digits, zero as `0`.
pub fn scientific(x: f64) -> String {
    if x == 0.0 { "0".into() } else { format!("{x:.1e}") }
}

/// A change, with its sign.
pub fn signed(x: f64) -> String {
    format!("{x:+.5}")
}

/// The arguments. A wrong one is status 1 like any other error, not clap's 2: that one says that a
/// gate or a budget does not hold.
pub fn parse<T: clap::Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        // If it cannot be printed, there is nobody to read it.
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    })
}

/// Prints the report, or the error on stderr, and gives the exit code.
///
/// A reader that closes the pipe early (`| head`) is no error.
pub fn finish(report: anyhow::Result<String>) -> ExitCode {
    match report.map(|text| print(&text)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Ok(Err(error)) => failure(&format!("the report could not be written: {error}")),
        Err(error) => failure(&format!("{error:#}")),
    }
}

fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", for_terminal(text.trim_end(), &out))?;
    out.flush()
}

/// Prints a line on stderr. If that is closed, there is nobody to tell, which is no error.
pub fn tell(line: &str) {
    let mut out = std::io::stderr().lock();
    let line = for_terminal(line, &out);
    let _ = writeln!(out, "{line}");
}

/// A text as it is for a file or a pipe, and [`escaped`] for a terminal.
pub fn for_terminal<'a>(text: &'a str, out: &impl IsTerminal) -> Cow<'a, str> {
    if out.is_terminal() { escaped(text) } else { Cow::Borrowed(text) }
}

/// Text of models and files with those characters shown that a terminal would obey: control
/// characters but for new lines and tabs, and marks that turn the direction of what follows.
pub fn escaped(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}');
        turns || (c.is_control() && !['\n', '\t'].contains(&c))
    };
    if !text.chars().any(obeyed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if obeyed(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Prints an error, and gives the exit code.
pub fn failure(message: &str) -> ExitCode {
    tell(&format!("error: {message}"));
    ExitCode::FAILURE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown_and_all_else_stays() {
        for (text, expected) in [
            ("\u{1b}]0;title\u{7}\u{1b}[2J", "\\u{1b}]0;title\\u{7}\\u{1b}[2J"),
            ("a\rb\u{8}\u{7f}\0", "a\\rb\\u{8}\\u{7f}\\u{0}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("\u{202e}drow", "\\u{202e}drow"),
        ] {
            assert_eq!(escaped(text), expected);
        }
        let plain = "a line\n\twith naïve, 日本 and \u{1d11e}";
        assert!(matches!(escaped(plain), Cow::Borrowed(same) if same == plain));
    }
}
