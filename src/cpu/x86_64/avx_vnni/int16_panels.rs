//! AVX-VNNI, int16: `vpdpwssd` on 256 bits, in both encodings as the int8 product. 6 x 2 accumulators of 8
//! lanes, 2 registers of the matrix, 1 broadcast of the left: 15 of 16 registers.

/// The tile in the encoding of AVX-VNNI.
pub(crate) mod vex {
    use crate::cpu::contracts::panel_product::ROWS;
    use std::arch::asm;
    use std::arch::x86_64::*;

    int16_panels! {
        name: super::super::NAME,
        features: "avx2,avxvnni",
        rows: ROWS,
        integers: __m256i, _mm256_loadu_si256, _mm256_set1_epi32,
        pairs: |sum, x, y| dpwssd(sum, x, y),
        convert: _mm256_cvtepi32_ps,
        floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps,
    }

    /// Of the intrinsic LLVM makes `vpmaddwd` and `vpaddd` in most places, whose sums wait a cycle each for
    /// the last where those of the one instruction wait five; but twelve sums do not wait for each other,
    /// and two instructions take more of the ports than one.
    #[target_feature(enable = "avx2,avxvnni")]
    #[inline]
    fn dpwssd(mut sum: __m256i, x: __m256i, y: __m256i) -> __m256i {
        // SAFETY: the instruction is enabled above and touches registers only.
        unsafe {
            asm!(
                "{{vex}} vpdpwssd {sum}, {x}, {y}",
                sum = inout(ymm_reg) sum,
                x = in(ymm_reg) x,
                y = in(ymm_reg) y,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sum
    }
}

/// The tile in the encoding of AVX-512, for tests.
#[cfg(test)]
pub(crate) mod evex {
    use crate::cpu::contracts::panel_product::ROWS;
    use std::arch::x86_64::*;

    int16_panels! {
        name: super::super::EVEX,
        features: "avx2,avx512vnni,avx512vl",
        rows: ROWS,
        integers: __m256i, _mm256_loadu_si256, _mm256_set1_epi32,
        pairs: |sum, x, y| _mm256_dpwssd_epi32(sum, x, y),
        convert: _mm256_cvtepi32_ps,
        floats: _mm256_loadu_ps, _mm256_set1_ps, _mm256_mul_ps, _mm256_add_ps, _mm256_storeu_ps,
    }
}
