//! The right way, with this crate's own parts, and the error after every stage.

use crate::scores::{Passed, Sample, Scores, accumulate, passed, quantize, range, sqnr};
use anyhow::Result;
use candle_int8_attention::attention::attention_scores_requantized;
use candle_int8_attention::quant::{
    Granularity, QuantParams, QuantizedTensor, Requantizer, Scheme,
};
use candle_int8_attention::{RequantConfig, ScoreConfig, attention_scores};

/// The stages, in the order in which the data passes them.
#[derive(serde::Serialize)]
pub struct RightWay {
    /// Largest magnitude in A.
    pub a_max_abs: f32,
    /// A with zero point 0.
    pub a_symmetric: Quantized,
    /// A with any zero point.
    pub a_affine: Quantized,
    /// How many rows of int32 sums were compared with the plain triple loop, and found equal.
    pub exact_rows: usize,
    /// Scores that stay in int32 until they become fp32.
    pub from_int32: Vec<Stage>,
    /// Scores that pass through int8.
    pub through_int8: Vec<Stage>,
    /// The symmetric int8 scores.
    pub symmetric_output: Quantized,
    /// The affine int8 scores.
    pub affine_output: Quantized,
    /// What the affine requantization multiplies by.
    pub multiplier: Multiplier,
    /// How far the two requantization modes agree.
    pub modes: Modes,
    /// Where the error of the affine int8 scores comes from.
    pub origin: Origin,
}

/// How some numbers were quantized, with one scale for all.
#[derive(Clone, Copy, serde::Serialize)]
pub struct Quantized {
    /// Real size of a step.
    pub scale: f32,
    /// The code of real 0.
    pub zero_point: i8,
    /// Error in dB of the numbers that come back.
    pub sqnr_db: f64,
}

impl Quantized {
    fn new(params: QuantParams, sqnr_db: f64) -> Self {
        Self { scale: params.scale(), zero_point: params.zero_point(), sqnr_db }
    }
}

/// A requantization multiplier: as it is, and as `mantissa * 2^(-31 - right_shift)`.
#[derive(serde::Serialize)]
pub struct Multiplier {
    /// `sA * sB / scale_out`.
    pub real: f64,
    /// 31 bits.
    pub mantissa: i32,
    /// How far to shift.
    pub right_shift: i32,
}

/// The affine codes in fp32 mode against those in fixed-point mode.
#[derive(Default, serde::Serialize)]
pub struct Modes {
    /// All codes.
    pub codes: usize,
    /// Those that differ.
    pub differing: usize,
    /// By how much at most.
    pub largest_difference: i32,
}

impl Modes {
    fn compare(fp32: &[i8], fixed_point: &[i8]) -> Self {
        let mut modes = Self { codes: fp32.len(), ..Self::default() };
        for (&a, &b) in fp32.iter().zip(fixed_point) {
            let difference = (i32::from(a) - i32::from(b)).abs();
            modes.differing += usize::from(difference > 0);
            modes.largest_difference = modes.largest_difference.max(difference);
        }
        modes
    }
}

/// The scores as one way of computing gives them.
#[derive(serde::Serialize)]
pub struct Stage {
    /// What was done.
    pub name: &'static str,
    /// Codes, where there are any, and values of the samples.
    pub samples: Vec<Passed>,
    /// Error in dB.
    pub sqnr_db: f64,
}

/// The error of each step alone, and of both.
#[derive(serde::Serialize)]
pub struct Origin {
    /// Int8 inputs, scores dequantized from int32.
    pub inputs_db: f64,
    /// Exact inputs, scores through int8.
    pub requantization_db: f64,
    /// Both.
    pub both_db: f64,
    /// What requantization has in the error energy of both, in percent.
    pub requantization_percent: f64,
}

