//! Plain Rust loops, compiled for every vector width and chosen at run time.

/// A function and its arguments, to be compiled for one vector width after the other.
struct Call<F, A>(F, A);

impl<R, A, F: FnOnce(A) -> R> pulp::WithSimd for Call<F, A> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) -> R {
        (self.0)(self.1)
    }
}

/// Runs `f(args)` compiled for the widest vectors of this machine: `pulp` instantiates it for the
/// baseline, AVX2 and AVX-512. `f` must be a function marked `#[inline(always)]`, or it is
/// compiled for the baseline only.
#[inline]
pub(crate) fn widest<A, R>(f: impl FnOnce(A) -> R, args: A) -> R {
    pulp::Arch::new().dispatch(Call(f, args))
}
