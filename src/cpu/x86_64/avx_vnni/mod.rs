//! AVX2 with VNNI in its VEX encoding: clients of Intel since Alder Lake. All but the products of
//! int8 and int16 is that of AVX2.

pub(crate) mod int16_panels;
pub(crate) mod int8_product;

pub(crate) const NAME: &str = "x86_64-avx-vnni";
/// The same tile in the other encoding, for tests.
#[cfg(test)]
pub(crate) const EVEX: &str = "x86_64-avx-vnni under test in EVEX encoding";
