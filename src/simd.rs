//! Plain Rust loops, compiled for every vector width and chosen at run time.

/// `widest!(body, arguments, Arguments => Result)` runs `body(arguments)` compiled for the widest
/// vectors of this machine: `pulp` instantiates it for the baseline, AVX2 and AVX-512.
///
/// `body` must be a function marked `#[inline(always)]`. It is called from a method that is so
/// marked too, because a closure or a function passed as a value is not inlined for certain, and
/// would then be compiled for the baseline only, with the same results at a fourth of the speed.
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
