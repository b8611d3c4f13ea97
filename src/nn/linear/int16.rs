//! Weights in 16 bits, and rows of the input that are rounded to 16 bits when they come.
//!
//! ```text
//! y = x·w + b  ~  b + sum over runs of 64 inputs: scale_x * scale_w * sum codes_x codes_w
//! ```
//!
//! Rows have 12 bits and a sign with a scale for each row and run, weights 13 and a sign with one for each
//! output and run: as many as leave the sums of a run exact in int32. Runs are added up in their order, each
//! product and each sum rounded, so that all levels give the same bits. An outlier coarsens its own run alone,
//! which is why nothing is rotated.

use crate::cpu::Level;
use crate::cpu::contracts::{Format, Rows};
use crate::product::{Int16Rows, PackedMatrix};
use std::mem::MaybeUninit;
use std::ops::Range;

pub(super) struct Int16Weights {
    /// `[K, outputs]`.
    matrix: PackedMatrix,
    /// Row-major `[outputs, K]`, for another precision, a file, and Candle's operations.
    weights: Vec<f32>,
    /// Outputs with a weight that is not finite.
    not_finite: Vec<usize>,
}

impl Int16Weights {
    /// Packs `weights`, row-major `[outputs, depth]`.
    pub(super) fn new(level: Level, weights: &[f32], (outputs, depth): (usize, usize)) -> Self {
        let row = |output: usize| &weights[output * depth..][..depth];
        let not_finite: Vec<usize> =
            (0..outputs).filter(|&output| !row(output).iter().all(|x| x.is_finite())).collect();
        let finite = |x: &f32| if x.is_finite() { *x } else { 0.0 };
        // Without outputs there is nothing to turn, however deep it is.
        let inputs = if outputs == 0 { 0..0 } else { 0..depth };
        let by_depth: Vec<f32> =
            inputs.flat_map(|k| weights.iter().skip(k).step_by(depth).map(finite)).collect();
        let mut matrix = PackedMatrix::new(level, Format::Int16, 0, 0);
        matrix.reset_columns(depth, outputs);
        matrix.put_runs(&by_depth);
        Self { matrix, weights: weights.to_vec(), not_finite }
    }

    pub(super) fn matrix(&self) -> &PackedMatrix {
        &self.matrix
    }

    /// Row-major `[outputs, depth]`, as they were packed from.
    pub(super) fn unpacked(&self) -> Vec<f32> {
        self.weights.clone()
    }

    /// Rounds `count` rows of the input.
    pub(super) fn quantize(&self, x: &[f32], count: usize, rows: &mut Int16Rows) {
        let depth = self.matrix.depth();
        rows.put(Rows::new(x, count, depth, depth));
    }

