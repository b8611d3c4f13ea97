//! The walkthrough in words and tables, at most 100 columns wide.

use crate::Walkthrough;
use crate::first_tried::{Attempt, FirstTried};
use crate::print::{decibel, table};
use crate::right_way::{Modes, Multiplier, Quantized, RightWay, Stage};
use crate::scores::Sample;
use comfy_table::Table;
use std::fmt::Write;

/// The whole report.
pub fn text(walkthrough: &Walkthrough) -> String {
    let parts = [
        opening(walkthrough),
        first_tried(&walkthrough.first_tried, &walkthrough.samples),
        right_way(&walkthrough.right_way, &walkthrough.samples),
        followed(walkthrough),
        origin(&walkthrough.right_way),
        answers(walkthrough),
    ];
    parts.join("\n")
}

fn opening(walkthrough: &Walkthrough) -> String {
    let Walkthrough { data, shape, level, .. } = walkthrough;
    format!(
        "A is {shape:?}: {data}.
The product is A times A transposed. Level: {level}.

Throughout, real = scale * (q - zero_point), with q an int8 code.
Error is SQNR in dB: signal energy over error energy, as 10 log10. More is better, 6 dB are
one bit, and 0 dB is as good as answering 0 every time.
"
    )
}

fn first_tried(tried: &FirstTried, samples: &[Sample]) -> String {
    let mut text = format!(
        "1. THE WAY IT WAS FIRST TRIED

A -> int8 with scale max|A| / 127 and offset 0, then int32 sums. Both are right.
The sums lie in {:.0} .. {:.0}; the scores they stand for, in {:.2} .. {:.2}.
(max - min) / 255 of the sums is {:.1}. Then, from int32 to int8 and back:

",
        tried.accumulator_min,
        tried.accumulator_max,
        tried.real_min,
        tried.real_max,
        tried.accumulator_step
    );
    let mut header = vec!["from int32 to int8 and back", "offset", "scale", "clamped"];
    header.extend(samples.iter().map(|sample| sample.name.as_str()));
    header.push("dB");
    let mut table = table(&header);
    table.add_row(fp32_row(samples, 4));
    for attempt in &tried.attempts {
        table.add_row(attempt_row(attempt));
    }
    let _ = writeln!(text, "{table}");
    text.push_str(
        "
What each does to the numbers:
- A zero point must be an int8 code. min of the sums is far outside of -128 .. 127: every code is
  clamped to the same end, and nothing is left of the scores.
- min(AB) counts in real units, a zero point in codes. Where the two are close, it is by chance.
- A scale taken from the sums is in units of the sums. What comes back is too large by
  1 / (sA * sB), whatever the zero point.
- Without the zero point, every score is shifted by the same amount, scale * zero_point.
- The last line works: min(AB) as an fp32 offset is another way to write an affine code. It is
  not a zero point, and a real 0 is no longer exact. The integer zero point below is as good.
",
    );
    text
}

fn attempt_row(attempt: &Attempt) -> Vec<String> {
    let mut row = vec![
        attempt.name.to_string(),
        number(attempt.offset),
        number(attempt.scale),
        format!("{:.0} %", attempt.clamped_percent),
    ];
    row.extend(attempt.samples.iter().map(ToString::to_string));
    row.push(decibel(attempt.sqnr_db));
    row
}

fn right_way(right: &RightWay, samples: &[Sample]) -> String {
    let Multiplier { real: multiplier, mantissa, right_shift } = right.multiplier;
    let Modes { codes, differing, largest_difference } = right.modes;
    let (affine_zero, output_zero) = (right.a_affine.zero_point, right.affine_output.zero_point);
    format!(
        "2. THE RIGHT WAY, STAGE BY STAGE

Stage 1, quantize A. Scale = max|A| / 127 = {} / 127 = {}, zero point 0:
error of A {} dB. Affine instead, scale {}, zero point {affine_zero}: {} dB.
Both will do; for data around zero, symmetric is simpler and needs no correction.

Stage 2, multiply. int32 sums are exact: this stage adds no error.
({} rows compared with the plain triple loop: equal.)

Stage 3, back to fp32 straight from int32: real = sA * sB * sum.

{}

Stage 4, only for those who must store int8 scores: requantize, then dequantize.
Symmetric: scale = max|AB| / 127 = {}. Affine, of the real AB: scale = (max(0, max) -
min(0, min)) / 255 = {}, zero point = clamp(round(-128 - min(0, min) / scale)) = {output_zero}.
code = clamp(round(sum * m) + zero_point), m = sA * sB / scale = {}.
Fixed-point mode writes m as {mantissa} * 2^(-31 - {right_shift}) and needs integers only.
Of {codes} codes, {differing} differ between the two modes{}.

{}
",
        number(right.a_max_abs),
        number(right.a_symmetric.scale),
        decibel(right.a_symmetric.sqnr_db),
        number(right.a_affine.scale),
        decibel(right.a_affine.sqnr_db),
        right.exact_rows,
        stages(&right.from_int32, samples, "int8 inputs, fp32 scores"),
        number(right.symmetric_output.scale),
        number(right.affine_output.scale),
        number(multiplier as f32),
        if differing > 0 { format!(", by {largest_difference} at most") } else { String::new() },
        stages(&right.through_int8, samples, "int8 inputs, int8 scores"),
    )
}

