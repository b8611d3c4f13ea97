//! Every kernel of the table against the plain sum: bit for bit in int8, within the rounding of
//! its additions in f32 and bf16.

use super::int8::code;
use super::kernel::{KEY_GROUP, LANES, PvPanel, VECTORS};
use super::*;
use proptest::prelude::*;
use std::io::Write;

/// What one addition of f32 may be off by, relative to the magnitudes added so far: a unit in the
/// last place, because Arm's `bfmmla` rounds to odd. All others round to nearest, which is half of
/// it. Products of two bf16 are exact, and those of f32 round once.
const ADDITION: f64 = f32::EPSILON as f64;

/// Every kernel that this machine can run; says aloud, once, which it cannot, for CI to see.
fn runnable() -> Vec<&'static dyn PvKernel> {
    static REPORT: std::sync::Once = std::sync::Once::new();
    let (run, not_run): (Vec<_>, Vec<_>) =
        TABLE.iter().copied().partition(|kernel| kernel.is_available());
    REPORT.call_once(|| {
        // Not `eprintln!`, which the test harness keeps to itself while tests pass.
        let mut stderr = std::io::stderr().lock();
        let lacks = "(this machine lacks its instructions)";
        let mut say = |text: String| writeln!(stderr, "{text}").expect("stderr takes a line");
        run.iter().for_each(|kernel| say(format!("RUN: kernel {}", kernel.name())));
        not_run.iter().for_each(|kernel| say(format!("NOT RUN: kernel {} {lacks}", kernel.name())));
    });
    run
}

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 32) as u32
    }

    /// In [-1, 1), and a bf16.
    fn float(&mut self) -> f32 {
        round((self.next() >> 8) as f32 / (1u32 << 23) as f32 - 1.0)
    }

    /// Any byte, the extremes more often.
    fn byte(&mut self) -> u8 {
        match self.next() % 8 {
            0 => 0,
            1 => 255,
            2 => 127,
            3 => 128,
            _ => self.next() as u8,
        }
    }
}

/// The bf16 next to `x`.
fn round(x: f32) -> f32 {
    f32::from_bits(u32::from(bf16_bits(x)) << 16)
}

/// An element in the bytes of a format.
fn bytes(format: ValueFormat, x: f32) -> Vec<u8> {
    match format {
        ValueFormat::F32 => x.to_ne_bytes().to_vec(),
        ValueFormat::Bf16 => bf16_bits(x).to_ne_bytes().to_vec(),
        ValueFormat::Int8 => vec![x as i32 as u8],
    }
}

/// Bytes as words, which are aligned, and a buffer of exactly this size.
fn words(bytes: &[u8]) -> Box<[u32]> {
    bytes.as_chunks::<4>().0.iter().map(|&word| u32::from_ne_bytes(word)).collect()
}

