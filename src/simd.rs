//! Plain Rust loops, compiled for every vector width and chosen at run time.

/// `widest!(body, arguments, Arguments => Result)` runs `body(arguments)` compiled for the widest
/// vectors of this machine: `pulp` instantiates it for the baseline, AVX2 and AVX-512.
///
/// `body` must be a function marked `#[inline(always)]`. It is called from a method that is so
/// marked too, because a closure or a function passed as a value is not inlined for certain, and
/// would then be compiled for the baseline only: the same results, at less than half the speed.
macro_rules! widest {
    ($body:path, $arguments:expr, $types:ty => $result:ty) => {{
        struct Job<A>(A);
        impl pulp::WithSimd for Job<$types> {
            type Output = $result;

            #[inline(always)]
            fn with_simd<S: pulp::Simd>(self, _: S) -> $result {
                $body(self.0)
            }
        }
        pulp::Arch::new().dispatch(Job($arguments))
    }};
}
pub(crate) use widest;

/// Elements that a loop takes at a time: enough for the widest vectors.
pub(crate) const LANES: usize = 16;

/// `[f(0), f(1), ..]`. The standard library's `array::map` and `array::from_fn` are not always
/// inlined into a [`widest!`] body, and are then compiled for the baseline.
#[inline(always)]
pub(crate) fn each_lane<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut lanes = [T::default(); LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = f(i);
    }
    lanes
}

/// The lanes of a row from `start` on, filled up with zeros.
#[inline(always)]
pub(crate) fn lanes(row: &[f32], start: usize) -> [f32; LANES] {
    match row[start..].first_chunk() {
        Some(lanes) => *lanes,
        None => {
            let mut lanes = [0.0; LANES];
            lanes[..row.len() - start].copy_from_slice(&row[start..]);
            lanes
        }
    }
}

/// All lanes in one, by halves: one after the other they would wait for each other 15 times, which
/// in a short row costs more than the row.
#[inline(always)]
pub(crate) fn fold_lanes(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The sum of all lanes.
#[inline(always)]
pub(crate) fn sum_lanes(lanes: [f32; LANES]) -> f32 {
    fold_lanes(lanes, |a, b| a + b)
}

/// The coefficients of `f` to `f^5` in the polynomial for `2^f`: minimax in relative error over
/// [-1/2, 1/2], with a constant term of 1, so that `2^0 = 1`.
#[expect(clippy::approx_constant, reason = "minimax, not Taylor: the first is not ln 2")]
pub(crate) const EXP2: [f32; 5] =
    [6.931_47e-1, 2.402_224_2e-1, 5.550_733_6e-2, 9.671_513e-3, 1.326_472_7e-3];
