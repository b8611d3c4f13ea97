//! Probabilities times row-major values for few queries, `[R, N] x [N, Dv] -> [R, Dv]` in f32.
//!
//! A decode step reads every value once and waits for memory, so values stay as small as they are
//! stored and are widened in registers, once for up to four rows of probabilities.
//!
//! `portable` is plain Rust, the other files are one instruction set each.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::sync::OnceLock;

/// Rows of a job, at most.
const ROWS: usize = 4;

/// How values are stored: f32 as the machine has it, the others little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    /// Finite numbers only.
    F16,
    Bf16,
    /// Codes; their scales are in the probabilities.
    Int8,
}

impl Format {
    /// Bytes of an element.
    const fn size(self) -> usize {
        match self {
            Format::F32 => 4,
            Format::F16 | Format::Bf16 => 2,
            Format::Int8 => 1,
        }
    }
}

/// What a kernel multiplies.
#[derive(Clone, Copy)]
struct Job {
    /// `keys * dim` elements of the format, row-major.
    values: *const u8,
    keys: usize,
    dim: usize,
    /// `keys` probabilities in each row; rows are `stride` elements apart.
    probs: *const f32,
    stride: usize,
    /// `1..=ROWS`.
    rows: usize,
    /// `rows * dim` sums, row-major, which are added to.
    sums: *mut f32,
}

/// One instruction set's way to multiply.
///
/// # Safety
/// Implementors promise that `product` touches nothing but what [`Job`] names, and that
/// `is_available` is true only where their instructions exist.
unsafe trait ProductKernel: Sync {
    /// Name in test reports.
    #[cfg(test)]
    fn name(&self) -> &'static str;

    /// Whether this machine has the instructions.
    fn is_available(&self) -> bool;

    /// `sums[r, c] += sum_j probs[r, j] * values[j, c]`.
    ///
    /// # Safety
    /// The kernel is available, and the pointers of `job` are valid for what is named there.
    unsafe fn product(&self, format: Format, job: Job);
}

/// Every kernel compiled for this architecture, best first.
static TABLE: &[&dyn ProductKernel] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512::Avx512,
    #[cfg(target_arch = "x86_64")]
    &avx2::Avx2,
    &portable::Portable,
];

fn best() -> &'static dyn ProductKernel {
    static BEST: OnceLock<&'static dyn ProductKernel> = OnceLock::new();
    *BEST.get_or_init(|| {
        let best = TABLE.iter().find(|kernel| kernel.is_available());
        *best.expect("the portable kernel is always available")
    })
}

/// `sums[r, c] += sum_j probs[r, j] * values[j, c]`: `values` `[N, dim]`, `sums` `[R, dim]`, rows of
/// `probs` `stride` elements apart.
pub(super) fn product(
    format: Format,
    values: &[u8],
    dim: usize,
    probs: &[f32],
    stride: usize,
    sums: &mut [f32],
) {
    product_with(best(), format, values, dim, probs, stride, sums);
}

/// [`product`] with values in f32.
pub(super) fn product_f32(
    values: &[f32],
    dim: usize,
    probs: &[f32],
    stride: usize,
    sums: &mut [f32],
) {
    // SAFETY: the same memory, read as bytes.
    let bytes =
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    product(Format::F32, bytes, dim, probs, stride, sums);
}