/// One panel, laid out here; what lies between the rows of sums must stay as it is.
fn check_panel(kernel: &dyn PvKernel, rows: usize, vectors: usize, groups: usize, seed: u64) {
    let mut random = Random(seed);
    let (format, group, width) = (kernel.format(), kernel.group(), vectors * LANES);
    let keys = groups * group;
    let int8 = format == ValueFormat::Int8;
    let mut draw = |signed: bool| match (int8, signed) {
        (true, true) => f32::from(random.byte() as i8),
        (true, false) => f32::from(random.byte()),
        _ => random.float(),
    };
    let probs: Vec<f32> = (0..rows * keys).map(|_| draw(false)).collect();
    let values: Vec<f32> = (0..keys * width).map(|_| draw(true)).collect();
    let starts: Vec<f32> = (0..rows * width).map(|_| draw(true)).collect();

    // Rows of probabilities and of sums are further apart than they are long; the last ends the
    // buffer.
    const APART: [u8; 8] = [0x7f; 8];
    let mut prob_bytes = Vec::new();
    for row in probs.chunks(keys) {
        prob_bytes.extend(row.iter().flat_map(|&p| bytes(format, p)));
        prob_bytes.extend(APART);
    }
    let probs_stride = prob_bytes.len() / rows;
    prob_bytes.truncate(prob_bytes.len() - APART.len());
    let mut value_bytes = Vec::new();
    for i in 0..keys * width {
        let (key, channel) = (i / (group * width) * group + i % group, i / group % width);
        let stored = bytes(format, values[key * width + channel]);
        value_bytes.extend(stored.iter().map(|byte| byte.wrapping_add(kernel.bias())));
    }
    let (probs_words, value_words) = (words(&prob_bytes), words(&value_bytes));
    let poison = 0x7fc0_dead;
    let start = |&x: &f32| if int8 { x as i32 as u32 } else { x.to_bits() };
    let mut sums: Vec<u32> = Vec::new();
    for row in starts.chunks(width) {
        sums.extend(row.iter().map(start));
        sums.push(poison);
    }
    sums.pop();
    let panel = PvPanel {
        rows,
        vectors,
        groups,
        probs: probs_words.as_ptr().cast(),
        probs_stride,
        values: value_words.as_ptr().cast(),
        sums: sums.as_mut_ptr().cast(),
        sums_stride: (width + 1) * 4,
    };
    // SAFETY: the kernel is available, and the buffers were laid out for this panel.
    unsafe { kernel.panel(panel) };

    for (i, row) in sums.chunks(width + 1).enumerate() {
        let probs = &probs[i * keys..][..keys];
        for (c, &found) in row[..width].iter().enumerate() {
            let start = f64::from(starts[i * width + c]);
            let values = values.iter().skip(c).step_by(width);
            let terms = probs.iter().zip(values).map(|(&p, &v)| f64::from(p) * f64::from(v));
            let bias = f64::from(kernel.bias()) * probs.iter().map(|&p| f64::from(p)).sum::<f64>();
            let expected = start + terms.clone().sum::<f64>();
            let what = (kernel.name(), rows, vectors, groups, i, c);
            if int8 {
                // Every step is exact in f64, too.
                assert_eq!(found, (expected + bias) as i64 as u32, "{what:?}");
            } else {
                let magnitude = start.abs() + terms.map(f64::abs).sum::<f64>();
                let bound = ADDITION * (keys + 1) as f64 * magnitude;
                let found = f64::from(f32::from_bits(found));
                assert!((found - expected).abs() <= bound, "{what:?}: {found}, {expected}");
            }
        }
        assert!(row[width..].iter().all(|&word| word == poison), "{}", kernel.name());
    }
}

#[test]
fn every_kernel_adds_to_its_panel_and_nothing_else() {
    for kernel in runnable() {
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 48] {
            for vectors in 1..=VECTORS {
                for groups in [1, 2, 5] {
                    let seed = (rows * 100 + vectors * 10 + groups) as u64;
                    check_panel(kernel, rows, vectors, groups, seed);
                }
            }
        }
    }
}

#[test]
fn the_largest_int8_sums_fit() {
    const KEYS: usize = 1 << 16;
    for kernel in runnable().into_iter().filter(|k| k.format() == ValueFormat::Int8) {
        for value in [127i8, -128] {
            let probs = words(&[255; KEYS]);
            let values = words(&vec![value as u8 ^ kernel.bias(); KEYS * LANES]);
            let mut sums = [0i32; LANES];
            let panel = PvPanel {
                rows: 1,
                vectors: 1,
                groups: KEYS / kernel.group(),
                probs: probs.as_ptr().cast(),
                probs_stride: KEYS,
                values: values.as_ptr().cast(),
                sums: sums.as_mut_ptr().cast(),
                sums_stride: LANES * 4,
            };
            // SAFETY: the kernel is available, and the buffers hold one row and one vector.
            unsafe { kernel.panel(panel) };
            let biased = (KEYS as i64 * 255 * i64::from(kernel.bias())) as i32;
            let expected = KEYS as i32 * 255 * i32::from(value);
            assert_eq!(sums.map(|sum| sum.wrapping_sub(biased)), [expected; LANES]);
        }
    }
}

/// Row-major probabilities in the format of a kernel, rows filled up with zeros.
struct Probs {
    floats: Vec<f32>,
    halves: Vec<u16>,
    codes: Vec<u8>,
    stride: usize,
}

impl Probs {
    fn new(rows: usize, keys: usize, mut draw: impl FnMut() -> u8) -> Self {
        let stride = keys.max(1).next_multiple_of(KEY_GROUP);
        let mut codes = vec![0u8; rows * stride];
        for row in codes.chunks_mut(stride) {
            row[..keys].fill_with(&mut draw);
        }
        let floats: Vec<f32> = codes.iter().map(|&code| f32::from(code) / 256.0).collect();
        let halves = floats.iter().map(|&p| bf16_bits(p)).collect();
        Self { floats, halves, codes, stride }
    }

