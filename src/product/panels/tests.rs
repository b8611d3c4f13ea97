//! Every level and format against the plain sum: bit for bit in integers, within the rounding of its
//! additions in f32 and bf16.

use super::*;
use crate::cpu::contracts::panel_product::INT16_LEFT;
use crate::cpu::contracts::{
    Format, GROUP, INT16_MATRIX, Int8Run, LANES, Panel, PanelProduct, RUN, Rows, Transpose,
    VECTORS, bf16_bits,
};
use crate::cpu::{Level, runnable};
use proptest::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// What one addition of f32 may be off by, relative to the magnitudes added so far: a unit in the
/// last place, because Arm's `bfmmla` rounds to odd. All others round to nearest, which is half of
/// it. Products of two bf16 are exact, and those of f32 round once.
const ADDITION: f64 = f32::EPSILON as f64;

/// Every format that this machine multiplies, on every level.
fn products() -> impl Iterator<Item = (Level, &'static PanelProduct)> {
    let formats = [Format::F32, Format::Bf16, Format::Int8, Format::Int16];
    let of_level = move |level: Level| {
        formats.into_iter().filter_map(move |format| Some((level, level.panels(format)?)))
    };
    runnable().into_iter().flat_map(of_level)
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

    /// Up to a magnitude, the extremes more often.
    fn word(&mut self, most: i16) -> i16 {
        match self.next() % 8 {
            0 => most,
            1 => -most,
            _ => (self.next() % (2 * most as u32 + 1)) as i16 - most,
        }
    }
}

/// The bf16 next to `x`.
fn round(x: f32) -> f32 {
    f32::from_bits(u32::from(bf16_bits(x)) << 16)
}

/// An element in the bytes of a format.
fn bytes(format: Format, x: f32) -> Vec<u8> {
    match format {
        Format::F32 => x.to_ne_bytes().to_vec(),
        Format::Bf16 => bf16_bits(x).to_ne_bytes().to_vec(),
        Format::Int8 => vec![x as i32 as u8],
        Format::Int16 => (x as i16).to_ne_bytes().to_vec(),
    }
}

/// Bytes that end where their memory ends; whole words of them are aligned.
struct Exact {
    words: Box<[u32]>,
    skipped: usize,
}

impl Exact {
    fn new(bytes: &[u8]) -> Self {
        let skipped = bytes.len().next_multiple_of(4) - bytes.len();
        let padded = [&[0; 3][..skipped], bytes].concat();
        let words = padded.as_chunks::<4>().0.iter().map(|&word| u32::from_ne_bytes(word));
        Self { words: words.collect(), skipped }
    }

    fn as_ptr(&self) -> *const u8 {
        self.words.as_ptr().cast::<u8>().wrapping_add(self.skipped)
    }
}