/// Runs every stage.
pub fn run(scores: &Scores, samples: &[Sample]) -> Result<RightWay> {
    let a: Vec<f32> = scores.a.flatten_all()?.to_vec1()?;
    let affine_a = quantize(&a, scores.shape, Scheme::Affine)?;
    let outputs = Outputs::new(scores)?;
    let fixed_point = outputs.requantizer(scores, outputs.affine, Mode::FixedPoint)?;
    let (through_int8, modes) = through_int8(scores, samples, &outputs)?;
    let fixed_point = fixed_point.multiplier().map(|m| (m.mantissa(), m.right_shift()));
    let (mantissa, right_shift) = fixed_point.unwrap_or_default();
    let unit = f64::from(scores.params().scale()).powi(2);
    let of_a = |quantized: &QuantizedTensor| {
        Quantized::new(quantized.all_params()[0], sqnr(&a, &quantized.dequantize_to_vec()))
    };
    Ok(RightWay {
        a_max_abs: range(a.iter().copied()).max_abs(),
        a_symmetric: of_a(&scores.quantized),
        a_affine: of_a(&affine_a),
        exact_rows: scores.checked_rows(),
        from_int32: from_int32(scores, samples, &affine_a)?,
        symmetric_output: Quantized::new(outputs.symmetric, through_int8[0].sqnr_db),
        affine_output: Quantized::new(outputs.affine, through_int8[1].sqnr_db),
        through_int8,
        multiplier: Multiplier {
            real: unit / f64::from(outputs.affine.scale()),
            mantissa,
            right_shift,
        },
        modes,
        origin: origin(scores, outputs.affine)?,
    })
}

fn from_int32(
    scores: &Scores,
    samples: &[Sample],
    affine_a: &QuantizedTensor,
) -> Result<Vec<Stage>> {
    let stage = |name, values: &[f32]| Stage {
        name,
        samples: passed(samples, None, values),
        sqnr_db: scores.sqnr(values),
    };
    let op = |config: &ScoreConfig| -> Result<Vec<f32>> {
        Ok(attention_scores(&scores.a, &scores.a, config)?.flatten_all()?.to_vec1()?)
    };
    let unit = affine_a.all_params()[0].scale() * affine_a.all_params()[0].scale();
    let affine: Vec<f32> =
        accumulate(affine_a, scores.shape)?.iter().map(|&acc| unit * acc as f32).collect();
    let per_token = op(&ScoreConfig::plain(Scheme::Symmetric, Granularity::PerToken))?;
    Ok(vec![
        stage("A symmetric, one scale", &scores.dequantized()),
        stage("A affine, one scale, zero point corrected", &affine),
        stage("A symmetric, one scale a row", &per_token),
        stage("the same, means subtracted (the default)", &op(&ScoreConfig::default())?),
    ])
}

/// The parameters of int8 scores for the whole tensor.
struct Outputs {
    symmetric: QuantParams,
    affine: QuantParams,
}

#[derive(Clone, Copy)]
enum Mode {
    Fp32,
    FixedPoint,
}

impl Outputs {
    /// From the range of the real scores, not of the accumulators.
    fn new(scores: &Scores) -> Result<Self> {
        let real = range(scores.dequantized());
        Ok(Self {
            symmetric: QuantParams::from_range(Scheme::Symmetric, real)?,
            affine: QuantParams::from_range(Scheme::Affine, real)?,
        })
    }

    fn requantizer(&self, scores: &Scores, to: QuantParams, mode: Mode) -> Result<Requantizer> {
        let scale = scores.params().scale();
        Ok(match mode {
            Mode::Fp32 => Requantizer::fp32(scale, scale, to)?,
            Mode::FixedPoint => Requantizer::fixed_point(scale, scale, to)?,
        })
    }

    /// Codes of all accumulators with one scale.
    fn codes(&self, scores: &Scores, to: QuantParams, mode: Mode) -> Result<Vec<i8>> {
        Ok(self.requantizer(scores, to, mode)?.requantize_all(&scores.accumulators))
    }
}

