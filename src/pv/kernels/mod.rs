//! The leaves: one file for each instruction set and format, each a tile and nothing else.
//!
//! The inner loops must hold no store: check the disassembly after a change (`cargo rustc
//! --release --lib -- --emit asm`).

/// `for_rows!(rows, f, (arguments))` calls `f::<rows>(arguments)`, for tiles of up to six rows.
macro_rules! for_rows {
    ($rows:expr, $f:ident, $arguments:tt) => {
        match $rows {
            1 => $f::<1> $arguments,
            2 => $f::<2> $arguments,
            3 => $f::<3> $arguments,
            4 => $f::<4> $arguments,
            5 => $f::<5> $arguments,
            _ => $f::<6> $arguments,
        }
    };
}

/// `for_tile!(tile, f)` calls `f::<rows, vectors>(tile)`, for tiles of up to 6 x 4.
#[cfg(target_arch = "x86_64")]
macro_rules! for_tile {
    ($tile:expr, $f:ident) => {
        match $tile.rows {
            1 => for_tile!(@vectors 1, $tile, $f),
            2 => for_tile!(@vectors 2, $tile, $f),
            3 => for_tile!(@vectors 3, $tile, $f),
            4 => for_tile!(@vectors 4, $tile, $f),
            5 => for_tile!(@vectors 5, $tile, $f),
            _ => for_tile!(@vectors 6, $tile, $f),
        }
    };
    (@vectors $rows:literal, $tile:expr, $f:ident) => {
        match $tile.vectors {
            1 => $f::<$rows, 1>($tile),
            2 => $f::<$rows, 2>($tile),
            3 => $f::<$rows, 3>($tile),
            _ => $f::<$rows, 4>($tile),
        }
    };
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2_int8;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512_vnni;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_bf16;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_dotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(super) mod neon_i8mm;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon_mmla;
pub(super) mod portable;
pub(super) mod portable_int8;
