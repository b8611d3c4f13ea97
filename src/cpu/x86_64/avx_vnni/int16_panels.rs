//! AVX-VNNI, int16: `vpdpwssd` on 256 bits, in both encodings as the int8 product. 6 x 2 accumulators of 8
//! lanes, 2 registers of the matrix, 1 broadcast of the left: 15 of 16 registers.

/// The tile in the encoding of AVX-VNNI.
pub(crate) mod vex {
    use std::arch::x86_64::*;

    int16_panels!(super::super::NAME, "avx2,avxvnni", |sum, x, y| _mm256_dpwssd_avx_epi32(
        sum, x, y
    ));
}

/// The tile in the encoding of AVX-512, for tests.
#[cfg(test)]
pub(crate) mod evex {
    use std::arch::x86_64::*;

    int16_panels!(super::super::EVEX, "avx2,avx512vnni,avx512vl", |sum, x, y| {
        _mm256_dpwssd_epi32(sum, x, y)
    });
}
