//! A quantized tensor: int8 codes with everything that is needed to give them a meaning.

use super::config::static_params;
use super::rows::{quantize_row, row_range};
use super::{Granularity, QuantConfig, QuantParams, Scheme, ValueRange};
use crate::{Error, Result, files};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

/// Int8 codes of a tensor `[.., S, D]`, one scale and zero point a group, and the sum of the codes
/// of each row (which the int8 product needs where there are zero points).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_int8_attention::quant::{QuantConfig, QuantizedTensor};
///
/// let x = Tensor::new(&[[1f32, -2.0, 0.5], [0.0, 0.1, 0.2]], &Device::Cpu)?;
/// let q = QuantizedTensor::quantize(&x, &QuantConfig::default())?; // symmetric, per token
/// assert_eq!(q.values(), [64, -127, 32, 0, 64, 127]);
/// let error = (q.dequantize(&Device::Cpu)? - x)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error <= q.params(0)?.scale() / 2.0 + 1e-6);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedTensor {
    values: Vec<i8>,
    shape: Vec<usize>,
    granularity: Granularity,
    params: Vec<QuantParams>,
    row_sums: Vec<i32>,
}

/// How codes are stored in a safetensors file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CodeStorage {
    /// `I8`, the codes as they are.
    #[default]
    I8,
    /// `U8` holding `code + 128`, for readers without int8 (Candle's loader is one); zero points
    /// are stored with 128 added too.
    U8,
}

/// Below this many elements, waking another thread costs more than it saves.
const ELEMENTS_A_TASK: usize = 1 << 16;

/// `(heads, tokens, depth)` of a shape `[.., S, D]`.
fn matrix_dims(shape: &[usize]) -> Result<(usize, usize, usize)> {
    let wrong = |expected| Error::shape("QuantizedTensor", "the tensor", shape, expected);
    match shape {
        [heads @ .., tokens, depth] if is_countable(shape) => {
            Ok((heads.iter().product(), *tokens, *depth))
        }
        [_, _, ..] => Err(wrong("a shape whose rows and elements can be counted")),
        _ => Err(wrong("at least 2 dimensions: [.., S, D]")),
    }
}

/// Whether a shape, of a damaged file for example, has no more elements, nor more rows of no
/// elements, than fit into memory.
fn is_countable(shape: &[usize]) -> bool {
    let product = |dims: &[usize]| dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let rows = product(&shape[..shape.len() - 1]);
    let elements = product(shape).filter(|&n| n <= isize::MAX as usize / size_of::<f64>());
    elements.is_some_and(|n| n > 0) || rows.is_some_and(|rows| rows <= 1 << 24)
}

impl QuantizedTensor {
    /// Quantizes a float tensor `[.., S, D]` (f32, f16, bf16 or f64; any strides, any device).
    ///
    /// An empty tensor gives an empty result; a constant or all-zero group and subnormal or huge
    /// ranges quantize as [`QuantParams`] says.
    ///
    /// # Errors
    /// [`Error::NonFinite`] at the first NaN or infinity; [`Error::DType`] for integers;
    /// [`Error::Shape`] below rank 2; [`Error::Mismatch`] if the number of static parameters is
    /// not the number of groups, [`Error::Contradiction`] if they are of another scheme,
    /// [`Error::InvalidArgument`] for a block of 0 tokens.
    pub fn quantize(tensor: &Tensor, config: &QuantConfig) -> Result<Self> {
        if !tensor.dtype().is_float() {
            return Err(Error::DType {
                op: "QuantizedTensor::quantize",
                tensor: "the tensor",
                dtype: tensor.dtype(),
                expected: "F32, F16, BF16 or F64",
            });
        }
        // Before anything is made of it.
        matrix_dims(tensor.dims())?;
        let flat = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Self::quantize_slice(&flat, tensor.dims(), config)
    }

    /// [`QuantizedTensor::quantize`] for row-major data.
    ///
    /// # Errors
    /// The same, and [`Error::Shape`] if `data` does not have as many elements as `shape`.
    pub fn quantize_slice(data: &[f32], shape: &[usize], config: &QuantConfig) -> Result<Self> {
        let (heads, tokens, depth) = matrix_dims(shape)?;
        if data.len() != heads * tokens * depth {
            let expected = format!("the {} elements of {shape:?}", heads * tokens * depth);
            let op = "QuantizedTensor::quantize_slice";
            return Err(Error::shape(op, "the data", &[data.len()], expected));
        }
        if let Some(index) = data.iter().position(|x| !x.is_finite()) {
            let op = "QuantizedTensor::quantize";
            return Err(Error::NonFinite { op, index, value: data[index] });
        }
        let granularity = config.granularity;
        let params = match config.groups(shape)? {
            (_, Some(given)) => given,
            (groups, None) => dynamic_params(data, (tokens, depth), config, groups)?,
        };
        let mut values = vec![0i8; data.len()];
        let mut row_sums = vec![0i32; heads * tokens];
        if depth > 0 {
            let rows = data.par_chunks_exact(depth).zip(values.par_chunks_exact_mut(depth));
            let rows = rows.zip(&mut row_sums).with_min_len(ELEMENTS_A_TASK / depth).enumerate();
            rows.for_each(|(row, ((data, values), sum))| {
                let group = granularity.group(row / tokens, row % tokens, tokens);
                *sum = quantize_row(data, params[group], values);
            });
        }
        Ok(Self { values, shape: shape.to_vec(), granularity, params, row_sums })
    }

