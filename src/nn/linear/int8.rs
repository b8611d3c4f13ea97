//! Weights in int8, and rows of the input that are quantized when they come.
//!
//! ```text
//! y = x·w + b = (x R)·(w R) + b  ~  scale_x * scale_w * sum codes_x codes_w + b
//! ```
//!
//! `R` is the [`Rotation`] of `K` inputs, which takes away the outliers of a row. Codes are symmetric, with a
//! scale for each row of `x` and for each output, the sums are exact, and the two products and the sum of
//! the epilogue are rounded in this order on every level, so that all give the same bits. Rotating both sides
//! before quantizing is QuaRot's (Ashkboos et al. 2024, arXiv:2404.00456), scales a token and a channel
//! LLM.int8's (Dettmers et al. 2022, arXiv:2208.07339).

use super::rounding::Rounding;
use crate::Result;
use crate::cpu::Level;
use crate::cpu::contracts::{BlockCodes, Condition, RowRanges, Rows};
use crate::memory::footprint;
use crate::product::{
    PackedLhs, PackedRhs, RowSums, ScoreScales, check_depth, score_tiles, unpack,
};
use crate::quant::Rotation;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Outputs that are computed at a time, at least: what follows the product works on whole vectors.
pub(super) const PANEL: usize = 64;

pub(super) struct Int8Weights {
    rotation: Rotation,
    codes: PackedRhs,
    /// One an output, padded to whole panels.
    scales: Vec<f32>,
}

impl Int8Weights {
    /// Rotates, quantizes and packs `weights`, row-major `[outputs, depth]`: to the nearest codes, or to those
    /// that suit `inputs`, row-major `[_, depth]`.
    ///
    /// # Errors
    /// [`Error::Depth`] where sums could leave the range of int32.
    pub(super) fn new(
        level: Level,
        weights: &[f32],
        (outputs, depth): (usize, usize),
        inputs: Option<&[f32]>,
    ) -> Result<Self> {
        check_depth(depth, false)?;
        let mut buffers = Buffers::default();
        buffers.quantize(level, Rotation::new(depth), weights, outputs);
        let Buffers { mut codes, scales, mut sums, .. } = buffers;
        if let (Some(inputs), 1..) = (inputs, depth) {
            let mut weights = weights.to_vec();
            Rotation::new(depth).apply_on(level, &mut weights);
            Rounding::new(level, depth, inputs).round(&weights, &scales, &mut codes);
            sums = codes.chunks_exact(depth).map(sum).collect();
        }
        Self::from_codes(level, &codes, (sums, scales), (outputs, depth))
    }

    /// From the codes of rotated weights, their sums and their scales.
    ///
    /// # Errors
    /// [`Error::Depth`] where sums could leave the range of int32.
    pub(super) fn from_codes(
        level: Level,
        codes: &[i8],
        (sums, scales): (Vec<i32>, Vec<f32>),
        (outputs, depth): (usize, usize),
    ) -> Result<Self> {
        check_depth(depth, false)?;
        let mut packed = PackedRhs::new(level, outputs, depth, false);
        packed.put(0, codes, RowSums { sums: &sums, zeros: &[] });
        Ok(Self::of_packed(packed, scales, depth))
    }

    /// From codes in the order of `layout`, which are taken as they are where that is the order of this
    /// level, and put in order where it is that of another.
    ///
    /// # Errors
    /// [`Error::Depth`] where sums could leave the range of int32.
    pub(super) fn from_packed(
        level: Level,
        (layout, codes): ([usize; 4], &[u8]),
        scales: Vec<f32>,
        depth: usize,
    ) -> Result<Self> {
        check_depth(depth, false)?;
        let outputs = scales.len();
        let mut packed = PackedRhs::new(level, outputs, depth, false);
        if packed.layout() == layout {
            packed.put_packed(codes);
        } else {
            let codes = unpack(layout, codes, (outputs, depth));
            let mut sums: Vec<i32> = codes.chunks_exact(depth.max(1)).map(sum).collect();
            sums.resize(outputs, 0);
            packed.put(0, &codes, RowSums { sums: &sums, zeros: &[] });
        }
        Ok(Self::of_packed(packed, scales, depth))
    }

    fn of_packed(codes: PackedRhs, mut scales: Vec<f32>, depth: usize) -> Self {
        scales.resize(codes.rows().next_multiple_of(panel_width(codes.level())), 0.0);
        Self { rotation: Rotation::new(depth), codes, scales }
    }

    /// The codes in the order of their layout.
    pub(super) fn packed(&self) -> ([usize; 4], &[u8]) {
        (self.codes.layout(), self.codes.packed())
    }

    pub(super) fn outputs(&self) -> usize {
        self.codes.rows()
    }

