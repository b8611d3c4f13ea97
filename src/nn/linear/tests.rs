//! Every form of the layer, on every level.

use super::super::assert_threads_change_nothing;
use super::layer::*;
use super::weights::*;
use crate::cpu::Level;
use crate::cpu::runnable;
use crate::nn::{Activation, LayerNorm};
use crate::testing::{largest, largest_difference, randn};
use candle_core::{DType, Var};
use candle_core::{Device, Tensor};
use proptest::prelude::*;

const CPU: Device = Device::Cpu;

fn f64s(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

/// A layer packed for a level.
fn layer(level: Level, precision: Precision, weight: &Tensor, bias: &Tensor) -> Linear {
    let numbers = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let shape = weight.dims2().unwrap();
    let weights = Weights::new(level, precision, &numbers, shape).unwrap();
    Linear::packed(weights, &bias.to_vec1::<f32>().unwrap())
}

/// Every level in every precision.
fn all() -> impl Iterator<Item = (Level, Precision)> {
    let precisions = [Precision::F32, Precision::Int16, Precision::Int8];
    runnable().into_iter().flat_map(move |level| precisions.map(|precision| (level, precision)))
}

fn f32_layer(weight: &Tensor, bias: &Tensor) -> Linear {
    Linear::new(weight, Some(bias), Precision::F32).unwrap()
}

/// `x·W^T + b` in f64 for `x` `[M, K]`.
fn exact(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Tensor {
    let (m, outputs) = (x.dim(0).unwrap(), bias.dim(0).unwrap());
    if m * outputs * x.dim(1).unwrap() == 0 {
        return f64s(bias).unsqueeze(0).unwrap().repeat((m, 1)).unwrap();
    }
    let product = f64s(x).matmul(&f64s(weight).t().unwrap()).unwrap();
    product.broadcast_add(&f64s(bias)).unwrap()
}

/// Every form on every level against f64; all levels with a fused multiply-add give the same bits.
fn check(m: usize, depth: usize, outputs: usize) {
    let (x, weight, bias) = (randn(&[m, depth]), randn(&[outputs, depth]), randn(&[outputs]));
    let residual = randn(&[m, outputs]);
    // With an epsilon of 1 the norm does not magnify, however close the outputs are.
    let norm = LayerNorm::new(randn(&[outputs]), randn(&[outputs]), 1.0).unwrap();
    let product = exact(&x, &weight, &bias);
    // Rounding of each of K sums whose terms have a variance of 1.
    let bound = f64::from(f32::EPSILON) * (depth as f64 + 8.0) * 4.0;
    let mut first: Option<Tensor> = None;
    for level in runnable() {
        let layer = layer(level, Precision::F32, &weight, &bias);
        let what = format!("{level:?} [{m}, {depth}] x [{depth}, {outputs}]");
        let plain = layer.forward(&x).unwrap();
        assert!(largest_difference(&plain, &product) < bound, "{what}");
        if !level.name().starts_with("portable") {
            let same = largest_difference(first.get_or_insert(plain.clone()), &plain);
            assert_eq!(same, 0.0, "{what}");
        }
        for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let found = layer.forward_activated(&x, activation).unwrap();
            let expected = activation.of_tensor(&product).unwrap();
            // The slope of GELU is below 1.13.
            let bound = bound * 1.13 + 3e-7 * largest(&product);
            assert!(largest_difference(&found, &expected) < bound, "{what} {activation:?}");
        }
        let found = layer.forward_add_norm(&x, &residual, &norm).unwrap();
        let sum = (plain + &residual).unwrap();
        if outputs > 0 {
            let expected = norm.of_tensor(&sum).unwrap();
            let bound = 8.0 * bound + 1e-5;
            assert!(largest_difference(&found, &expected) < bound, "{what}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_form_is_the_product(m in 0usize..60, depth in 0usize..70, outputs in 0usize..150) {
        check(m, depth, outputs);
    }
}

#[test]
fn every_form_on_both_sides_of_every_edge() {
    for m in [1, 5, 6, 7, 48, 49] {
        for outputs in [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 128, 130] {
            for depth in [1, 2, 33] {
                check(m, depth, outputs);
            }
        }
    }
}

/// Enough work to be divided, over rows and over columns.
#[test]
fn many_threads_give_the_same_bits_as_one() {
    for (m, depth, outputs) in [(150, 96, 200), (7, 512, 1030)] {
        let (x, weight) = (randn(&[m, depth]), randn(&[outputs, depth]));
        let norm = LayerNorm::new(randn(&[outputs]), randn(&[outputs]), 1e-5).unwrap();
        let (bias, residual) = (randn(&[outputs]), randn(&[m, outputs]));
        for precision in [Precision::F32, Precision::Int16, Precision::Int8] {
            let layer = Linear::new(&weight, Some(&bias), precision).unwrap();
            assert_threads_change_nothing(|| layer.forward(&x).unwrap());
            let gelu = || layer.forward_activated(&x, Activation::Gelu).unwrap();
            assert_threads_change_nothing(gelu);
            let norm = || layer.forward_add_norm(&x, &residual, &norm).unwrap();
            assert_threads_change_nothing(norm);
        }
    }
}

/// The block has the bits of its two layers, whether or not there are blocks of rows for all threads.
#[test]
fn a_block_of_two_layers_is_one_after_the_other() {
    for (m, depth, inner, outputs) in
        [(1, 5, 7, 9), (7, 64, 256, 64), (600, 96, 200, 70), (3, 4, 0, 2), (0, 4, 5, 2)]
    {
        let weights = [randn(&[inner, depth]), randn(&[outputs, inner])];
        let biases = [randn(&[inner]), randn(&[outputs])];
        let norm = LayerNorm::new(randn(&[outputs]), randn(&[outputs]), 1e-5).unwrap();
        let (x, residual) = (randn(&[m, depth]), randn(&[m, outputs]));
        for (level, precision) in all() {
            let [first, second] = [0, 1].map(|i| layer(level, precision, &weights[i], &biases[i]));
            let block =
                || first.forward_block(&x, Activation::Gelu, &second, &residual, &norm).unwrap();
            let between = first.forward_activated(&x, Activation::Gelu).unwrap();
            let expected = second.forward_add_norm(&between, &residual, &norm).unwrap();
            let what = format!("{level:?} {precision:?} [{m}, {depth}] {inner} {outputs}");
            assert_eq!(largest_difference(&block(), &expected), 0.0, "{what}");
            if level == Level::active().unwrap() {
                assert_threads_change_nothing(block);
            }
        }
    }
}

#[test]
fn heads_and_strides_are_read_where_they_lie() {
    let layer = f32_layer(&randn(&[10, 24]), &randn(&[10]));
    let heads = randn(&[2, 3, 7, 8]);
    let tokens = heads.transpose(1, 2).unwrap();
    let merged = tokens.flatten_from(2).unwrap();
    let expected = layer.of_tensor(&merged).unwrap();
    assert_eq!(expected.dims(), [2, 7, 10]);
    for x in [&tokens, &merged, &merged.t().unwrap().contiguous().unwrap().t().unwrap()] {
        assert!(largest_difference(&layer.forward(x).unwrap(), &expected) < 1e-4);
    }
    let residual = randn(&[2, 10, 7]).t().unwrap();
    let norm = LayerNorm::new(randn(&[10]), randn(&[10]), 1e-5).unwrap();
    let found = layer.forward_add_norm(&tokens, &residual, &norm).unwrap();
    let expected = norm.of_tensor(&(expected + residual).unwrap()).unwrap();
    assert!(largest_difference(&found, &expected) < 1e-4);
    let row = randn(&[24]);
    let expected = layer.forward(&row.unsqueeze(0).unwrap()).unwrap().squeeze(0).unwrap();
    assert_eq!(largest_difference(&layer.forward(&row).unwrap(), &expected), 0.0);
}

#[test]
fn nan_and_infinity_stay_in_their_row() {
    for (level, precision) in all() {
        let layer = layer(level, precision, &randn(&[70, 5]), &randn(&[70]));
        let clean = randn(&[8, 5]);
        let expected = layer.forward(&clean).unwrap().to_vec2::<f32>().unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = clean.to_vec2::<f32>().unwrap();
            x[2][3] = bad;
            let found = layer.forward(&Tensor::new(x, &CPU).unwrap()).unwrap();
            for (i, (found, expected)) in
                found.to_vec2::<f32>().unwrap().iter().zip(&expected).enumerate()
            {
                match i {
                    2 => assert!(
                        found.iter().all(|x| !x.is_finite()),
                        "{level:?} {precision:?} {bad}"
                    ),
                    _ => assert_eq!(found, expected, "{level:?} {precision:?} {bad}"),
                }
            }
        }
    }
}

#[test]
fn a_variable_gets_the_gradient_of_candles_operations() {
    let (weight, bias) = (randn(&[6, 4]), randn(&[6]));
    let norm = LayerNorm::new(randn(&[6]), randn(&[6]), 1e-5).unwrap();
    let layer = f32_layer(&weight, &bias);
    let x = Var::from_tensor(&randn(&[2, 3, 4])).unwrap();
    let residual = randn(&[2, 3, 6]);
    let gradient = |out: &Tensor| {
        let weights = Tensor::arange(0f32, 36., &CPU).unwrap().reshape((2, 3, 6)).unwrap();
        let grads = (out * weights).unwrap().sum_all().unwrap().backward().unwrap();
        grads.get(&x).cloned().expect("a gradient")
    };
    let product = {
        let rows = x.reshape((6, 4)).unwrap().matmul(&weight.t().unwrap()).unwrap();
        rows.broadcast_add(&bias).unwrap().reshape((2, 3, 6)).unwrap()
    };
    let found = gradient(&layer.forward(&x).unwrap());
    assert!(largest_difference(&found, &gradient(&product)) < 1e-4);
    let found = gradient(&layer.forward_activated(&x, Activation::Gelu).unwrap());
    assert!(largest_difference(&found, &gradient(&product.gelu_erf().unwrap())) < 1e-4);
    let found = layer.forward_add_norm(&x, &residual, &norm).unwrap();
    let expected = norm.of_tensor(&(product + residual).unwrap()).unwrap();
    assert!(largest_difference(&found, &expected) < 1e-4);
    assert!(largest_difference(&gradient(&found), &gradient(&expected)) < 1e-4);
    assert!(largest(&gradient(&found)) > 0.1);

    // Weights that are variables are never packed.
    let weight = Var::from_tensor(&weight).unwrap();
    let layer = f32_layer(&weight, &bias);
    let out = layer.forward(&randn(&[2, 4])).unwrap();
    assert!(out.sum_all().unwrap().backward().unwrap().get(&weight).is_some());
}

#[test]
fn other_dtypes_are_left_to_candle() {
    let (weight, bias, x) = (randn(&[6, 4]), randn(&[6]), randn(&[1, 3, 4]));
    let expected = f32_layer(&weight, &bias).forward(&x).unwrap();
    let half = |x: &Tensor| x.to_dtype(DType::F16).unwrap();
    let layer = f32_layer(&half(&weight), &half(&bias));
    let found = layer.forward_activated(&half(&x), Activation::Relu).unwrap();
    assert_eq!(found.dtype(), DType::F16);
    assert!(largest_difference(&found, &expected.relu().unwrap()) < 0.05);
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let layer = f32_layer(&randn(&[6, 4]), &randn(&[6]));
    let error = layer.forward(&randn(&[2, 5])).unwrap_err().to_string();
    assert!(error.contains("linear: x has shape [2, 5], expected [.., 4]"), "{error}");
    let error = layer.forward(&randn(&[2, 5, 2, 3])).unwrap_err().to_string();
    assert!(error.contains("expected [B, N, H, D] with H * D = 4"), "{error}");
    let norm = LayerNorm::new(randn(&[6]), randn(&[6]), 1e-5).unwrap();
    let error = layer.forward_add_norm(&randn(&[2, 4]), &randn(&[2, 5]), &norm);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("residual has shape [2, 5], expected [2, 6]"), "{error}");
}
