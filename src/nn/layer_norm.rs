//! Layer norm (Ba et al. 2016, arXiv:1607.06450) of the rows of a tensor.

use super::plain::{is_plain_f32, is_tracked};
use crate::memory::check_size;
use crate::parallel::Work;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, bail};
use pulp::{Arch, Simd, WithSimd};

/// Elements of a task, at least.
const TASK: usize = 1 << 13;

/// `(x - mean) / sqrt(variance + eps) * weight + bias`, mean and variance over the last dimension.
///
/// In f32 on a CPU each row is normalized in vectors; where a gradient is asked for, on other devices and
/// for other dtypes, with Candle's operations.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    fused: Option<FusedNorm>,
}

/// What the fused form reads.
pub(super) struct FusedNorm {
    arch: Arch,
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    /// `weight` and `bias` are both `[width]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for tensors of other shapes, and more elements than memory has addresses.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        let wrong = |tensor, x: &Tensor, expected| Error::Shape {
            op: "LayerNorm::new",
            tensor,
            shape: x.dims().to_vec(),
            expected,
        };
        match *weight.dims() {
            [width] if *bias.dims() == [width] => {}
            [width] => return Err(wrong("bias", &bias, format!("[{width}] like the weight"))),
            _ => return Err(wrong("weight", &weight, "[width]".into())),
        }
        check_size("LayerNorm::new", "weight", weight.dims())?;
        let fused = match is_plain_f32(&[&weight, &bias]) {
            true => Some(FusedNorm {
                arch: crate::cpu::vectors(),
                weight: weight.to_vec1()?,
                bias: bias.to_vec1()?,
                eps: eps as f32,
            }),
            false => None,
        };
        Ok(Self { weight, bias, eps, fused })
    }

    /// `[.., width]` to the same.
    ///
    /// # Errors
    /// Candle's own, for another width; [`Error::Shape`] for more elements than memory has addresses.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_size("LayerNorm::forward", "x", x.dims())?;
        match &self.fused {
            Some(fused) if is_plain_f32(&[x]) => Ok(x.contiguous()?.apply_op1_no_bwd(fused)?),
            _ => self.of_tensor(x),
        }
    }

    /// With Candle's operations, which have a gradient; Candle's own op has none.
    pub(super) fn of_tensor(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias, eps) = (&self.weight, &self.bias, self.eps as f32);
        Ok(match is_tracked(&[x, weight, bias]) {
            true => candle_nn::ops::layer_norm_slow(x, weight, bias, eps)?,
            false => candle_nn::ops::layer_norm(&x.contiguous()?, weight, bias, eps)?,
        })
    }

    /// With these vectors, and not those of the level in use.
    #[cfg(test)]
    pub(super) fn with_vectors(mut self, arch: Arch) -> Self {
        self.fused.iter_mut().for_each(|fused| fused.arch = arch);
        self
    }

    pub(super) fn fused(&self) -> Option<&FusedNorm> {
        self.fused.as_ref()
    }
}

impl FusedNorm {
    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.weight.len()
    }

    /// Normalizes whole rows in place.
    pub(super) fn normalize(&self, rows: &mut [f32]) {
        let width = self.width();
        if rows.is_empty() {
            return;
        }
        assert!(rows.len().is_multiple_of(width));
        let normalize = |rows: &mut [f32]| self.normalize_rows(rows);
        // Three passes over elements that are in L1 by then.
        let work = Work { elements: 2 * rows.len(), ..Work::default() };
        work.for_each(rows.chunks_mut(TASK.div_ceil(width) * width).collect(), normalize);
    }

    /// The same in this thread; the rows are whole.
    pub(super) fn normalize_rows(&self, rows: &mut [f32]) {
        self.arch.dispatch(Normalize { norm: self, rows });
    }

    /// What [`FusedNorm::normalize_row`] is to be compiled with.
    pub(super) fn vectors(&self) -> Arch {
        self.arch
    }

    /// One row, among vectors that are dispatched already.
    #[inline(always)]
    pub(super) fn normalize_row<S: Simd>(&self, simd: S, row: &mut [f32]) {
        let n = self.weight.len() as f32;
        let mean = sum(simd, row) / n;
        let variance = sum_of_squares(simd, row, mean) / n;
        let factor = 1.0 / (variance + self.eps).sqrt();
        scale(simd, row, (&self.weight, &self.bias), mean, factor);
    }
}

impl CustomOp1 for FusedNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (CpuStorage::F32(x), Some((start, end))) = (x, layout.contiguous_offsets()) else {
            bail!("layer norm: the input is not contiguous f32");
        };
        if layout.dims().last() != Some(&self.width()) {
            bail!("layer norm: input {:?}, expected [.., {}]", layout.dims(), self.width());
        }
        let mut out = x[start..end].to_vec();
        self.normalize(&mut out);
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

struct Normalize<'a> {
    norm: &'a FusedNorm,
    rows: &'a mut [f32],
}

impl WithSimd for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.norm.width()) {
            self.norm.normalize_row(simd, row);
        }
    }
}

/// `sum x`, in four sums, because an addition takes about four cycles.
#[inline(always)]
fn sum<S: Simd>(simd: S, row: &[f32]) -> f32 {
    let (whole, rest) = S::as_simd_f32s(row);
    let (fours, last) = whole.as_chunks::<4>();
    let mut sums = [simd.splat_f32s(0.0); 4];
    for four in fours {
        for (sum, x) in sums.iter_mut().zip(four) {
            *sum = simd.add_f32s(*sum, *x);
        }
    }
    for (sum, x) in sums.iter_mut().zip(last) {
        *sum = simd.add_f32s(*sum, *x);
    }
    sum_all(simd, sums) + rest.iter().sum::<f32>()
}