/// One panel, laid out here; what lies between the rows of sums must stay as it is.
fn check_panel(
    (level, product): (Level, &PanelProduct),
    (rows, vectors, groups): (usize, usize, usize),
    add: bool,
    seed: u64,
) {
    let mut random = Random(seed);
    let (format, group, width) = (product.format, product.group, vectors * LANES);
    let keys = groups * group;
    let mut draw = |signed: bool| match (format, signed) {
        (Format::Int8, true) => f32::from(random.byte() as i8),
        (Format::Int8, false) => f32::from(random.byte()),
        (Format::Int16, true) => f32::from(random.word(INT16_MATRIX)),
        (Format::Int16, false) => f32::from(random.word(INT16_LEFT)),
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
        value_bytes.extend(stored.iter().map(|byte| byte.wrapping_add(product.bias)));
    }
    let (prob_bytes, value_bytes) = (Exact::new(&prob_bytes), Exact::new(&value_bytes));
    let runs = int8_runs(&probs, keys);
    let of_row = keys.div_ceil(RUN);
    let row_scales: Vec<f32> = (0..rows * of_row).map(|i| (i + 1) as f32 / 4096.0).collect();
    let column_scales: Vec<f32> = (0..of_row * width).map(|i| (i + 7) as f32 / 999.0).collect();
    let poison = f32::from_bits(0x7fc0_dead);
    let mut sums: Vec<f32> = Vec::new();
    for row in starts.chunks(width) {
        sums.extend(row);
        sums.push(poison);
    }
    sums.pop();
    let out = sums.as_mut_ptr();
    let panel = Panel {
        rows,
        vectors,
        groups,
        lhs: prob_bytes.as_ptr(),
        lhs_stride: probs_stride,
        matrix: value_bytes.as_ptr(),
        matrix_stride: width * group * format.size(),
        runs: runs.as_ptr(),
        runs_stride: of_row,
        row_scales: row_scales.as_ptr(),
        row_scales_stride: of_row,
        row_scales_step: 1,
        column_scales: column_scales.as_ptr(),
        column_scales_stride: width,
        sums: out,
        sums_stride: width + 1,
        start: if add { out } else { std::ptr::null() },
        start_stride: width + 1,
    };
    // SAFETY: the buffers were laid out for this panel.
    unsafe { level.multiply(format, panel) };

    for (i, row) in sums.chunks(width + 1).enumerate() {
        let probs = &probs[i * keys..][..keys];
        let runs = &runs[i * keys.div_ceil(RUN)..];
        for (c, &found) in row[..width].iter().enumerate() {
            let start = if add { starts[i * width + c] } else { 0.0 };
            let value = |j: usize| values[j * width + c];
            let what = (product.name, format, rows, vectors, groups, i, c);
            if format == Format::Int8 {
                let column_scale = |run: usize| column_scales[run * width + c];
                let expected = int8_sum(start, probs, value, runs, column_scale);
                assert_eq!(found.to_bits(), expected.to_bits(), "{what:?}");
            } else if format == Format::Int16 {
                let row_scales = &row_scales[i * of_row..];
                let column_scale = |run: usize| column_scales[run * width + c];
                let expected = int16_sum(start, probs, value, row_scales, column_scale);
                assert_eq!(found.to_bits(), expected.to_bits(), "{what:?}");
            } else {
                let term = |j: usize| f64::from(probs[j]) * f64::from(value(j));
                let expected = f64::from(start) + (0..keys).map(term).sum::<f64>();
                let magnitude = 1.0 + (0..keys).map(|j| term(j).abs()).sum::<f64>();
                let bound = ADDITION * (keys + 1) as f64 * magnitude;
                assert!((f64::from(found) - expected).abs() <= bound, "{what:?}: {found}");
            }
        }
        let apart = &row[width..];
        assert!(apart.iter().all(|x| x.to_bits() == poison.to_bits()), "{product:?}");
    }
}

/// What codes stand for, in rows of `keys`: any scales, and the sums of the codes.
fn int8_runs(codes: &[f32], keys: usize) -> Vec<Int8Run> {
    let run = |(i, codes): (usize, &[f32])| Int8Run {
        scale: (i + 1) as f32 / 65536.0,
        codes: codes.iter().map(|&code| code as u32).sum(),
    };
    codes.chunks(keys.max(1)).flat_map(|row| row.chunks(RUN)).enumerate().map(run).collect()
}

/// [`int16_sum`] with the scales of runs.
fn int8_sum(
    start: f32,
    codes: &[f32],
    value: impl Fn(usize) -> f32,
    runs: &[Int8Run],
    column_scale: impl Fn(usize) -> f32,
) -> f32 {
    let scales: Vec<f32> = runs.iter().map(|run| run.scale).collect();
    int16_sum(start, codes, value, &scales, column_scale)
}

