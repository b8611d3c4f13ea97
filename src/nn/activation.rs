//! Activations, a vector at a time.

use candle_core::{Result, Tensor};
use pulp::Simd;

/// What follows a linear layer, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `x * Phi(x)`, Phi the distribution function of the normal distribution (Hendrycks and
    /// Gimpel 2016, arXiv:1606.08415).
    Gelu,
    /// The same with Phi approximated by a tanh: `(1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

impl Activation {
    /// With Candle's operations.
    pub(super) fn of_tensor(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Activation::Gelu => x.gelu_erf(),
            Activation::GeluTanh => x.gelu(),
            Activation::Relu => x.relu(),
        }
    }

    /// Of `N` vectors at once: a polynomial waits for its own last step, so that one alone would leave most of
    /// the processor idle. Both forms of GELU are within `3e-7 * |x|` of the exact value, and exactly `x` or
    /// zero beyond the limits of their table. NaN stays NaN; GELU of minus infinity is NaN, as in
    /// Candle.
    #[inline(always)]
    pub(super) fn of_vectors<S: Simd, const N: usize>(
        self,
        simd: S,
        x: [S::f32s; N],
    ) -> [S::f32s; N] {
        match self {
            Activation::Gelu => GELU.times_x(simd, x),
            Activation::GeluTanh => GELU_TANH.times_x(simd, x),
            Activation::Relu => relu(simd, x),
        }
    }
}

#[inline(always)]
fn relu<S: Simd, const N: usize>(simd: S, mut x: [S::f32s; N]) -> [S::f32s; N] {
    let zero = simd.splat_f32s(0.0);
    for x in &mut x {
        // Not a maximum, which loses a NaN.
        *x = simd.select_f32s(simd.less_than_f32s(*x, zero), zero, *x);
    }
    x
}

/// A function that rises from 0 to 1 as Phi does, point-symmetric about (0, 1/2):
/// `1/2 + x * p(s)` with `s = 2 (x / limit)^2 - 1`, which keeps the coefficients small.
///
/// The polynomials are minimax in absolute error over `[-limit, limit]`, with the value at the
/// limit held a little above 1, so that clamping to `[0, 1]` joins them to their constant ends.
struct Sigmoid {
    limit: f32,
    coefficients: [f32; 14],
}

/// Phi within 2e-7.
const GELU: Sigmoid = Sigmoid {
    limit: 5.25,
    coefficients: [
        0.134_659_36,
        -0.067_126_59,
        0.049_643_908,
        -0.039_770_756,
        0.032_064_1,
        -0.024_976_085,
        0.018_326_992,
        -0.013_025_27,
        0.009_067_784,
        -0.004_991_580_7,
        0.001_872_416_8,
        -0.001_437_127_6,
        0.001_455_376_4,
        -0.000_524_432_75,
    ],
};

/// Its tanh approximation within 2.2e-7.
const GELU_TANH: Sigmoid = Sigmoid {
    limit: 5.0,
    coefficients: [
        0.141_378_49,
        -0.070_365_71,
        0.051_658_668,
        -0.040_545_885,
        0.031_327_724,
        -0.022_971_44,
        0.016_130_388,
        -0.010_656_994,
        0.005_597_613,
        -0.002_674_742_6,
        0.002_786_519_7,
        -0.002_356_103,
        0.000_592_171_9,
        0.000_099_298_886,
    ],
};