    /// What the codes of `keys` in every row stand for, in a tile whose codes are all of these.
    fn rows(&self, keys: &std::ops::Range<usize>) -> Vec<Int8Row> {
        let rows = self.codes.chunks(self.stride).enumerate().map(|(i, row)| Int8Row {
            scale: (i + 1) as f32 / 65536.0,
            codes: row[keys.clone()].iter().map(|&code| u32::from(code)).sum(),
        });
        rows.collect()
    }

    /// Adds the product with some keys to `out`.
    fn accumulate(
        &self,
        values: &PackedValues,
        format: ValueFormat,
        keys: std::ops::Range<usize>,
        out: &mut [f32],
    ) {
        let (from, stride) = (keys.start.min(self.codes.len()), self.stride);
        match format {
            ValueFormat::F32 => values.accumulate_f32(keys, &self.floats[from..], stride, out),
            ValueFormat::Bf16 => values.accumulate_bf16(keys, &self.halves[from..], stride, out),
            ValueFormat::Int8 => {
                let rows = self.rows(&keys);
                values.accumulate_int8(keys, &self.codes[from..], stride, &rows, out);
            }
        }
    }
}

/// Packed values from `put` in blocks.
fn pack(kernel: &'static dyn PvKernel, values: &[f32], keys: usize, depth: usize) -> PackedValues {
    const BLOCK: usize = 48;
    let mut packed = PackedValues::new(kernel, keys, depth);
    assert_eq!(packed.needs_ranges(), kernel.format() == ValueFormat::Int8);
    values.chunks(BLOCK * depth).for_each(|block| packed.observe(block));
    for (i, block) in values.chunks(BLOCK * depth).enumerate() {
        packed.put(i * BLOCK, block);
    }
    packed
}

/// Offset and scale of every channel, and the codes, by the definition.
fn int8_reference(values: &[f32], depth: usize) -> (Vec<(f32, f32)>, Vec<i8>) {
    let channel = |c: usize| values.iter().skip(c).step_by(depth).copied();
    let range = |c: usize| {
        let (low, high) = (channel(c).reduce(f32::min)?, channel(c).reduce(f32::max)?);
        Some(((low + high) / 2.0, (high - low) / 254.0))
    };
    let known: Vec<(f32, f32)> = (0..depth).map(|c| range(c).unwrap_or_default()).collect();
    let inverse = |scale: f32| if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let codes = values.iter().enumerate().map(|(i, &x)| {
        let (offset, scale) = known[i % depth];
        let exact = ((x - offset) * inverse(scale)).round_ties_even() as i8;
        assert_eq!(code(x, offset, inverse(scale)), exact);
        exact
    });
    let codes = codes.collect();
    (known, codes)
}