/// `sum (x - mean)^2`
#[inline(always)]
fn sum_of_squares<S: Simd>(simd: S, row: &[f32], mean: f32) -> f32 {
    let (whole, rest) = S::as_simd_f32s(row);
    let vector_mean = simd.splat_f32s(mean);
    let (fours, last) = whole.as_chunks::<4>();
    let mut sums = [simd.splat_f32s(0.0); 4];
    for four in fours {
        for (sum, x) in sums.iter_mut().zip(four) {
            let x = simd.sub_f32s(*x, vector_mean);
            *sum = simd.mul_add_f32s(x, x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(last) {
        let x = simd.sub_f32s(*x, vector_mean);
        *sum = simd.mul_add_f32s(x, x, *sum);
    }
    sum_all(simd, sums) + rest.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>()
}

#[inline(always)]
fn sum_all<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

/// `(x - mean) * factor * weight + bias`.
#[inline(always)]
fn scale<S: Simd>(
    simd: S,
    row: &mut [f32],
    (weight, bias): (&[f32], &[f32]),
    mean: f32,
    factor: f32,
) {
    let ((x, x_rest), (w, w_rest), (b, b_rest)) =
        (S::as_mut_simd_f32s(row), S::as_simd_f32s(weight), S::as_simd_f32s(bias));
    let (vector_mean, vector_factor) = (simd.splat_f32s(mean), simd.splat_f32s(factor));
    for ((x, w), b) in x.iter_mut().zip(w).zip(b) {
        let normal = simd.mul_f32s(simd.sub_f32s(*x, vector_mean), vector_factor);
        *x = simd.mul_add_f32s(normal, *w, *b);
    }
    for ((x, w), b) in x_rest.iter_mut().zip(w_rest).zip(b_rest) {
        *x = (*x - mean) * factor * w + b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{largest, largest_difference, randn};
    use candle_core::Var;

    fn exact(x: &[f32], weight: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
        let n = weight.len() as f64;
        let row = |row: &[f32]| -> Vec<f64> {
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            let normal = row.iter().map(|&x| (f64::from(x) - mean) / (variance + eps).sqrt());
            let scale = |((x, &w), &b): ((f64, &f32), &f32)| x * f64::from(w) + f64::from(b);
            normal.zip(weight).zip(bias).map(scale).collect()
        };
        x.chunks(weight.len()).flat_map(row).collect()
    }

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u32 << 24) as f32) * 2.0 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn every_width_against_f64() {
        for arch in super::super::all_vectors() {
            for width in [1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 384, 1000] {
                let (weight, bias) = (noise(width, 1), noise(width, 2));
                let norm = FusedNorm { arch, weight, bias, eps: 1e-5 };
                for (rows, factor, shift) in [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1e3, 100.0)] {
                    let x: Vec<f32> = noise(rows * width, 3);
                    let mut x: Vec<f32> = x.iter().map(|x| x * factor + shift).collect();
                    let expected = exact(&x, &norm.weight, &norm.bias, 1e-5);
                    norm.normalize(&mut x);
                    // The deviation from the mean carries the rounding of the mean.
                    let bound = 1e-5 * if width > 1 { 1.0 } else { 1e3 };
                    for (found, expected) in x.iter().zip(&expected) {
                        let off = (f64::from(*found) - expected).abs();
                        assert!(off < bound, "{arch:?} {width}: {found}, expected {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn constant_rows_give_the_bias_and_nan_stays_in_its_row() {
        for arch in super::super::all_vectors() {
            let width = 33;
            let (weight, bias) = (noise(width, 1), noise(width, 2));
            let norm = FusedNorm { arch, weight, bias: bias.clone(), eps: 1e-12 };
            let mut x = vec![0.5; 4 * width];
            (x[width + 3], x[2 * width + 32]) = (f32::NAN, f32::INFINITY);
            norm.normalize(&mut x);
            let rows: Vec<&[f32]> = x.chunks(width).collect();
            assert_eq!(rows[0], bias, "{arch:?}");
            assert!(rows[1].iter().chain(rows[2]).all(|x| x.is_nan()), "{arch:?}");
            assert_eq!(rows[3], bias, "{arch:?}");
        }
    }

    #[test]
    fn many_threads_give_the_same_bits_as_one() {
        let norm =
            FusedNorm { arch: Arch::new(), weight: noise(40, 1), bias: noise(40, 2), eps: 1e-5 };
        let x = noise(40 * 2000, 3);
        let with_threads = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut x = x.clone();
            pool.install(|| norm.normalize(&mut x));
            x
        };
        assert_eq!(with_threads(1), with_threads(5));
    }

    #[test]
    fn tensors_of_any_strides_and_their_gradients() {
        let norm = LayerNorm::new(randn(&[20]), randn(&[20]), 1e-5).unwrap();
        for x in [randn(&[20]), randn(&[3, 20]), randn(&[2, 20, 3]).t().unwrap()] {
            let found = norm.forward(&x).unwrap();
            assert!(
                largest_difference(&found, &norm.of_tensor(&x).unwrap()) < 1e-5,
                "{:?}",
                x.dims()
            );
        }
        let x = Var::from_tensor(&randn(&[3, 20])).unwrap();
        let tracked = norm.forward(&x).unwrap();
        assert!(largest_difference(&tracked, &norm.forward(&x.detach()).unwrap()) < 1e-5);
        let grads = (&tracked * &tracked).unwrap().sum_all().unwrap().backward().unwrap();
        assert!(largest(grads.get(&x).expect("a gradient")) > 1e-3);
        let error = norm.forward(&randn(&[3, 19])).unwrap_err().to_string();
        assert!(error.contains("[3, 19], expected [.., 20]"), "{error}");
    }
}
