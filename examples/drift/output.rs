//! The report for the terminal.

use candle_int8_attention::drift::{Gate, Report};
use std::fmt::Write;

/// The report for the terminal, with the gate's verdict.
pub fn render(report: &Report, gate: Option<&Gate>) -> String {
    let mut text = report.to_text();
    if let Some(gate) = gate {
        let _ = match gate.violations(report).len() {
            0 => writeln!(text, "\nGate: every threshold holds."),
            1 => writeln!(text, "\nGate: a threshold does not hold in one place."),
            n => writeln!(text, "\nGate: thresholds do not hold in {n} places."),
        };
    }
    text
}
