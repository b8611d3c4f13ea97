//! The fp32 scores, the int32 accumulators, and how far other numbers are from the former.

use anyhow::{Result, ensure};
use candle_core::{Device, Tensor};
use candle_int8_attention::product::{Lhs, ZeroPoints, matmul_nt};
use candle_int8_attention::quant::{
    Granularity, QuantConfig, QuantParams, QuantizedTensor, RangeSource, Scheme, ValueRange,
};
use candle_int8_attention::reference::int_product;

/// How many rows of accumulators are compared with the plain triple loop.
const CHECKED_ROWS: usize = 16;

/// What both ways start from.
pub struct Scores {
    /// A, fp32.
    pub a: Tensor,
    /// `[1, heads, tokens, depth]`.
    pub shape: [usize; 4],
    /// `A · A^T` in fp32, row-major: what every stage is compared with.
    pub fp32: Vec<f32>,
    /// A in int8: one scale for all, zero point 0.
    pub quantized: QuantizedTensor,
    /// The product of the codes.
    pub accumulators: Vec<i32>,
}

/// One score that is followed through every stage.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Sample {
    /// For people.
    pub name: String,
    /// Its place among all scores.
    pub index: usize,
    /// Its fp32 value.
    pub fp32: f32,
    /// Its accumulator.
    pub accumulator: i32,
}

/// What became of a sample: its code, where the way leads through int8, and the value at the end.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Passed {
    /// The int8 code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<i8>,
    /// What came back in fp32.
    pub value: f32,
}

impl std::fmt::Display for Passed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(code) = self.code {
            write!(f, "{code} -> ")?;
        }
        f.write_str(&crate::report::number(self.value))
    }
}

/// The samples among the values of a stage, with their codes if there are any.
pub fn passed(samples: &[Sample], codes: Option<&[i8]>, values: &[f32]) -> Vec<Passed> {
    let one = |index: usize| Passed { code: codes.map(|q| q[index]), value: values[index] };
    samples.iter().map(|sample| one(sample.index)).collect()
}

impl Scores {
    /// Multiplies in fp32 and, after quantizing, in int8.
    pub fn compute(values: &[f32], shape: [usize; 4]) -> Result<Self> {
        let a = Tensor::from_slice(values, &shape, &Device::Cpu)?;
        let fp32 = a.matmul(&a.t()?)?.flatten_all()?.to_vec1()?;
        let quantized = quantize(values, shape, Scheme::Symmetric)?;
        let accumulators = accumulate(&quantized, shape)?;
        let scores = Self { a, shape, fp32, quantized, accumulators };
        scores.check_exact()?;
        Ok(scores)
    }

    /// Scale and zero point of A.
    pub fn params(&self) -> QuantParams {
        self.quantized.all_params()[0]
    }

    /// What one accumulator step is worth: the scales of both sides multiplied.
    pub fn accumulator_scale(&self) -> f32 {
        self.params().scale() * self.params().scale()
    }

    /// The accumulators in real units.
    pub fn dequantized(&self) -> Vec<f32> {
        let scale = self.accumulator_scale();
        self.accumulators.iter().map(|&acc| scale * acc as f32).collect()
    }

    /// Error of other scores against fp32.
    pub fn sqnr(&self, other: &[f32]) -> f64 {
        sqnr(&self.fp32, other)
    }

    /// How many rows of accumulators [`Scores::compute`] has compared with the triple loop.
    pub fn checked_rows(&self) -> usize {
        CHECKED_ROWS.min(self.shape[2])
    }

    fn check_exact(&self) -> Result<()> {
        let [_, _, tokens, depth] = self.shape;
        let (rows, codes) = (self.checked_rows(), &self.quantized.values()[..tokens * depth]);
        let lhs: Vec<i16> = codes[..rows * depth].iter().map(|&q| i16::from(q)).collect();
        let expected = int_product(&lhs, codes, depth, (rows, tokens), |_| 0, |_| 0);
        let equal = expected.iter().zip(&self.accumulators).all(|(&e, &acc)| e == i64::from(acc));
        ensure!(equal, "the int32 product differs from the plain triple loop");
        Ok(())
    }

    /// A row with itself, and with another one: in the first head, "man" and "woman" where these
    /// words are there, else the first two rows.
    pub fn samples(&self, words: &[String]) -> Vec<Sample> {
        let tokens = self.shape[2];
        let find = |word: &str| words.iter().position(|w| w == word);
        let (row, column) = match (find("man"), find("woman")) {
            (Some(man), Some(woman)) => (man, woman),
            _ => (0, 1.min(tokens - 1)),
        };
        let mut places = vec![(row, row), (row, column)];
        places.dedup();
        let name = |(row, column): (usize, usize)| match (words.get(row), words.get(column)) {
            (Some(row), Some(column)) => format!("{row}·{column}"),
            _ => format!("[0, 0, {row}, {column}]"),
        };
        let sample = |place: (usize, usize)| {
            let index = place.0 * tokens + place.1;
            let (fp32, accumulator) = (self.fp32[index], self.accumulators[index]);
            Sample { name: name(place), index, fp32, accumulator }
        };
        places.into_iter().map(sample).collect()
    }
}

/// A in int8 with one scale for all.
pub fn quantize(values: &[f32], shape: [usize; 4], scheme: Scheme) -> Result<QuantizedTensor> {
    let config =
        QuantConfig { scheme, granularity: Granularity::PerTensor, range: RangeSource::Dynamic };
    Ok(QuantizedTensor::quantize_slice(values, &shape, &config)?)
}

/// `A · A^T` of the codes, zero points corrected, head by head: exact.
pub fn accumulate(a: &QuantizedTensor, [_, _, tokens, depth]: [usize; 4]) -> Result<Vec<i32>> {
    let zero = ZeroPoints::Uniform(i32::from(a.params(0)?.zero_point()));
    let mut accumulators = Vec::new();
    for head in a.values().chunks_exact(tokens * depth) {
        let product = matmul_nt(Lhs::I8(head), zero, head, zero, (tokens, tokens, depth))?;
        accumulators.extend(product);
    }
    Ok(accumulators)
}

/// The smallest and largest of some numbers.
pub fn range(values: impl IntoIterator<Item = f32>) -> ValueRange {
    values
        .into_iter()
        .fold(ValueRange::EMPTY, |range, x| range.union(ValueRange { min: x, max: x }))
}

/// Signal to quantization noise in dB: ten times the logarithm of signal energy over error energy.
pub fn sqnr(exact: &[f32], other: &[f32]) -> f64 {
    let energy = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let signal = energy(&mut exact.iter().map(|&x| f64::from(x)));
    let noise = energy(&mut exact.iter().zip(other).map(|(&x, &y)| f64::from(x) - f64::from(y)));
    if noise == 0.0 { f64::INFINITY } else { 10.0 * (signal / noise).log10() }
}