/// Every kernel, packing included, against the plain sum.
fn check(rows: usize, keys: usize, depth: usize, seed: u64) {
    let mut random = Random(seed);
    let probs = Probs::new(rows, keys, || random.byte());
    let values: Vec<f32> = (0..keys * depth).map(|_| random.float()).collect();
    let (known, codes) = int8_reference(&values, depth);
    // Two tiles, the second shorter than its last group.
    let half = (keys / 2).next_multiple_of(KEY_GROUP).min(keys);
    for kernel in runnable() {
        let packed = pack(kernel, &values, keys, depth);
        assert!(packed.exceptions().is_empty());
        let width = packed.width();
        // Sums are added to what is there.
        let mut out = vec![1f32; rows * width];
        let tiles = [0..half, half..keys].into_iter().filter(|keys| keys.start % KEY_GROUP == 0);
        for keys in tiles.clone() {
            probs.accumulate(&packed, kernel.format(), keys, &mut out);
        }
        for (i, out) in out.chunks(width).enumerate() {
            for (c, &found) in out[..depth].iter().enumerate() {
                let what = (kernel.name(), rows, keys, depth, i, c);
                if kernel.format() == ValueFormat::Int8 {
                    let mut expected = 1f32;
                    for keys in tiles.clone() {
                        let row = probs.rows(&keys)[i];
                        let term = |j: usize| {
                            i32::from(probs.codes[i * probs.stride + j])
                                * i32::from(codes[j * depth + c])
                        };
                        let sum = keys.map(term).sum::<i32>() as f32;
                        let (offset, scale) = known[c];
                        let weight = row.scale * row.codes as f32;
                        expected += sum * row.scale * scale + weight * offset;
                    }
                    assert_eq!(found.to_bits(), expected.to_bits(), "{what:?}");
                } else {
                    let term = |j: usize| {
                        f64::from(probs.floats[i * probs.stride + j])
                            * f64::from(values[j * depth + c])
                    };
                    let expected = 1.0 + (0..keys).map(term).sum::<f64>();
                    let magnitude = 1.0 + (0..keys).map(|j| term(j).abs()).sum::<f64>();
                    let bound = ADDITION * (keys + 2) as f64 * magnitude;
                    let found = f64::from(found);
                    assert!((found - expected).abs() <= bound, "{what:?}: {found}, {expected}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_kernel_equals_the_sum(
        rows in 0usize..20, keys in 0usize..70, depth in 1usize..150, seed: u64,
    ) {
        check(rows, keys, depth, seed);
    }
}

#[test]
fn every_kernel_on_both_sides_of_every_edge() {
    for rows in [1, 5, 6, 7, 48, 49] {
        for keys in [1, 2, 3, 4, 5, 7, 8, 9, 64] {
            for depth in [1, 15, 16, 17, 31, 33, 48, 50, 63, 64, 65, 80, 128, 130] {
                check(rows, keys, depth, (rows * keys * depth) as u64);
            }
        }
    }
}

#[test]
fn rows_that_are_not_finite_stand_beside() {
    let (keys, depth) = (19, 3);
    let mut random = Random(1);
    let probs = Probs::new(2, keys, || random.byte() | 1);
    let clean: Vec<f32> = (0..keys * depth).map(|_| random.float()).collect();
    for kernel in runnable() {
        let mut values = clean.clone();
        values[4 * depth] = f32::NAN;
        values[9 * depth + 2] = f32::NEG_INFINITY;
        values[18 * depth + 1] = f32::MAX; // Finite, but not in bf16, and no range for int8.
        let packed = pack(kernel, &values, keys, depth);
        let format = kernel.format();
        let expected = if format == ValueFormat::F32 { vec![4, 9] } else { vec![4, 9, 18] };
        let found: Vec<usize> = packed.exceptions().iter().map(|(key, _)| *key).collect();
        assert_eq!(found, expected, "{}", kernel.name());

        let mut out = vec![0f32; 2 * packed.width()];
        probs.accumulate(&packed, format, 0..keys, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "{}", kernel.name());
        // With what they add, a row is there as if it were packed, up to the rounding of the rest.
        let rows = probs.rows(&(0..keys));
        for (i, out) in out.chunks_mut(packed.width()).enumerate() {
            let p = |j: usize| match format {
                ValueFormat::Int8 => f32::from(probs.codes[i * probs.stride + j]) * rows[i].scale,
                _ => probs.floats[i * probs.stride + j],
            };
            for (key, added) in packed.exceptions() {
                out.iter_mut().zip(added).for_each(|(out, x)| *out += p(*key) * x);
            }
            let exact = (0..keys).map(|j| p(j) * values[j * depth]).sum::<f32>();
            assert!(exact.is_nan() && out[0].is_nan(), "{}", kernel.name());
            assert_eq!(out[2], f32::NEG_INFINITY, "{}", kernel.name());
            let exact = (0..keys).map(|j| p(j) * values[j * depth + 1]).sum::<f32>();
            assert!((out[1] / exact - 1.0).abs() < 1e-5, "{}", kernel.name());
        }
    }
}

#[test]
fn names_are_unique_and_every_machine_has_f32_and_int8() {
    for (i, kernel) in TABLE.iter().enumerate() {
        assert!(TABLE[..i].iter().all(|other| other.name() != kernel.name()), "{}", kernel.name());
    }
    for format in [ValueFormat::F32, ValueFormat::Int8] {
        assert_eq!(select(format).expect("a kernel").format(), format);
        let last = TABLE.iter().rev().find(|kernel| kernel.format() == format);
        assert!(last.expect("a kernel").name().starts_with("portable"));
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    for x in [1.0, -2.5, 3.0e38, 1e-40, f32::INFINITY, 1.003_906_3, 1.011_718_8, 0.0] {
        assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
    }
}
