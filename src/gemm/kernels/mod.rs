//! The leaves: one file for each instruction set, each a tile and nothing else. The algorithm
//! around them is in `driver`, their order in `dispatch`.

/// `for_rows!(rows, f, (arguments))` calls `f::<rows>(arguments)`, for the tiles of six rows.
macro_rules! for_rows {
    ($rows:expr, $($f:ident)::+, $arguments:tt) => {
        match $rows {
            1 => $($f)::+::<1> $arguments,
            2 => $($f)::+::<2> $arguments,
            3 => $($f)::+::<3> $arguments,
            4 => $($f)::+::<4> $arguments,
            5 => $($f)::+::<5> $arguments,
            _ => $($f)::+::<6> $arguments,
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512_vnni;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx_vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_dotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_i8mm;
pub(super) mod portable;