/// `start` and the exact sum of each run, rounded, times the scales of row and column, each step rounded.
fn int16_sum(
    start: f32,
    left: &[f32],
    value: impl Fn(usize) -> f32,
    row_scales: &[f32],
    column_scale: impl Fn(usize) -> f32,
) -> f32 {
    let mut sum = start;
    for ((i, left), row_scale) in left.chunks(RUN).enumerate().zip(row_scales) {
        let term = |(j, &x): (usize, &f32)| x as i64 * value(i * RUN + j) as i64;
        let exact: i64 = left.iter().enumerate().map(term).sum();
        sum += i32::try_from(exact).expect("in bounds") as f32 * row_scale * column_scale(i);
    }
    sum
}

/// Whole runs of the largest magnitudes, which all have the sign that makes the sum as large as can be, and
/// as small.
#[test]
fn no_int16_sum_overflows() {
    for level in runnable() {
        let product = level.panels(Format::Int16).expect("on every level");
        for (left, right) in [(1, 1), (1, -1), (-1, 1), (-1, -1)] {
            let depth = 3 * RUN;
            let left = INT16_LEFT * left;
            let words = vec![left; depth];
            let matrix = vec![INT16_MATRIX * right; depth * LANES];
            let (row_scales, column_scales) = ([1f32; 3], [1f32; LANES]);
            let mut sums = [0f32; LANES];
            let panel = Panel {
                rows: 1,
                vectors: 1,
                groups: depth / product.group,
                lhs: words.as_ptr().cast(),
                lhs_stride: 2 * depth,
                matrix: matrix.as_ptr().cast(),
                matrix_stride: 2 * LANES * product.group,
                runs: std::ptr::null(),
                runs_stride: 0,
                row_scales: row_scales.as_ptr(),
                row_scales_stride: 3,
                row_scales_step: 1,
                column_scales: column_scales.as_ptr(),
                column_scales_stride: 0,
                sums: sums.as_mut_ptr(),
                sums_stride: LANES,
                start: std::ptr::null(),
                start_stride: 0,
            };
            // SAFETY: the buffers were laid out for this panel.
            unsafe { level.multiply(Format::Int16, panel) };
            let of_run = RUN as i32 * i32::from(left) * i32::from(INT16_MATRIX * right);
            assert_eq!(sums, [of_run as f32 + of_run as f32 + of_run as f32; LANES], "{level:?}");
        }
    }
}

#[test]
fn every_kernel_sums_its_panel_and_touches_nothing_else() {
    for (level, product) in products() {
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 11, 13, 48] {
            for vectors in 1..=VECTORS {
                for groups in [1, 2, 5, 33] {
                    let seed = (rows * 100 + vectors * 10 + groups) as u64;
                    check_panel((level, product), (rows, vectors, groups), true, seed);
                    if product.format == Format::F32 {
                        check_panel((level, product), (rows, vectors, groups), false, seed);
                    }
                }
            }
        }
    }
}

/// Row-major probabilities in the format of a kernel, rows filled up with zeros.
struct Probs {
    floats: Vec<f32>,
    halves: Vec<u16>,
    codes: Vec<u8>,
    words: Vec<i16>,
    stride: usize,
}

impl Probs {
    fn new(rows: usize, keys: usize, mut draw: impl FnMut() -> u8) -> Self {
        let stride = keys.max(1).next_multiple_of(GROUP);
        let mut codes = vec![0u8; rows * stride];
        for row in codes.chunks_mut(stride) {
            row[..keys].fill_with(&mut draw);
        }
        let floats: Vec<f32> = codes.iter().map(|&code| f32::from(code) / 256.0).collect();
        let halves = floats.iter().map(|&p| bf16_bits(p)).collect();
        let words = codes.iter().map(|&code| i16::from(code) * 16).collect();
        Self { floats, halves, codes, words, stride }
    }

    /// What the words of `keys` in every row stand for, run by run: any scales.
    fn scales(&self, keys: &Range<usize>) -> Vec<f32> {
        let count = self.codes.len() / self.stride * keys.len().div_ceil(RUN);
        (0..count).map(|i| (i + 1) as f32 / 65536.0).collect()
    }