    pub(super) fn depth(&self) -> usize {
        self.rotation.depth()
    }

    /// Whole panels of the kernel.
    pub(super) fn panel_width(&self) -> usize {
        panel_width(self.codes.level())
    }

    /// Scales, one an output.
    pub(super) fn scales(&self) -> &[f32] {
        &self.scales[..self.outputs()]
    }

    /// Row-major `[outputs, depth]`, rotated back.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        let (layout, packed) = self.packed();
        let codes = unpack(layout, packed, (self.outputs(), self.depth()));
        let rows = codes.chunks_exact(self.depth().max(1)).zip(&self.scales);
        let mut weights: Vec<f32> =
            rows.flat_map(|(row, scale)| row.iter().map(move |&q| f32::from(q) * scale)).collect();
        self.rotation.apply_on(self.codes.level(), &mut weights);
        weights
    }

    /// Quantizes `count` rows of the input.
    pub(super) fn quantize(
        &self,
        x: &[f32],
        count: usize,
        rows: &mut Int8Rows,
        buffers: &mut Buffers,
    ) {
        let level = self.codes.level();
        buffers.quantize(level, self.rotation, x, count);
        let lhs = rows.lhs.take().filter(|lhs| lhs.level() == level);
        let lhs = rows.lhs.insert(lhs.unwrap_or_else(|| PackedLhs::new(level)));
        lhs.put(&buffers.codes, count, self.depth(), None);
        rows.scales.clone_from(&buffers.scales);
        rows.zeros.resize(count, 0.0);
    }

    /// `bias + x·W^T` for some outputs, whose first begins a panel, of rows of `x`; what follows the last in
    /// its panel is overwritten.
    pub(super) fn multiply(
        &self,
        outputs: Range<usize>,
        rows: &Int8Rows,
        bias: &[f32],
        (out, stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        let scales = ScoreScales {
            row_scales: &rows.scales,
            row_biases: &rows.zeros,
            // One for all columns.
            bias_columns: self.outputs().max(1).next_multiple_of(self.panel_width()),
            column_scales: &self.scales,
            column_biases: bias,
        };
        let lhs = rows.lhs.as_ref().expect("rows that were quantized");
        score_tiles(lhs, &self.codes, outputs, &scales, out, stride);
    }
}

/// Of the codes of a row.
fn sum(row: &[i8]) -> i32 {
    row.iter().map(|&q| i32::from(q)).sum()
}

fn panel_width(level: Level) -> usize {
    PANEL.next_multiple_of(level.int8_product().geometry.nr)
}

/// Some rows of the input in int8. The memory is kept from one [`Int8Weights::quantize`] to the next.
#[derive(Default)]
pub(super) struct Int8Rows {
    lhs: Option<PackedLhs>,
    scales: Vec<f32>,
    /// Added to each row: nothing.
    zeros: Vec<f32>,
}

/// What rows become on their way to packed codes.
#[derive(Default)]
pub(super) struct Buffers {
    rotated: Vec<f32>,
    ranges: RowRanges,
    codes: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<i32>,
    sums: Vec<i32>,
}

footprint!(Int8Rows: lhs, scales, zeros);
footprint!(Buffers: rotated, ranges, codes, scales, zeros, sums);

impl Buffers {
    /// Symmetric codes of `count` rotated rows, with their scales and sums.
    fn quantize(&mut self, level: Level, rotation: Rotation, rows: &[f32], count: usize) {
        let depth = rotation.depth();
        self.codes.resize(count * depth, 0);
        // Of rows without elements nothing is written.
        self.scales.clear();
        self.scales.resize(count, 1.0);
        self.zeros.resize(count, 0);
        self.sums.clear();
        self.sums.resize(count, 0);
        if depth == 0 {
            return;
        }
        self.rotated.resize(IN_L1.max(depth).min(count * depth), 0.0);
        // As many rows at a time as stay in L1 from their rotation to their codes.
        let part = (IN_L1 / depth).max(1);
        for start in (0..count).step_by(part) {
            let end = (start + part).min(count);
            let values = &mut self.rotated[..(end - start) * depth];
            let ranges = &mut self.ranges;
            let rows = Rows::contiguous(&rows[start * depth..end * depth], depth);
            level.condition(Condition { rows, mean: None, rotate: true, values, ranges });
            let out = BlockCodes {
                codes: &mut self.codes[start * depth..end * depth],
                scales: &mut self.scales[start..end],
                zeros: &mut self.zeros[start..end],
                sums: &mut self.sums[start..end],
            };
            level.quantize(false, Rows::contiguous(values, depth), Some(&self.ranges), out);
        }
    }
}

/// Elements that L1 holds beside what is made of them.
const IN_L1: usize = 6144;

