//! Tables and numbers for people.

use comfy_table::{CellAlignment, Table, presets};

/// The header of the column of shapes.
pub const SHAPE: &str = "[B, H, N, D]";

/// What stands where there is no number.
pub const NOTHING: &str = "-";

/// A number as `show` writes it, if there is one.
pub fn known(number: Option<f64>, show: fn(f64) -> String) -> String {
    number.map_or(NOTHING.into(), show)
}

/// An empty table, in lines of Markdown. The first column is text, the others are numbers.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Seconds as ms with three digits.
pub fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    let decimals = match ms {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        0.1.. => 3,
        _ => 4,
    };
    format!("{ms:.decimals$}")
}

pub fn percent(fraction: f64) -> String {
    format!("{:.0} %", fraction * 100.0)
}

/// A ratio: `2.31x`.
pub fn times(ratio: f64) -> String {
    let decimals = if ratio < 10.0 { 2 } else { 0 };
    format!("{ratio:.decimals$}x")
}