    /// `bias + x·W^T` for some outputs, whose first begins a panel, of rows of `x`; what follows the last in
    /// its vector is overwritten.
    pub(super) fn multiply(
        &self,
        outputs: Range<usize>,
        rows: &Int16Rows,
        bias: &[f32],
        (out, stride): (&mut [MaybeUninit<f32>], usize),
    ) {
        let first = outputs.start;
        self.matrix.multiply_int16(outputs.clone(), rows, &bias[first..], (out, stride));
        for &output in self.not_finite.iter().filter(|&output| outputs.contains(output)) {
            for row in out.chunks_mut(stride).take(rows.count()) {
                row[output - first].write(f32::NAN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer::Linear;
    use super::super::weights::{Precision, Weights};
    use super::*;
    use crate::cpu::runnable;
    use crate::testing::{largest_difference, randn};
    use candle_core::{DType, Device, Tensor};
    use proptest::prelude::*;

    use crate::cpu::contracts::panel_product::INT16_LEFT;
    use crate::cpu::contracts::{INT16_MATRIX, RUN};

    const MATRIX: f32 = INT16_MATRIX as f32;

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn layer(level: Level, weight: &Tensor, bias: &Tensor) -> Linear {
        let weights = Int16Weights::new(level, &numbers(weight), weight.dims2().unwrap());
        Linear::packed(Weights::Int16(weights), &numbers(bias))
    }

    /// Codes and scale of each run of a row, by the definition.
    fn quantized(row: &[f32], most: f32) -> Vec<(Vec<i64>, f32)> {
        let run = |run: &[f32]| {
            let largest = run.iter().fold(0f32, |a, x| a.max(x.abs()));
            let scale = (largest / most).max(f32::MIN_POSITIVE);
            let code = |x: &f32| (x * (1.0 / scale)).clamp(-most, most).round_ties_even() as i64;
            (run.iter().map(code).collect(), scale)
        };
        row.chunks(RUN).map(run).collect()
    }

    /// Every level against the definition, to the bit.
    fn check(m: usize, depth: usize, outputs: usize) {
        let (x, weight, bias) = (randn(&[m, depth]), randn(&[outputs, depth]), randn(&[outputs]));
        let rows = |x: &Tensor, most: f32| -> Vec<_> {
            let numbers = numbers(x);
            let row = |i: usize| quantized(&numbers[i * depth..(i + 1) * depth], most);
            (0..x.dim(0).unwrap()).map(row).collect()
        };
        let weights = rows(&weight, MATRIX);
        let bias_numbers = numbers(&bias);
        let mut expected = Vec::new();
        for row in rows(&x, f32::from(INT16_LEFT)) {
            for (weights, bias) in weights.iter().zip(&bias_numbers) {
                let mut sum = *bias;
                for ((x, x_scale), (w, w_scale)) in row.iter().zip(weights) {
                    let exact: i64 = x.iter().zip(w).map(|(x, w)| x * w).sum();
                    sum += exact as f32 * x_scale * w_scale;
                }
                expected.push(sum);
            }
        }
        for level in runnable() {
            let found = numbers(&layer(level, &weight, &bias).forward(&x).unwrap());
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected), "{level:?} [{m}, {depth}] {outputs}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_level_is_the_definition(
            m in 0usize..60, depth in 0usize..200, outputs in 0usize..150,
        ) {
            check(m, depth, outputs);
        }
    }

    #[test]
    fn every_level_is_the_definition_on_both_sides_of_every_edge() {
        for m in [1, 6, 7, 49] {
            for outputs in [1, 15, 16, 17, 63, 64, 65, 129] {
                for depth in [0, 1, 2, 7, 8, 9, 63, 64, 65, 128] {
                    check(m, depth, outputs);
                }
            }
        }
    }

    /// 12 bits of the largest of a run on one side, 13 on the other: some 70 dB, whatever the outliers.
    #[test]
    fn it_is_near_exact() {
        let x = numbers(&randn(&[40, 384]));
        let x = x.iter().enumerate().map(|(i, x)| if i % 384 == 77 { x + 30.0 } else { *x });
        let x = Tensor::from_iter(x, &Device::Cpu).unwrap().reshape((40, 384)).unwrap();
        let weight = randn(&[100, 384]);
        let f32 = Linear::new(&weight, None, Precision::F32).unwrap();
        let int16 = f32.to_precision(Precision::Int16).unwrap();
        let exact = f32.forward(&x).unwrap();
        let off = numbers(&(int16.forward(&x).unwrap() - &exact).unwrap());
        let energy = |x: &[f32]| x.iter().map(|x| f64::from(x * x)).sum::<f64>();
        let ratio = energy(&numbers(&exact)) / energy(&off);
        assert!(ratio > 1e6, "{} dB", 10.0 * ratio.log10());
        // The weights are there as they came.
        let back = int16.to_precision(Precision::F32).unwrap();
        assert_eq!(largest_difference(&back.forward(&x).unwrap(), &exact), 0.0);
    }

    #[test]
    fn weights_that_are_not_finite_spoil_their_own_output() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut weight = numbers(&randn(&[70, 10]));
            weight[66 * 10 + 4] = bad;
            let weight = Tensor::from_vec(weight, (70, 10), &Device::Cpu).unwrap();
            let bias = Tensor::zeros(70, DType::F32, &Device::Cpu).unwrap();
            for level in runnable() {
                let out = layer(level, &weight, &bias).forward(&randn(&[2, 10])).unwrap();
                for row in out.to_vec2::<f32>().unwrap() {
                    let found: Vec<usize> = (0..70).filter(|&i| row[i].is_nan()).collect();
                    assert_eq!(found, [66], "{level:?} {bad}");
                }
            }
        }
    }
}