    /// Assembles codes that were made elsewhere; `params` holds one entry a group, in row-major
    /// order of the groups.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Mismatch`] if the lengths do not fit, [`Error::Contradiction`]
    /// for parameters of two schemes, [`Error::QuantParams`] for a code outside of its scheme's range (-128 in a symmetric group).
    pub fn from_parts(
        values: Vec<i8>,
        shape: Vec<usize>,
        granularity: Granularity,
        params: Vec<QuantParams>,
    ) -> Result<Self> {
        let (heads, tokens, depth) = matrix_dims(&shape)?;
        if values.len() != heads * tokens * depth {
            let expected = format!("the {} elements of {shape:?}", heads * tokens * depth);
            let op = "QuantizedTensor::from_parts";
            return Err(Error::shape(op, "values", &[values.len()], expected));
        }
        let params =
            static_params(&params, granularity, &shape, granularity.groups(heads, tokens)?)?;
        let mut row_sums = Vec::with_capacity(heads * tokens);
        for row in 0..heads * tokens {
            let codes = &values[row * depth..(row + 1) * depth];
            let group = granularity.group(row / tokens, row % tokens, tokens);
            let qmin = params[group].scheme().qmin();
            if let Some(code) = codes.iter().find(|&&code| code < qmin) {
                return Err(Error::QuantParams(format!(
                    "code {code} in row {row}, expected {qmin}..=127 in a symmetric group"
                )));
            }
            row_sums.push(codes.iter().map(|&q| i32::from(q)).sum());
        }
        Ok(Self { values, shape, granularity, params, row_sums })
    }

    /// The codes, row-major.
    pub fn values(&self) -> &[i8] {
        &self.values
    }

    /// The tensor's shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What shares one scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Scale and zero point of every group, in row-major order of the groups.
    pub fn all_params(&self) -> &[QuantParams] {
        &self.params
    }

    /// Scale and zero point of a row; rows are counted over all heads.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such row.
    pub fn params(&self, row: usize) -> Result<QuantParams> {
        let rows = self.row_sums.len();
        if row >= rows {
            let problem = format!("row {row} of a tensor of {rows} rows");
            return Err(Error::InvalidArgument(problem));
        }
        Ok(self.row_params(row))
    }

    /// Those of a row that is there.
    fn row_params(&self, row: usize) -> QuantParams {
        let tokens = self.shape[self.shape.len() - 2];
        self.params[self.granularity.group(row / tokens, row % tokens, tokens)]
    }

    /// The sum of the codes of each row.
    pub fn row_sums(&self) -> &[i32] {
        &self.row_sums
    }

