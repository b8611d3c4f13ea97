//! Plain Rust loops, and how they are compiled for the vectors of a level.
//!
//! * [`softmax`], [`rows`] and [`rotate`] are whole kernels: every level without one of its own instantiates them
//!   with its target features (`plain_kernels!`).
//! * [`widest!`](widest) is for loops that are not worth a contract.
//! * [`lanes`] is what all of them do with a vector's worth of elements.

pub(crate) mod lanes;
pub(crate) mod rotate;
pub(crate) mod rows;
pub(crate) mod softmax;

/// `widest!(body, arguments, Arguments => Result)` runs `body(arguments)` compiled for the vectors of
/// the level in use: `pulp` instantiates it for the baseline, AVX2 and AVX-512.
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
        $crate::cpu::vectors().dispatch(Job($arguments))
    }};
}
pub(crate) use widest;

/// `plain_kernels!(name, "features")` makes the constants `SOFTMAX`, `ROWS` and `EXP_BF16` of a leaf:
/// the plain loops, compiled with these target features (those of the baseline without any).
macro_rules! plain_kernels {
    ($name:expr) => { plain_kernels!(@constants $name, inline); };
    ($name:expr, $features:literal) => {
        plain_kernels!(@constants $name, target_feature(enable = $features));
    };
    (@constants $name:expr, $attribute:meta) => {
        #[allow(dead_code)]
        pub(crate) const SOFTMAX: $crate::cpu::contracts::Softmax = $crate::cpu::contracts::Softmax {
            name: $name,
            max,
            exp_f32,
            exp_int8,
            exp_int16,
        };

        #[allow(dead_code)]
        pub(crate) const ROWS: $crate::cpu::contracts::RowKernels =
            $crate::cpu::contracts::RowKernels {
                name: $name,
                quantize,
                condition,
                dots,
                rotate,
                transpose,
            };

        #[allow(dead_code)]
        pub(crate) const EXP_BF16: $crate::cpu::contracts::ExpBf16 = exp_bf16;

        plain_kernels! {
            @functions $attribute
            softmax::max(scores: &[f32]) -> f32;
            softmax::exp_f32(job: $crate::cpu::contracts::F32Exp<'_>);
            softmax::exp_int8(scores: &[f32], max: f32, codes: &mut [u8]) -> f32;
            softmax::exp_int16(job: $crate::cpu::contracts::Int16Exp<'_>);
            softmax::exp_bf16(scores: &[f32], max: f32, probs: &mut [u16]) -> f32;
            rows::quantize(
                affine: bool,
                rows: $crate::cpu::contracts::Rows<'_>,
                ranges: Option<&$crate::cpu::contracts::RowRanges>,
                out: $crate::cpu::contracts::BlockCodes<'_>
            );
            rows::condition(job: $crate::cpu::contracts::Condition<'_>);
            rows::dots(
                rows: $crate::cpu::contracts::Rows<'_>,
                vectors: $crate::cpu::contracts::Rows<'_>,
                out: &mut [f32]
            );
            rotate::rotate(depth: usize, rows: &mut [f32]);
            rows::transpose(job: $crate::cpu::contracts::Transpose<'_>);
        }
    };
    (@functions $attribute:meta
     $($file:ident::$kernel:ident($($x:ident: $of:ty),+) $(-> $result:ty)?;)+) => { $(
        #[allow(dead_code)]
        #[$attribute]
        fn $kernel($($x: $of),+) $(-> $result)? {
            $crate::cpu::plain::$file::$kernel($($x),+)
        }
    )+ };
}