fn stages(stages: &[Stage], samples: &[Sample], what: &str) -> Table {
    let mut header = vec![what];
    header.extend(samples.iter().map(|sample| sample.name.as_str()));
    header.push("dB");
    let mut table = table(&header);
    table.add_row(fp32_row(samples, 1));
    for stage in stages {
        let mut row = vec![stage.name.to_string()];
        row.extend(stage.samples.iter().map(ToString::to_string));
        row.push(decibel(stage.sqnr_db));
        table.add_row(row);
    }
    table
}

fn followed(walkthrough: &Walkthrough) -> String {
    let right = &walkthrough.right_way;
    let unit = f64::from(right.a_symmetric.scale).powi(2);
    let Quantized { scale, zero_point: zero, .. } = right.affine_output;
    let affine = &right.through_int8[1];
    let mut text = String::from("3. ONE SCORE THROUGH EVERY STAGE\n\n");
    for (sample, passed) in walkthrough.samples.iter().zip(&affine.samples) {
        let code = passed.code.unwrap_or_default();
        let acc = sample.accumulator;
        let _ = writeln!(
            text,
            "{}: fp32 {}
  int32 sum           {acc}
  fp32 from int32     {}^2 * {acc} = {}
  int8                round({acc} * {}) + ({zero}) = {}
  fp32 from int8      {} * ({} - ({zero})) = {}
",
            sample.name,
            number(sample.fp32),
            number(right.a_symmetric.scale),
            number((unit * f64::from(acc)) as f32),
            number(right.multiplier.real as f32),
            code,
            number(scale),
            code,
            number(passed.value),
        );
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn origin(right: &RightWay) -> String {
    let origin = &right.origin;
    format!(
        "4. WHERE THE ERROR COMES FROM

int8 inputs alone {} dB, int8 scores alone {} dB, both {} dB: {:.0} % of the error
energy is the int8 of the scores. Keep the scores in int32 until they become fp32 where you can.
",
        decibel(origin.inputs_db),
        decibel(origin.requantization_db),
        decibel(origin.both_db),
        origin.requantization_percent,
    )
}

fn answers(walkthrough: &Walkthrough) -> String {
    let right = &walkthrough.right_way;
    let Quantized { scale, zero_point: zero, .. } = right.affine_output;
    format!(
        "5. THE THREE ANSWERS

Offset?      0 is right for A: that is the symmetric choice, good for data around zero.
             min(AB) is not a zero point. For the output it is an integer code,
             clamp(round(-128 - min(0, min) / scale_out), -128, 127), of the real AB.
             Here {zero}.
Scale?       A: max|A| / 127. The int32 sums: sA * sB. The int8 output:
             (max(0, max) - min(0, min)) / 255 of the real AB.
             Here {}, {} and {}.
Dequantize?  From int32: sA * sB * sum, {} dB here.
             From int8: scale_out * (q - zero_point_out), {} dB here.
",
        number(right.a_symmetric.scale),
        number(right.a_symmetric.scale * right.a_symmetric.scale),
        number(scale),
        decibel(right.from_int32[0].sqnr_db),
        decibel(right.through_int8[1].sqnr_db),
    )
}

/// The values to compare with, after `first` columns of other things.
fn fp32_row(samples: &[Sample], first: usize) -> Vec<String> {
    let mut row = vec![String::new(); first];
    row[0] = "fp32".into();
    row.extend(samples.iter().map(|sample| number(sample.fp32)));
    row
}

/// Four significant digits or more; whole numbers without a fraction.
pub fn number(x: f32) -> String {
    match x.abs() {
        size if size < 1e7 && x.fract() == 0.0 => format!("{x:.0}"),
        size if size >= 1e7 => format!("{x:.3e}"),
        size if size >= 1000.0 => format!("{x:.0}"),
        size if size >= 100.0 => format!("{x:.2}"),
        size if size >= 1.0 => format!("{x:.3}"),
        size if size >= 1e-3 => format!("{x:.6}"),
        _ => format!("{x:.3e}"),
    }
}