/// The int8 stages, and how far the two modes agree.
fn through_int8(
    scores: &Scores,
    samples: &[Sample],
    outputs: &Outputs,
) -> Result<(Vec<Stage>, Modes)> {
    let stage = |name, codes: &[i8], values: &[f32]| Stage {
        name,
        samples: passed(samples, Some(codes), values),
        sqnr_db: scores.sqnr(values),
    };
    let back = |codes: &[i8], params: QuantParams| -> Vec<f32> {
        codes.iter().map(|&q| params.dequantize(q)).collect()
    };
    let symmetric = outputs.codes(scores, outputs.symmetric, Mode::Fp32)?;
    let affine = outputs.codes(scores, outputs.affine, Mode::Fp32)?;
    let fixed = outputs.codes(scores, outputs.affine, Mode::FixedPoint)?;
    let (row_symmetric, row_symmetric_back) = per_row(scores, Scheme::Symmetric)?;
    let (row_affine, row_affine_back) = per_row(scores, Scheme::Affine)?;
    let stages = vec![
        stage("one scale, symmetric, fp32 mode", &symmetric, &back(&symmetric, outputs.symmetric)),
        stage("one scale, affine, fp32 mode", &affine, &back(&affine, outputs.affine)),
        stage("one scale, affine, fixed-point mode", &fixed, &back(&fixed, outputs.affine)),
        stage("one scale a row, symmetric", &row_symmetric, &row_symmetric_back),
        stage("one scale a row, affine", &row_affine, &row_affine_back),
        default_requantized(scores, samples)?,
    ];
    Ok((stages, Modes::compare(&affine, &fixed)))
}

/// Codes and values with a scale for each row of scores.
fn per_row(scores: &Scores, scheme: Scheme) -> Result<(Vec<i8>, Vec<f32>)> {
    let (scale, unit) = (scores.params().scale(), scores.accumulator_scale());
    let (mut codes, mut values) = (Vec::new(), Vec::new());
    for row in scores.accumulators.chunks_exact(scores.shape[2]) {
        let real = range(row.iter().map(|&acc| unit * acc as f32));
        let params = QuantParams::from_range(scheme, real)?;
        let row = Requantizer::fp32(scale, scale, params)?.requantize_all(row);
        values.extend(row.iter().map(|&q| params.dequantize(q)));
        codes.extend(row);
    }
    Ok((codes, values))
}

/// The default configuration with scores through int8, by the op itself.
fn default_requantized(scores: &Scores, samples: &[Sample]) -> Result<Stage> {
    let (config, to) = (ScoreConfig::default(), RequantConfig::default());
    let values = attention_scores_requantized(&scores.a, &scores.a, &config, &to)?;
    let values: Vec<f32> = values.flatten_all()?.to_vec1()?;
    Ok(Stage {
        name: "the default, one scale a row, affine",
        samples: passed(samples, None, &values),
        sqnr_db: scores.sqnr(&values),
    })
}

fn origin(scores: &Scores, output: QuantParams) -> Result<Origin> {
    let scale = scores.params().scale();
    let both = Requantizer::fp32(scale, scale, output)?.requantize_all(&scores.accumulators);
    let both: Vec<f32> = both.iter().map(|&q| output.dequantize(q)).collect();
    let alone = quantize(&scores.fp32, score_shape(scores.shape), Scheme::Affine)?;
    let inputs_db = scores.sqnr(&scores.dequantized());
    let requantization_db = scores.sqnr(&alone.dequantize_to_vec());
    let energy = |db: f64| 10f64.powf(-db / 10.0);
    let total = energy(inputs_db) + energy(requantization_db);
    Ok(Origin {
        inputs_db,
        requantization_db,
        both_db: scores.sqnr(&both),
        requantization_percent: 100.0 * energy(requantization_db) / total.max(f64::MIN_POSITIVE),
    })
}

fn score_shape([batch, heads, tokens, _]: [usize; 4]) -> [usize; 4] {
    [batch, heads, tokens, tokens]
}
