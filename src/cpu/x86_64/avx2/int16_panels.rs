//! AVX2, int16: `vpmaddwd` multiplies sixteen elements and adds pairs of products, `vpaddd` adds those up.
//! 6 x 2 accumulators of 8 lanes; a product, a broadcast of the left side and 2 registers of the matrix
//! make 16 of 16.

use std::arch::x86_64::*;

int16_panels!(super::NAME, "avx2", |sum, x, y| _mm256_add_epi32(sum, _mm256_madd_epi16(x, y)));
