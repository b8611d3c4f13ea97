//! The way it is often tried first: right up to the int32 sums, wrong after them.

use crate::scores::{Passed, Sample, Scores, passed, range};
use anyhow::Result;
use candle_int8_attention::quant::{QuantParams, Scheme, ValueRange};

/// The first try, and what becomes of it as one mistake after the other is put right.
#[derive(serde::Serialize)]
pub struct FirstTried {
    /// Smallest accumulator.
    pub accumulator_min: f32,
    /// Largest accumulator.
    pub accumulator_max: f32,
    /// `(max - min) / 255` of the accumulators.
    pub accumulator_step: f32,
    /// Smallest score in real units.
    pub real_min: f32,
    /// Largest score in real units.
    pub real_max: f32,
    /// In the order of the report.
    pub attempts: Vec<Attempt>,
}

/// One way from int32 to int8 and back.
#[derive(serde::Serialize)]
pub struct Attempt {
    /// What was done.
    pub name: &'static str,
    /// What stands where the zero point belongs.
    pub offset: f32,
    /// The step.
    pub scale: f32,
    /// Codes that had to be clamped to int8, in percent.
    pub clamped_percent: f64,
    /// Codes and returned values of the samples.
    pub samples: Vec<Passed>,
    /// Error in dB.
    pub sqnr_db: f64,
}

/// How an attempt makes codes, `round(sum / divisor) + zero`, and numbers from codes,
/// `scale * (q - subtracted)`. Right is `divisor = scale / (sA * sB)` and `subtracted = zero`.
struct Recipe {
    name: &'static str,
    divisor: f32,
    zero: f32,
    scale: f32,
    subtracted: f32,
    /// What the person who tries this calls the offset.
    offset: f32,
}

impl Recipe {
    /// The same zero point in both directions, and scale and sums in the same unit.
    fn plain(name: &'static str, zero: f32, scale: f32) -> Self {
        Self { name, divisor: scale, zero, scale, subtracted: zero, offset: zero }
    }
}

/// Runs the attempts on the accumulators.
pub fn run(scores: &Scores, samples: &[Sample]) -> Result<FirstTried> {
    let sums = range(scores.accumulators.iter().map(|&acc| acc as f32));
    let unit = scores.accumulator_scale();
    let real = ValueRange { min: sums.min * unit, max: sums.max * unit };
    let step = usable((sums.max - sums.min) / 255.0);
    let real_step = usable((real.max - real.min) / 255.0);
    let right = QuantParams::from_range(Scheme::Affine, real)?;
    let (right_scale, right_zero) = (right.scale(), f32::from(right.zero_point()));
    // min + scale * (q + 128) = scale * (q - fraction): a zero point that is no integer.
    let fraction = -128.0 - real.min / real_step;
    let recipes = [
        Recipe::plain("zero = min of the sums, scale from the sums", sums.min, step),
        Recipe::plain("zero = min(AB), scale from the sums", real.min.round_ties_even(), step),
        Recipe::plain("zero right, scale from the sums", right_zero, step),
        Recipe {
            divisor: right_scale / unit,
            subtracted: 0.0,
            ..Recipe::plain(
                "zero and scale right, but back with scale * q",
                right_zero,
                right_scale,
            )
        },
        Recipe {
            divisor: real_step / unit,
            offset: real.min,
            ..Recipe::plain("back with min(AB) + scale * (q + 128)", fraction, real_step)
        },
    ];
    let attempts = recipes.iter().map(|recipe| attempt(scores, samples, recipe)).collect();
    Ok(FirstTried {
        accumulator_min: sums.min,
        accumulator_max: sums.max,
        accumulator_step: step,
        real_min: real.min,
        real_max: real.max,
        attempts,
    })
}

/// A step that can be divided by, also where all scores are equal.
fn usable(step: f32) -> f32 {
    if step > 0.0 { step } else { 1.0 }
}

fn attempt(scores: &Scores, samples: &[Sample], recipe: &Recipe) -> Attempt {
    let mut clamped = 0usize;
    let mut encode = |&acc: &i32| {
        let code = (acc as f32 / recipe.divisor + recipe.zero).round_ties_even();
        clamped += usize::from(!(-128.0..=127.0).contains(&code));
        code as i8 // saturates
    };
    let codes: Vec<i8> = scores.accumulators.iter().map(&mut encode).collect();
    let back: Vec<f32> =
        codes.iter().map(|&q| recipe.scale * (f32::from(q) - recipe.subtracted)).collect();
    Attempt {
        name: recipe.name,
        offset: recipe.offset,
        scale: recipe.scale,
        clamped_percent: 100.0 * clamped as f64 / codes.len() as f64,
        samples: passed(samples, Some(&codes), &back),
        sqnr_db: scores.sqnr(&back),
    }
}
