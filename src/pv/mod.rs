//! The second product of attention: probabilities times values, `[M, N] x [N, Dv] -> [M, Dv]`,
//! with f32 sums.
//!
//! The operands are f32, or bf16 where the hardware multiplies it: bf16 halves the memory and
//! doubles the speed, and its rounding of `P` and `V` (2^-9 relative) is smaller than what int8
//! scores cost. Or they are int8, on request: probabilities with a scale for each row and run of
//! 64 keys, values with a scale for each channel, exact int32 sums over a run; that costs more
//! accuracy than the scores do (the README has figures).
//!
//! * `kernel` says what a kernel is; `kernels/` holds one file for each instruction set and format.
//! * `pack` puts values in the order a kernel reads, and multiplies.
//! * `int8` is the arithmetic around int8 sums.

mod int8;
mod kernel;
mod kernels;
mod pack;
#[cfg(test)]
mod tests;

pub(crate) use kernel::{Int8Run, KEY_GROUP, PvKernel, RUN, ValueFormat, bf16_bits};
pub(crate) use pack::PackedValues;

/// Every kernel compiled for this architecture; of each format, best first.
static TABLE: &[&dyn PvKernel] = &[
    #[cfg(target_arch = "x86_64")]
    &kernels::avx512_bf16::Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx512::Avx512,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx2::Avx2,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx512_vnni::Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    &kernels::avx2_int8::Avx2Int8,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon_bf16::NeonBf16,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon::Neon,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon_i8mm::NeonI8mm,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    &kernels::neon_dotprod::NeonDotprod,
    &kernels::portable::Portable,
    &kernels::portable_int8::PortableInt8,
];

/// The best available kernel for values stored as `format`, if there is one.
pub(crate) fn select(format: ValueFormat) -> Option<&'static dyn PvKernel> {
    TABLE.iter().copied().find(|kernel| kernel.format() == format && kernel.is_available())
}