    /// What the codes of `keys` in every row stand for.
    fn runs(&self, keys: &Range<usize>) -> Vec<Int8Run> {
        let rows = self.codes.chunks(self.stride).flat_map(|row| &row[keys.clone()]);
        int8_runs(&rows.map(|&code| code.into()).collect::<Vec<f32>>(), keys.len())
    }

    /// Adds the product with some keys to `out`.
    fn accumulate(
        &self,
        values: &PackedMatrix,
        format: Format,
        keys: Range<usize>,
        out: &mut [f32],
    ) {
        let (from, stride) = (keys.start.min(self.codes.len()), self.stride);
        match format {
            Format::F32 => values.accumulate_f32(keys, &self.floats[from..], stride, out),
            Format::Bf16 => values.accumulate_bf16(keys, &self.halves[from..], stride, out),
            Format::Int8 => {
                let runs = self.runs(&keys);
                values.accumulate_int8(keys, &self.codes[from..], stride, &runs, out);
            }
            Format::Int16 => {
                let scales = self.scales(&keys);
                values.accumulate_int16(keys, &self.words[from..], stride, &scales, out);
            }
        }
    }
}

/// Packed values from `put` in blocks.
fn pack(level: Level, format: Format, values: &[f32], keys: usize, depth: usize) -> PackedMatrix {
    const BLOCK: usize = RUN;
    let mut packed = PackedMatrix::new(level, format, keys, depth);
    for (i, block) in values.chunks(BLOCK * depth).enumerate() {
        packed.put(i * BLOCK, block);
    }
    packed
}