impl Sigmoid {
    /// Each `x` times the function. Loops, no closures: those are not inlined for certain, and are
    /// then compiled without these vectors.
    #[inline(always)]
    fn times_x<S: Simd, const N: usize>(&self, simd: S, mut x: [S::f32s; N]) -> [S::f32s; N] {
        let (zero, half, one) = (simd.splat_f32s(0.0), simd.splat_f32s(0.5), simd.splat_f32s(1.0));
        let (high, low) = (simd.splat_f32s(self.limit), simd.splat_f32s(-self.limit));
        let two_over_square = simd.splat_f32s(2.0 / (self.limit * self.limit));
        let [rest @ .., last] = &self.coefficients;
        // The clamps lose a NaN; the product with x brings it back.
        let mut inside = x;
        let mut s = x;
        for (inside, s) in inside.iter_mut().zip(&mut s) {
            *inside = simd.max_f32s(simd.min_f32s(*inside, high), low);
            let square = simd.mul_f32s(*inside, *inside);
            *s = simd.mul_add_f32s(square, two_over_square, simd.neg_f32s(one));
        }
        let mut p = [simd.splat_f32s(*last); N];
        for c in rest.iter().rev() {
            let c = simd.splat_f32s(*c);
            for (p, s) in p.iter_mut().zip(s) {
                *p = simd.mul_add_f32s(*p, s, c);
            }
        }
        for ((x, p), inside) in x.iter_mut().zip(p).zip(inside) {
            let value = simd.mul_add_f32s(inside, p, half);
            let value = simd.max_f32s(simd.min_f32s(value, one), zero);
            *x = simd.mul_f32s(*x, value);
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use pulp::{Arch, WithSimd};

    struct Job<'a>(Activation, &'a mut [f32]);

    impl WithSimd for Job<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (whole, rest) = S::as_mut_simd_f32s(self.1);
            let (fours, ones) = whole.as_chunks_mut::<4>();
            for four in fours {
                *four = self.0.of_vectors(simd, *four);
            }
            for one in ones {
                [*one] = self.0.of_vectors(simd, [*one]);
            }
            let [last] = self.0.of_vectors(simd, [simd.partial_load_f32s(rest)]);
            simd.partial_store_f32s(rest, last);
        }
    }

    fn apply(arch: Arch, activation: Activation, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        arch.dispatch(Job(activation, &mut out));
        out
    }

    /// In f64, by Candle.
    fn exact(activation: Activation, x: &[f32]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let x = Tensor::new(x.as_slice(), &Device::Cpu).unwrap();
        activation.of_tensor(&x).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn gelu_is_within_its_stated_error() {
        let x: Vec<f32> = (-160_000..=160_000).map(|i| i as f32 * 5e-5).collect();
        for activation in [Activation::Gelu, Activation::GeluTanh] {
            let exact = exact(activation, &x);
            for arch in super::super::all_vectors() {
                let found = apply(arch, activation, &x);
                let error = |((&x, &found), exact): ((&f32, &f32), &f64)| {
                    (f64::from(found) - exact).abs() / f64::from(x.abs()).max(1e-30)
                };
                let worst = x.iter().zip(&found).zip(&exact).map(error).fold(0.0, f64::max);
                eprintln!("{activation:?} {arch:?}: {worst:e} * |x|");
                assert!(worst < 3e-7, "{activation:?} {arch:?}: {worst:e}");
            }
        }
    }

    #[test]
    fn far_out_it_is_x_or_zero() {
        let x = [5.3f32, 7.0, 1e30, f32::MAX, f32::INFINITY, -5.3, -7.0, -1e30, f32::MIN];
        let expected = [5.3, 7.0, 1e30, f32::MAX, f32::INFINITY, 0.0, 0.0, 0.0, 0.0];
        for arch in super::super::all_vectors() {
            for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                assert_eq!(apply(arch, activation, &x), expected, "{activation:?} {arch:?}");
                let nan = apply(arch, activation, &[f32::NAN, 1.0, 0.0, -0.0]);
                assert!(nan[0].is_nan() && nan[1] > 0.8, "{activation:?} {arch:?}: {nan:?}");
                assert_eq!(nan[2..], [0.0, 0.0], "{activation:?} {arch:?}");
            }
            assert!(apply(arch, Activation::Gelu, &[f32::NEG_INFINITY])[0].is_nan(), "{arch:?}");
            assert_eq!(apply(arch, Activation::Relu, &[f32::NEG_INFINITY])[0], 0.0, "{arch:?}");
        }
    }
}
