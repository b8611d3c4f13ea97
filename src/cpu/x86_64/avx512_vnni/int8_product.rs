//! AVX-512 VNNI: `vpdpbusd` adds four u8 x i8 products to each of 16 lanes, without saturation.
//!
//! 6 x 4 accumulators of 16 lanes, 4 registers of the right side, 1 broadcast of the left: 29 of
//! 32 registers. One step of the depth is 10 loads and 24 `vpdpbusd`, so multiplication, not the
//! load port, is the limit. The inner loop must hold no store: check the disassembly after a
//! change (`cargo rustc --release --lib -- --emit asm`).

use crate::cpu::contracts::{Geometry, Int8Product, LhsFormat, ScoreTile, TileInput};
use std::arch::x86_64::*;

const MR: usize = 6;
const LANES: usize = 16;
const VECTORS: usize = 4;
const NR: usize = LANES * VECTORS;
const GROUP: usize = 4;

pub(crate) const PRODUCT: Int8Product = Int8Product {
    name: super::NAME,
    geometry: Geometry { mr: MR, nr: NR, group: GROUP, lhs: LhsFormat::Biased },
    tile,
    scores,
};

int8_tiles! {
    features: "avx512f,avx512vnni",
    integers: __m512i, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_storeu_si512,
    pairs: |sum, x, y| _mm512_dpwssd_epi32(sum, x, y),
    convert: _mm512_cvtepi32_ps,
    floats: _mm512_loadu_ps, _mm512_set1_ps, _mm512_mul_ps, _mm512_add_ps, _mm512_storeu_ps,
}

/// The sums of `ROWS` rows, 64 columns each.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn sums<const ROWS: usize>(input: TileInput) -> [[__m512i; VECTORS]; ROWS] {
    // SAFETY: by contract.
    let mut sums = unsafe { start::<ROWS>(input) };
    for group in 0..input.groups {
        let mut b = [_mm512_setzero_si512(); VECTORS];
        for (v, b) in b.iter_mut().enumerate() {
            // SAFETY: the right panel holds `groups` times 256 bytes by contract.
            *b = unsafe {
                _mm512_loadu_si512(input.rhs.add((group * VECTORS + v) * LANES * GROUP).cast())
            };
        }
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: each row holds `groups` words of 4 bytes by contract.
            let a = unsafe {
                input.lhs.add(row * input.row_bytes + group * GROUP).cast::<i32>().read_unaligned()
            };
            let a = _mm512_set1_epi32(a);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
    }
    sums
}