#[cfg(test)]
mod tests {
    use super::super::layer::Linear;
    use super::super::weights::{Precision, Weights};
    use super::*;
    use crate::Error;
    use crate::cpu::runnable;
    use crate::nn::Activation;
    use crate::nn::LayerNorm;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Device, Tensor};
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    const CPU: Device = Device::Cpu;

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn layer(level: Level, weight: &Tensor, bias: &Tensor) -> Linear {
        let shape = weight.dims2().unwrap();
        let weights = Int8Weights::new(level, &numbers(weight), shape, None).unwrap();
        Linear::packed(Weights::Int8(weights), &numbers(bias))
    }

    /// Codes and scale of a rotated row, by the definition.
    fn quantized(row: &[f32]) -> (Vec<i64>, f32) {
        let mut row = row.to_vec();
        Rotation::new(row.len()).apply_whole(&mut row);
        let max = row.iter().fold(0f32, |max, x| max.max(x.abs()));
        let scale = if max == 0.0 { 1.0 } else { max / 127.0 };
        (row.iter().map(|x| (x / scale).round_ties_even() as i64).collect(), scale)
    }

    /// `x·W^T + b`, row-major, by the definition.
    fn expected(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Vec<f32> {
        let rows = |x: &Tensor| -> Vec<_> {
            let (count, depth) = x.dims2().unwrap();
            let numbers = numbers(x);
            (0..count).map(|i| quantized(&numbers[i * depth..(i + 1) * depth])).collect()
        };
        let (weights, bias) = (rows(weight), numbers(bias));
        let row = |(x, x_scale): (Vec<i64>, f32)| -> Vec<f32> {
            let output = |((w, w_scale), b): (&(Vec<i64>, f32), &f32)| {
                let sum: i64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                sum as f32 * x_scale * w_scale + b
            };
            weights.iter().zip(&bias).map(output).collect()
        };
        rows(x).into_iter().flat_map(row).collect()
    }

    /// Every level against the definition, to the bit, and what follows against the layer itself.
    fn check(m: usize, depth: usize, outputs: usize) {
        let (x, weight, bias) = (randn(&[m, depth]), randn(&[outputs, depth]), randn(&[outputs]));
        let residual = randn(&[m, outputs]);
        let norm = LayerNorm::new(randn(&[outputs]), randn(&[outputs]), 1.0).unwrap();
        let expected = expected(&x, &weight, &bias);
        for level in runnable() {
            let what = format!("{level:?} [{m}, {depth}] x [{depth}, {outputs}]");
            let layer = layer(level, &weight, &bias);
            let found = layer.forward(&x).unwrap();
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&numbers(&found)), bits(&expected), "{what}");
            if expected.is_empty() {
                continue;
            }
            for activation in [Activation::Gelu, Activation::Relu] {
                let activated = layer.forward_activated(&x, activation).unwrap();
                let expected = activation.of_tensor(&found).unwrap();
                assert!(largest_difference(&activated, &expected) < 1e-4, "{what} {activation:?}");
            }
            let normal = layer.forward_add_norm(&x, &residual, &norm).unwrap();
            let expected = norm.of_tensor(&(found + &residual).unwrap()).unwrap();
            assert!(largest_difference(&normal, &expected) < 1e-4, "{what} norm");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_level_is_the_definition(
            m in 0usize..60, depth in 0usize..150, outputs in 0usize..150,
        ) {
            check(m, depth, outputs);
        }
    }

    #[test]
    fn every_level_is_the_definition_on_both_sides_of_every_edge() {
        for m in [1, 5, 6, 7, 48, 49] {
            for outputs in [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129] {
                for depth in [0, 1, 2, 3, 4, 5, 8, 33] {
                    check(m, depth, outputs);
                }
            }
        }
    }

    /// The sums of ONNX Runtime's MatMulInteger: its codes, with scales of 1.
    #[test]
    fn sums_are_those_of_onnx_runtime() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/quantization.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for case in ["small", "odd_k", "affine", "extreme"] {
            let of = |part: &str| file.tensor(&format!("matmul_integer.{case}.{part}")).unwrap();
            let (a, b, y) = (of("a"), of("b"), of("y"));
            let [m, depth, outputs] = [a.shape()[0], a.shape()[1], b.shape()[0]];
            // Unsigned codes are signed ones shifted by 128, zero points included.
            let a: Vec<i8> = a.data().iter().map(|&a| (a ^ 0x80) as i8).collect();
            let b: Vec<i8> = b.data().iter().map(|&b| b as i8).collect();
            let za = i32::from(of("a_zero_point").data()[0]) - 128;
            let zb = i32::from(of("b_zero_point").data()[0] as i8);
            let sums: Vec<i32> = b.chunks(depth).map(sum).collect();
            // sum ab = sum (a - za)(b - zb) + za sum b + zb sum a - K za zb
            let y = y.data().as_chunks().0.iter().enumerate().map(|(at, &y)| {
                let row = sum(&a[at / outputs * depth..][..depth]);
                let zeros = za * sums[at % outputs] + zb * row - depth as i32 * za * zb;
                (i32::from_le_bytes(y) + zeros) as f32
            });
            let y: Vec<f32> = y.collect();
            for level in runnable() {
                let scales = (sums.clone(), vec![1.0; outputs]);
                let weights = Int8Weights::from_codes(level, &b, scales, (outputs, depth)).unwrap();
                let mut lhs = PackedLhs::new(level);
                lhs.put(&a, m, depth, None);
                let (scales, zeros) = (vec![1.0; m], vec![0.0; m]);
                let rows = Int8Rows { lhs: Some(lhs), scales, zeros };
                let stride = outputs.next_multiple_of(weights.panel_width());
                let mut out = vec![MaybeUninit::new(f32::NAN); m * stride];
                weights.multiply(0..outputs, &rows, &vec![0.0; stride], (&mut out, stride));
                for (out, y) in out.chunks(stride).zip(y.chunks(outputs)) {
                    // SAFETY: initialized above.
                    let out: Vec<f32> = out.iter().map(|x| unsafe { x.assume_init() }).collect();
                    assert_eq!(&out[..outputs], y, "{case} {level:?}");
                }
            }
        }
    }

    /// An outlier channel and an outlier token, which would spoil codes that are not rotated.
    #[test]
    fn outliers_cost_little() {
        let x: Vec<f32> = numbers(&randn(&[40, 384]));
        let x = x.iter().enumerate().map(|(i, x)| match (i / 384, i % 384) {
            (_, 77) => x + 30.0,
            (3, _) => x * 50.0,
            _ => *x,
        });
        let x = Tensor::from_iter(x, &CPU).unwrap().reshape((40, 384)).unwrap();
        let (weight, bias) = (randn(&[100, 384]), Tensor::zeros(100, DType::F32, &CPU).unwrap());
        let exact = layer_in(Precision::F32, &weight, &bias).forward(&x).unwrap();
        let found = layer_in(Precision::Int8, &weight, &bias).forward(&x).unwrap();
        for (exact, found) in numbers(&exact).chunks(100).zip(numbers(&found).chunks(100)) {
            let energy: f32 = exact.iter().map(|x| x * x).sum();
            let error: f32 = exact.iter().zip(found).map(|(x, y)| (x - y) * (x - y)).sum();
            // 7 bits of a maximum of some 4 deviations on both sides: about 40 dB.
            assert!(error < 3e-4 * energy, "{} dB", 10.0 * (energy / error).log10());
        }
    }

    fn layer_in(precision: Precision, weight: &Tensor, bias: &Tensor) -> Linear {
        Linear::new(weight, Some(bias), precision).unwrap()
    }

    /// f32 from int8 has the weights as they were rounded, and int8 from that the same codes.
    #[test]
    fn rounded_weights_come_back() {
        let (weight, bias) = (randn(&[70, 200]), randn(&[70]));
        let int8 = layer_in(Precision::Int8, &weight, &bias);
        let back = int8.to_precision(Precision::F32).unwrap();
        assert_eq!((back.precision(), int8.shape()), (Precision::F32, (70, 200)));
        let x = randn(&[9, 200]);
        let exact = layer_in(Precision::F32, &weight, &bias).forward(&x).unwrap();
        let off = largest_difference(&back.forward(&x).unwrap(), &exact);
        assert!(off > 0.0 && off < 1.0, "{off}");
        let again = back.to_precision(Precision::Int8).unwrap();
        let off = largest_difference(&again.forward(&x).unwrap(), &int8.forward(&x).unwrap());
        assert!(off < 0.05, "{off}");
    }

    #[test]
    fn a_depth_whose_sums_could_overflow_is_refused() {
        let weight = Tensor::zeros((1, 65_794), DType::F32, &CPU).unwrap();
        let error = Linear::new(&weight, None, Precision::Int8).err().unwrap();
        assert!(matches!(error, Error::Depth { depth: 65_794, limit: 65_793 }), "{error}");
    }

    #[test]
    fn weights_that_are_not_finite_spoil_their_own_output() {
        let mut weight = numbers(&randn(&[3, 10]));
        weight[14] = f32::NAN;
        let weight = Tensor::from_vec(weight, (3, 10), &CPU).unwrap();
        let out = layer_in(Precision::Int8, &weight, &randn(&[3])).forward(&randn(&[2, 10]));
        for row in out.unwrap().to_vec2::<f32>().unwrap() {
            assert_eq!(row.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, false]);
        }
    }
}
