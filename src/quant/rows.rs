//! The loops over rows of f32, compiled once for every vector width and chosen at run time.
//!
//! They are plain Rust: `pulp` compiles each body for the baseline, for AVX2 and for AVX-512
//! (NEON is part of the Arm baseline), and LLVM vectorizes it. Every width gives the same bits,
//! because no result here depends on the order of evaluation.

use super::{QuantParams, Range};

/// A function and its arguments, to be compiled for one vector width after the other.
struct Call<F, A>(F, A);

impl<R, A, F: FnOnce(A) -> R> pulp::WithSimd for Call<F, A> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> R {
        (self.0)(self.1)
    }
}

/// Runs `f(args)` compiled for the widest vectors of this machine. `f` must be a function marked
/// `#[inline(always)]`, or it is compiled for the baseline only.
#[inline]
fn widest<A, R>(f: impl FnOnce(A) -> R, args: A) -> R {
    pulp::Arch::new().dispatch(Call(f, args))
}

/// What a pass over a row finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowRange {
    /// Smallest and largest element; meaningless unless `finite`.
    pub range: Range,
    /// Whether every element is finite.
    pub finite: bool,
}

/// Smallest and largest element of `row`, and whether all of it is finite.
pub(crate) fn row_range(row: &[f32]) -> RowRange {
    widest(row_range_body, row)
}

#[inline(always)]
fn row_range_body(row: &[f32]) -> RowRange {
    const LANES: usize = 16;
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    // The exponent bits are all set in infinities and NaN alone: the largest magnitude tells.
    let mut magnitude = [0u32; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut step = |lane: usize, x: f32| {
        low[lane] = if x < low[lane] { x } else { low[lane] };
        high[lane] = if x > high[lane] { x } else { high[lane] };
        magnitude[lane] = magnitude[lane].max(x.to_bits() & 0x7fff_ffff);
    };
    for chunk in chunks {
        for (lane, &x) in chunk.iter().enumerate() {
            step(lane, x);
        }
    }
    for (lane, &x) in tail.iter().enumerate() {
        step(lane, x);
    }
    let min = low.into_iter().fold(f32::INFINITY, f32::min);
    let max = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let finite = magnitude.into_iter().max().unwrap_or(0) < f32::INFINITY.to_bits();
    RowRange { range: Range { min, max }, finite }
}

/// `clamp(round(x / scale) + zero_point)` for a row of finite numbers; returns the sum of the
/// codes. Infinities saturate; NaN gives an unspecified code.
pub(crate) fn quantize_row(row: &[f32], params: QuantParams, codes: &mut [i8]) -> i32 {
    assert_eq!(row.len(), codes.len());
    widest(quantize_row_body, (row, params, codes))
}

/// `1.5 * 2^23`: adding it to a number below `2^22` rounds that to an integer, ties to even, and
/// leaves the integer in the low mantissa bits. SSE2 has no rounding instruction; this is as fast
/// everywhere.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn quantize_row_body((row, params, codes): (&[f32], QuantParams, &mut [i8])) -> i32 {
    let zero = i32::from(params.zero_point());
    let low = (i32::from(params.scheme().qmin()) - zero) as f32;
    let high = (i32::from(params.scheme().qmax()) - zero) as f32;
    let bias = zero - ROUND.to_bits() as i32;
    let scale = params.scale();
    let mut sum = 0i32;
    for (code, &x) in codes.iter_mut().zip(row) {
        // Clamping first is the same, as the bounds are integers. Multiplying by 1 / scale would
        // save little (the division hides behind the loads) and round differently at ties.
        let steps = (x / scale).max(low).min(high);
        let q = (steps + ROUND).to_bits() as i32 + bias;
        *code = q as i8;
        sum = sum.wrapping_add(i32::from(q as i8));
    }
    sum
}

/// Subtracts `offset` from `row`, element by element.
pub(crate) fn subtract(row: &mut [f32], offset: &[f32]) {
    widest(subtract_body, (row, offset));
}

#[inline(always)]
fn subtract_body((row, offset): (&mut [f32], &[f32])) {
    for (x, o) in row.iter_mut().zip(offset) {
        *x -= o;
    }
}

/// Adds `row` to the f64 sums of its columns.
pub(crate) fn accumulate(sums: &mut [f64], row: &[f32]) {
    widest(accumulate_body, (sums, row));
}

#[inline(always)]
fn accumulate_body((sums, row): (&mut [f64], &[f32])) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += f64::from(x);
    }
}

/// Dot product in f32, 16 partial sums wide. The order is fixed, so every width gives the same.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    widest(dot_body, (a, b))
}

#[inline(always)]
fn dot_body((a, b): (&[f32], &[f32])) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let ((a_chunks, a_tail), (b_chunks, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    for (lane, (x, y)) in a_tail.iter().zip(b_tail).enumerate() {
        sums[lane] += x * y;
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Scheme;
    use proptest::prelude::*;

    fn any_finite() -> impl Strategy<Value = f32> {
        prop_oneof![
            prop::num::f32::NORMAL | prop::num::f32::ZERO | prop::num::f32::SUBNORMAL,
            -4f32..4.0,
            (-600i32..600).prop_map(|ties| ties as f32 / 2.0),
        ]
    }

    proptest! {
        #[test]
        fn row_functions_equal_the_scalar_definition(
            row in prop::collection::vec(any_finite(), 0..100),
            scale in prop_oneof![Just(1f32), Just(0.5), 1e-3f32..10.0],
            zero_point in -128i32..128,
        ) {
            let found = row_range(&row);
            prop_assert!(found.finite);
            prop_assert_eq!(found.range.min, row.iter().copied().fold(f32::INFINITY, f32::min));
            prop_assert_eq!(found.range.max, row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            for params in
                [QuantParams::affine(scale, zero_point).unwrap(), QuantParams::symmetric(scale).unwrap()]
            {
                let mut codes = vec![0x55; row.len()];
                let sum = quantize_row(&row, params, &mut codes);
                let expected: Vec<i8> = row.iter().map(|&x| params.quantize(x)).collect();
                prop_assert_eq!(sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>());
                prop_assert_eq!(codes, expected);
            }
        }
    }

    #[test]
    fn one_bad_element_anywhere_is_seen() {
        for len in [1, 15, 16, 17, 40] {
            for at in 0..len {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut row = vec![1.0; len];
                    row[at] = bad;
                    assert!(!row_range(&row).finite, "{bad} at {at} of {len}");
                }
            }
        }
        assert_eq!(row_range(&[]).range, Range::EMPTY);
        assert!(row_range(&[f32::MAX, f32::MIN]).finite);
    }

    #[test]
    fn dot_and_sums() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &a), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        let mut sums = vec![1.0; 37];
        accumulate(&mut sums, &a);
        assert_eq!(sums[36], 37.0);
        let mut row = a.clone();
        subtract(&mut row, &a);
        assert_eq!(row, vec![0.0; 37]);
        assert_eq!(Scheme::Symmetric.qmin(), -127);
    }
}
