//! The one ordered table of levels, and which of its kernels each operation uses.

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use super::aarch64::{dotprod, i8mm, neon};
use super::contracts::{ExpBf16, Int8Product, PanelProduct, RowKernels, Softmax, StoredProduct};
use super::portable;
#[cfg(target_arch = "x86_64")]
use super::x86_64::{avx_vnni, avx2, avx512_vnni, sse2};
use pulp::Arch;

/// What a level is: whether this machine has it, and its kernels, which may be called only then.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: &'static str,
    pub is_available: fn() -> bool,
    /// The vectors of plain loops, on a machine that has the level.
    pub vectors: fn() -> Arch,
    pub int8_product: Int8Product,
    pub float_panels: PanelProduct,
    pub int8_panels: PanelProduct,
    pub int16_panels: PanelProduct,
    pub stored: StoredProduct,
    pub softmax: Softmax,
    pub rows: RowKernels,
    /// What some machines of this level have in addition.
    pub bf16: Option<Bf16>,
}

/// Products of bf16, and the softmax that writes it.
#[derive(Debug)]
pub(super) struct Bf16 {
    pub is_available: fn() -> bool,
    pub panels: PanelProduct,
    pub exp: ExpBf16,
}

/// Every level compiled for this architecture, best first.
pub(super) static TABLE: &[Entry] = &[
    #[cfg(target_arch = "x86_64")]
    Entry {
        name: avx512_vnni::NAME,
        is_available: has_avx512_vnni,
        vectors: widest_x86,
        int8_product: avx512_vnni::int8_product::PRODUCT,
        float_panels: avx512_vnni::float_panels::PANELS,
        int8_panels: avx512_vnni::int8_panels::PANELS,
        int16_panels: avx512_vnni::int16_panels::PANELS,
        stored: avx512_vnni::float_panels::STORED,
        softmax: avx512_vnni::softmax::SOFTMAX,
        rows: avx512_vnni::ROWS,
        bf16: None,
    },
    #[cfg(target_arch = "x86_64")]
    Entry {
        name: avx_vnni::NAME,
        is_available: || has_avx2() && is_x86_feature_detected!("avxvnni"),
        int8_product: avx_vnni::int8_product::vex::PRODUCT,
        int16_panels: avx_vnni::int16_panels::vex::PANELS,
        ..AVX2
    },
    #[cfg(all(target_arch = "x86_64", test))]
    Entry {
        name: avx_vnni::EVEX,
        is_available: has_avx512_vnni,
        int8_product: avx_vnni::int8_product::evex::PRODUCT,
        int16_panels: avx_vnni::int16_panels::evex::PANELS,
        ..AVX2
    },
    #[cfg(target_arch = "x86_64")]
    AVX2,
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Entry {
        name: i8mm::NAME,
        is_available: || has_dotprod() && std::arch::is_aarch64_feature_detected!("i8mm"),
        int8_product: i8mm::int8_product::PRODUCT,
        int8_panels: i8mm::int8_panels::PANELS,
        bf16: Some(Bf16 {
            is_available: || std::arch::is_aarch64_feature_detected!("bf16"),
            panels: i8mm::bf16_panels::PANELS,
            exp: neon::EXP_BF16,
        }),
        ..NEON
    },
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Entry {
        name: dotprod::NAME,
        is_available: has_dotprod,
        int8_product: dotprod::int8_product::PRODUCT,
        int8_panels: dotprod::int8_panels::PANELS,
        ..NEON
    },
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    NEON,
    #[cfg(all(target_arch = "x86_64", test))]
    Entry { name: portable::PLAIN, ..PORTABLE },
    #[cfg(target_arch = "x86_64")]
    Entry {
        int8_product: sse2::int8_product::PRODUCT,
        int16_panels: sse2::int16_panels::PANELS,
        ..PORTABLE
    },
    #[cfg(not(target_arch = "x86_64"))]
    PORTABLE,
];

const PORTABLE: Entry = Entry {
    name: portable::NAME,
    is_available: || true,
    vectors: || Arch::Scalar,
    int8_product: portable::int8_product::PRODUCT,
    float_panels: portable::float_panels::PANELS,
    int8_panels: portable::int8_panels::PANELS,
    int16_panels: portable::int16_panels::PANELS,
    stored: portable::float_panels::STORED,
    softmax: portable::SOFTMAX,
    rows: portable::ROWS,
    bf16: None,
};

#[cfg(target_arch = "x86_64")]
const AVX2: Entry = Entry {
    name: avx2::NAME,
    is_available: has_avx2,
    vectors: avx2_vectors,
    int8_product: avx2::int8_product::PRODUCT,
    float_panels: avx2::float_panels::PANELS,
    int8_panels: avx2::int8_panels::PANELS,
    int16_panels: avx2::int16_panels::PANELS,
    stored: avx2::float_panels::STORED,
    softmax: avx2::softmax::SOFTMAX,
    rows: avx2::rows::ROWS,
    bf16: None,
};

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
const NEON: Entry = Entry {
    name: neon::NAME,
    is_available: || std::arch::is_aarch64_feature_detected!("neon"),
    vectors: Arch::new,
    int8_product: neon::INT8_PRODUCT,
    float_panels: neon::float_panels::PANELS,
    int8_panels: neon::INT8_PANELS,
    int16_panels: neon::INT16_PANELS,
    stored: neon::float_panels::STORED,
    softmax: neon::SOFTMAX,
    rows: neon::ROWS,
    bf16: None,
};

// What leaves enable, and what `pulp` asks for before it uses such vectors.

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    pulp::x86::V3::try_new().is_some() && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn has_avx512_vnni() -> bool {
    has_avx2() && pulp::x86::V4::try_new().is_some() && is_x86_feature_detected!("avx512vnni")
}

#[cfg(target_arch = "x86_64")]
fn avx2_vectors() -> Arch {
    pulp::x86::V3::try_new().map_or(Arch::Scalar, Arch::V3)
}

#[cfg(target_arch = "x86_64")]
fn widest_x86() -> Arch {
    pulp::x86::V4::try_new().map_or_else(avx2_vectors, Arch::V4)
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
fn has_dotprod() -> bool {
    (NEON.is_available)() && std::arch::is_aarch64_feature_detected!("dotprod")
}