    /// `scale * (q - zero_point)`, an f32 tensor of the same shape.
    ///
    /// # Errors
    /// Candle's own, if the device cannot hold it.
    pub fn dequantize(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.dequantize_to_vec(), self.shape.as_slice(), device)?)
    }

    /// [`QuantizedTensor::dequantize`] into plain row-major data.
    pub fn dequantize_to_vec(&self) -> Vec<f32> {
        let depth = self.shape.last().copied().unwrap_or(0).max(1);
        let mut real = vec![0f32; self.values.len()];
        let rows = real.par_chunks_mut(depth).zip(self.values.par_chunks(depth));
        rows.with_min_len(ELEMENTS_A_TASK / depth).enumerate().for_each(|(row, (real, codes))| {
            let params = self.row_params(row);
            real.iter_mut().zip(codes).for_each(|(x, &q)| *x = params.dequantize(q));
        });
        real
    }

    /// The codes as a U8 tensor that holds `code + 128`, because Candle has no I8. Zero points
    /// move by 128 as well.
    ///
    /// # Errors
    /// Candle's own, if the device cannot hold it.
    pub fn to_u8_tensor(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.u8_codes(), self.shape.as_slice(), device)?)
    }

    pub(crate) fn u8_codes(&self) -> Vec<u8> {
        self.values.iter().map(|&q| shift_to_u8(q)).collect()
    }

    /// Writes a safetensors file: `values`, `scales` (F32) and `zero_points` (of the storage's own
    /// type), with scheme and granularity in the metadata.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written; what was there before is still there then.
    pub fn save(&self, path: impl AsRef<Path>, storage: CodeStorage) -> Result<()> {
        files::write(path.as_ref(), &self.to_safetensors(storage)?)
    }

    /// The content of [`QuantizedTensor::save`]'s file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if safetensors refuses, which it has no reason to.
    pub fn to_safetensors(&self, storage: CodeStorage) -> Result<Vec<u8>> {
        let encode = |q: i8| match storage {
            CodeStorage::I8 => q as u8,
            CodeStorage::U8 => shift_to_u8(q),
        };
        let dtype = match storage {
            CodeStorage::I8 => Dtype::I8,
            CodeStorage::U8 => Dtype::U8,
        };
        let values: Vec<u8> = self.values.iter().map(|&q| encode(q)).collect();
        let zero_points: Vec<u8> = self.params.iter().map(|p| encode(p.zero_point())).collect();
        let scales: Vec<u8> = self.params.iter().flat_map(|p| p.scale().to_le_bytes()).collect();
        let groups = vec![self.params.len()];
        let scheme = self.params.first().map_or(Scheme::Symmetric, QuantParams::scheme);
        let metadata = HashMap::from([
            ("scheme".to_string(), scheme.to_string()),
            ("granularity".to_string(), self.granularity.to_string()),
        ]);
        let refused =
            |e: safetensors::SafeTensorError| Error::Unsupported(format!("safetensors: {e}"));
        let views = [
            ("values", TensorView::new(dtype, self.shape.clone(), &values).map_err(refused)?),
            ("scales", TensorView::new(Dtype::F32, groups.clone(), &scales).map_err(refused)?),
            ("zero_points", TensorView::new(dtype, groups, &zero_points).map_err(refused)?),
        ];
        safetensors::serialize(views, Some(metadata)).map_err(refused)
    }

    /// Reads what [`QuantizedTensor::save`] wrote, in either storage.
    ///
    /// # Errors
    /// [`Error::MissingFile`] or [`Error::Io`] if it cannot be read, [`Error::Corrupt`] if it is
    /// not such a file.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = files::read("quantized tensor", path)?;
        Self::from_safetensors(&bytes).map_err(|problem| files::corrupt(path, problem))
    }

    fn from_safetensors(bytes: &[u8]) -> std::result::Result<Self, String> {
        let text = |e: safetensors::SafeTensorError| e.to_string();
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(text)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| metadata.get(name).ok_or(format!("no {name:?} in the metadata"));
        let scheme: Scheme = field("scheme")?.parse().map_err(|e: Error| e.to_string())?;
        let granularity = field("granularity")?.parse().map_err(|e: Error| e.to_string())?;

        let file = SafeTensors::deserialize(bytes).map_err(text)?;
        let tensor = |name: &str| file.tensor(name).map_err(|e| format!("{name}: {e}"));
        let values = tensor("values")?;
        let scales = tensor("scales")?;
        if scales.dtype() != Dtype::F32 {
            return Err(format!("scales are {:?}, expected F32", scales.dtype()));
        }
        let zero_points = codes("zero_points", &tensor("zero_points")?)?;
        let params = scales
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&scale| f32::from_le_bytes(scale))
            .zip(&zero_points)
            .map(|(scale, &zero)| match (scheme, zero) {
                (Scheme::Symmetric, 0) => QuantParams::symmetric(scale),
                (Scheme::Symmetric, _) => Err(Error::QuantParams(format!(
                    "zero point {zero} in a symmetric tensor, expected 0"
                ))),
                (Scheme::Affine, _) => QuantParams::affine(scale, i32::from(zero)),
            })
            .collect::<Result<Vec<_>>>()
            .map_err(|e| e.to_string())?;
        if params.len() != scales.data().len() / 4 || params.len() != zero_points.len() {
            return Err(format!(
                "{} scales and {} zero points, expected as many of both",
                scales.data().len() / 4,
                zero_points.len()
            ));
        }
        let shape = values.shape().to_vec();
        Self::from_parts(codes("values", &values)?, shape, granularity, params)
            .map_err(|e| e.to_string())
    }
}

/// `code + 128`: flipping the top bit of the two's complement byte.
fn shift_to_u8(code: i8) -> u8 {
    code as u8 ^ 0x80
}

/// Int8 codes of a stored tensor, whichever way they are stored.
fn codes(name: &str, view: &TensorView<'_>) -> std::result::Result<Vec<i8>, String> {
    match view.dtype() {
        Dtype::I8 => Ok(view.data().iter().map(|&b| b as i8).collect()),
        Dtype::U8 => Ok(view.data().iter().map(|&b| (b ^ 0x80) as i8).collect()),
        other => Err(format!("{name} is {other:?}, expected I8 or U8")),
    }
}

/// The parameters that follow from the range of each group.
fn dynamic_params(
    data: &[f32],
    (tokens, depth): (usize, usize),
    config: &QuantConfig,
    groups: usize,
) -> Result<Vec<QuantParams>> {
    let mut ranges = vec![ValueRange::EMPTY; groups];
    let rows: Vec<ValueRange> =
        (data.par_chunks(depth.max(1)).with_min_len(ELEMENTS_A_TASK / depth.max(1)))
            .map(|row| row_range(row).range)
            .collect();
    for (row, range) in rows.into_iter().enumerate() {
        let group = config.granularity.group(row / tokens, row % tokens, tokens);
        ranges[group] = ranges[group].union(range);
    }
    ranges.into_iter().map(|range| QuantParams::from_range(config.scheme, range)).collect()
}