/// Every kernel, packing included, against the plain sum.
fn check(rows: usize, keys: usize, depth: usize, seed: u64) {
    let mut random = Random(seed);
    let probs = Probs::new(rows, keys, || random.byte());
    // No row is so much larger than another that it would be kept beside.
    let mut value = || {
        let x = random.float();
        round((0.3 + 0.7 * x.abs()).copysign(x))
    };
    let values: Vec<f32> = (0..keys * depth).map(|_| value()).collect();
    // Two tiles, the second shorter than its last group.
    let half = (keys / 2).next_multiple_of(RUN).min(keys);
    let mut tiles = vec![0..half, half..keys];
    tiles.retain(|keys| keys.start.is_multiple_of(RUN));
    let int8 = expected_integers(Format::Int8, &probs, &values, depth, &tiles);
    let int16 = expected_integers(Format::Int16, &probs, &values, depth, &tiles);
    for (level, &PanelProduct { format, .. }) in products() {
        let packed = pack(level, format, &values, keys, depth);
        assert!(packed.exceptions().is_empty());
        let width = packed.width();
        // Sums are added to what is there.
        let mut out = vec![1f32; rows * width];
        for keys in &tiles {
            probs.accumulate(&packed, format, keys.clone(), &mut out);
        }
        for (i, out) in out.chunks(width).enumerate() {
            for (c, &found) in out[..depth].iter().enumerate() {
                let what = (level, format, rows, keys, depth, i, c);
                if matches!(format, Format::Int8 | Format::Int16) {
                    let all = if format == Format::Int8 { &int8 } else { &int16 };
                    let expected = all[i * depth + c];
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

/// What kernels of an integer format make of sums that start at 1, tile by tile.
fn expected_integers(
    format: Format,
    probs: &Probs,
    values: &[f32],
    depth: usize,
    tiles: &[Range<usize>],
) -> Vec<f32> {
    let rows = probs.codes.len() / probs.stride;
    let mut out = vec![1f32; rows * depth];
    let keys = values.len() / depth;
    let most = if format == Format::Int8 { 127.0 } else { f32::from(INT16_MATRIX) };
    for (i, out) in out.chunks_mut(depth).enumerate() {
        for (c, out) in out.iter_mut().enumerate() {
            let value = |j: usize| values[j * depth + c];
            let scale = |run: usize| {
                let of_run = run * RUN..(run * RUN + RUN).min(keys);
                let largest = of_run.map(|j| value(j).abs()).fold(0f32, f32::max);
                (largest / most).max(f32::MIN_POSITIVE)
            };
            let code = |j: usize| (value(j) * (1.0 / scale(j / RUN))).round_ties_even();
            for tile in tiles.iter().filter(|tile| !tile.is_empty()) {
                let per_row = tile.len().div_ceil(RUN);
                let at = i * probs.stride + tile.start..i * probs.stride + tile.end;
                let (row, scales): (Vec<f32>, Vec<f32>) = match format {
                    Format::Int8 => (
                        probs.codes[at].iter().map(|&code| code.into()).collect(),
                        probs.runs(tile).iter().map(|run| run.scale).collect(),
                    ),
                    _ => (
                        probs.words[at].iter().map(|&word| word.into()).collect(),
                        probs.scales(tile),
                    ),
                };
                let of_tile = |j: usize| code(tile.start + j);
                let of_row: Vec<f32> = match format {
                    Format::Int8 => scales[i * per_row..][..per_row].to_vec(),
                    _ => scales.into_iter().skip(i).step_by(rows).collect(),
                };
                let of_column = |run| scale(tile.start / RUN + run);
                *out = int16_sum(*out, &row, of_tile, &of_row, of_column);
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_kernel_equals_the_sum(
        rows in 0usize..30, keys in 0usize..200, depth in 1usize..150, seed: u64,
    ) {
        check(rows, keys, depth, seed);
    }
}

#[test]
fn every_kernel_on_both_sides_of_every_edge() {
    for rows in [1, 5, 6, 7, 48, 49] {
        for keys in [1, 2, 3, 4, 5, 7, 8, 9, 64, 65] {
            for depth in [1, 15, 16, 17, 31, 33, 48, 50, 63, 64, 65, 80, 128, 130] {
                check(rows, keys, depth, (rows * keys * depth) as u64);
            }
        }
    }
}

#[test]
fn rows_with_nan_or_large_numbers_stand_beside() {
    let (keys, depth) = (19, 3);
    let mut random = Random(1);
    let probs = Probs::new(2, keys, || random.byte() | 1);
    let clean: Vec<f32> = (0..keys * depth).map(|_| random.float()).collect();
    for (level, &PanelProduct { format, .. }) in products() {
        let mut values = clean.clone();
        values[4 * depth] = f32::NAN;
        values[9 * depth + 2] = f32::NEG_INFINITY;
        values[18 * depth + 1] = f32::MAX;
        values[3 * depth + 1] = LARGEST;
        let packed = pack(level, format, &values, keys, depth);
        let found: Vec<usize> = packed.exceptions().iter().map(|(key, _)| *key).collect();
        // To integers the third is an outlier, as it is far larger than the rest.
        let integers = matches!(format, Format::Int8 | Format::Int16);
        let expected = if integers { vec![4, 9, 18, 3] } else { vec![4, 9, 18] };
        assert_eq!(found, expected, "{:?} {format:?}", level);

        let mut out = vec![0f32; 2 * packed.width()];
        probs.accumulate(&packed, format, 0..keys, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "{:?} {format:?}", level);
        // With what they add, a row is there as if it were packed, up to the rounding of the rest.
        let (runs, scales) = (probs.runs(&(0..keys)), probs.scales(&(0..keys)));
        for (i, out) in out.chunks_mut(packed.width()).enumerate() {
            let p = |j: usize| match format {
                Format::Int8 => f32::from(probs.codes[i * probs.stride + j]) * runs[i].scale,
                Format::Int16 => f32::from(probs.words[i * probs.stride + j]) * scales[i],
                _ => probs.floats[i * probs.stride + j],
            };
            for (key, added) in packed.exceptions() {
                out.iter_mut().zip(added).for_each(|(out, x)| *out += p(*key) * x);
            }
            let exact = (0..keys).map(|j| p(j) * values[j * depth]).sum::<f32>();
            assert!(exact.is_nan() && out[0].is_nan(), "{:?} {format:?}", level);
            assert_eq!(out[2], f32::NEG_INFINITY, "{:?} {format:?}", level);
            let exact = (0..keys).map(|j| p(j) * values[j * depth + 1]).sum::<f32>();
            assert!((out[1] / exact - 1.0).abs() < 1e-5, "{:?} {format:?}", level);
        }
    }
}

/// Columns that come as rows, any part of them, on both sides of every edge.
#[test]
fn columns_are_multiplied_as_rows_are() {
    for level in runnable() {
        for (rows, depth, columns) in [
            (1, 1, 1),
            (3, 0, 17),
            (6, 7, 64),
            (7, 33, 65),
            (13, 8, 130),
            (2, 64, 300),
            (48, 5, 15),
        ] {
            let mut random = Random((rows * depth * columns) as u64);
            let matrix: Vec<f32> = (0..columns * depth).map(|_| random.float()).collect();
            let lhs: Vec<f32> = (0..rows * depth).map(|_| random.float()).collect();
            let mut packed = PackedMatrix::new(level, Format::F32, 0, 0);
            packed.reset_columns(depth, columns);
            packed.put_columns(0, Rows::new(&matrix, columns, depth, depth), 2.0);
            let step = packed.panel_width();
            for first in (0..columns).step_by(step) {
                for end in [columns, (first + 1).min(columns)] {
                    let width = (end - first).next_multiple_of(LANES);
                    let start: Vec<f32> = (0..width).map(|_| random.float()).collect();
                    let mut out = vec![MaybeUninit::new(f32::NAN); rows * (width + 3)];
                    let left = (&lhs[..], depth, rows);
                    packed.multiply(first..end, left, Start::Row(&start), (&mut out, width + 3));
                    for (i, out) in out.chunks(width + 3).enumerate() {
                        for (c, out) in out[..end - first].iter().enumerate() {
                            // SAFETY: initialized above.
                            let found = f64::from(unsafe { out.assume_init() });
                            let row = &matrix[(first + c) * depth..][..depth];
                            let terms = row.iter().zip(&lhs[i * depth..]);
                            let sum: f64 =
                                terms.map(|(x, y)| 2.0 * f64::from(*x) * f64::from(*y)).sum();
                            let off = (found - sum - f64::from(start[c])).abs();
                            assert!(off < 1e-4, "{level:?} {depth} {columns} {i} {c}: {off}");
                        }
                    }
                }
            }
        }
    }
}

/// Rows any distance apart become columns, and nothing else is touched.
#[test]
fn rows_become_columns() {
    let special = [f32::INFINITY, 1e-40, -0.0, f32::MAX, f32::NEG_INFINITY];
    for (count, depth) in (1..=34).flat_map(|n| [0, 1, 5, 15, 16, 17, 33, 64].map(|d| (n, d))) {
        let stride = depth + count % 3;
        let mut data: Vec<f32> = (0..count * stride).map(|i| i as f32 + 0.25).collect();
        data.iter_mut().step_by(7).zip(special).for_each(|(to, x)| *to = x);
        let rows = Rows::new(&data, count, depth, stride);
        let places = count.next_multiple_of(LANES);
        let width = places + LANES * (count % 2);
        for level in runnable() {
            let mut columns = vec![[7; 4]; depth * width];
            level.transpose(Transpose { rows, factor: -0.5, columns: &mut columns, width });
            for (k, column) in columns.chunks(width).enumerate() {
                for (i, place) in column.iter().enumerate() {
                    let element = || (rows.row(i.min(count - 1))[k] * -0.5).to_ne_bytes();
                    let expected = if i < places { element() } else { [7; 4] };
                    assert_eq!(*place, expected, "{level:?} {count} {depth} {i} {k}");
                }
            }
        }
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    for x in [1.0, -2.5, 3.0e38, 1e-40, f32::INFINITY, 1.003_906_3, 1.011_718_8, 0.0] {
        assert_eq!(bf16_bits(x), half::bf16::from_f32(x).to_bits(), "{x}");
    }
}