fn product_with(
    kernel: &dyn ProductKernel,
    format: Format,
    values: &[u8],
    dim: usize,
    probs: &[f32],
    stride: usize,
    sums: &mut [f32],
) {
    let width = dim * format.size();
    if width == 0 || sums.is_empty() {
        return;
    }
    let (keys, rows) = (values.len() / width, sums.len() / dim);
    assert!(kernel.is_available() && values.len() == keys * width && sums.len() == rows * dim);
    assert!(stride >= keys && probs.len() >= (rows - 1) * stride + keys);
    for first in (0..rows).step_by(ROWS) {
        let job = Job {
            values: values.as_ptr(),
            keys,
            dim,
            probs: probs[first * stride..].as_ptr(),
            stride,
            rows: ROWS.min(rows - first),
            sums: sums[first * dim..].as_mut_ptr(),
        };
        // SAFETY: the kernel is available. There are `keys` rows of `dim` values, as many
        // probabilities in each row and whole rows of sums, as just asserted.
        unsafe { kernel.product(format, job) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use std::io::Write;

    /// Every kernel that this machine can run; says aloud, once, which it cannot.
    fn runnable() -> Vec<&'static dyn ProductKernel> {
        static REPORT: std::sync::Once = std::sync::Once::new();
        let (run, not_run): (Vec<_>, Vec<_>) =
            TABLE.iter().copied().partition(|kernel| kernel.is_available());
        REPORT.call_once(|| {
            for kernel in not_run {
                // Not `eprintln!`, which the test harness keeps to itself while tests pass.
                let text = format!("NOT RUN: kernel {} (no instructions for it)\n", kernel.name());
                std::io::stderr().write_all(text.as_bytes()).expect("stderr takes a line");
            }
        });
        run
    }

    fn stored(format: Format, x: f32) -> (Vec<u8>, f64) {
        match format {
            Format::F32 => (x.to_le_bytes().to_vec(), f64::from(x)),
            Format::F16 => (f16::from_f32(x).to_le_bytes().to_vec(), f16::from_f32(x).to_f64()),
            Format::Bf16 => (bf16::from_f32(x).to_le_bytes().to_vec(), bf16::from_f32(x).to_f64()),
            Format::Int8 => (vec![(x * 127.0) as i8 as u8], f64::from((x * 127.0) as i8)),
        }
    }

    #[test]
    fn every_kernel_equals_the_sum() {
        let number = |i: usize| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.99;
        for format in [Format::F32, Format::F16, Format::Bf16, Format::Int8] {
            for dim in [1, 7, 8, 15, 16, 17, 40, 63, 64, 65, 128, 144] {
                for (rows, keys) in [(1, 0), (1, 1), (2, 5), (3, 64), (4, 17), (5, 33), (9, 16)] {
                    let values: Vec<_> =
                        (0..keys * dim).map(|i| stored(format, number(i))).collect();
                    let bytes =
                        values.iter().flat_map(|(bytes, _)| bytes.clone()).collect::<Vec<_>>();
                    let stride = keys + 3;
                    let probs: Vec<f32> = (0..rows * stride).map(|i| number(i + 31)).collect();
                    for kernel in runnable() {
                        let mut sums = vec![1f32; rows * dim];
                        product_with(kernel, format, &bytes, dim, &probs, stride, &mut sums);
                        for (i, &sum) in sums.iter().enumerate() {
                            let (r, c) = (i / dim, i % dim);
                            let p = |j: usize| f64::from(probs[r * stride + j]);
                            let terms = (0..keys).map(|j| p(j) * values[j * dim + c].1);
                            let size = (0..keys).map(|j| (p(j) * values[j * dim + c].1).abs());
                            let expected = 1.0 + terms.sum::<f64>();
                            // f32 sums: a rounding for every term.
                            let bound = (1.0 + size.sum::<f64>())
                                * (keys + 1) as f64
                                * f64::from(f32::EPSILON);
                            let error = (f64::from(sum) - expected).abs();
                            let what = (kernel.name(), format, dim, rows, keys, i);
                            assert!(error <= bound, "{what:?}: {sum} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_number_of_two_bytes_is_read() {
        for format in [Format::F16, Format::Bf16] {
            let exact = |bits: u16| match format {
                Format::F16 => f16::from_bits(bits).to_f32(),
                _ => bf16::from_bits(bits).to_f32(),
            };
            let all: Vec<u16> = (0..=u16::MAX).filter(|&bits| exact(bits).is_finite()).collect();
            let bytes: Vec<u8> = all.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            for kernel in runnable() {
                let mut sums = vec![0f32; all.len()];
                product_with(kernel, format, &bytes, all.len(), &[1.0], 1, &mut sums);
                for (&bits, &found) in all.iter().zip(&sums) {
                    assert_eq!(found, exact(bits), "{} {format:?} {bits:#x}", kernel.name());
                }
            }
        }
    }
}
