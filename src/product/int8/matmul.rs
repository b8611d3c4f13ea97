//! The whole product for plain slices.

use super::pack::{PackedLhs, PackedRhs, RowSums};
use super::tiles::int_tiles;
use crate::cpu::Level;
use crate::memory::{check_size, written};
use crate::parallel::Work;
use crate::{Error, Result};
use std::mem::MaybeUninit;

/// Rows of the left side that one task takes.
const ROW_BLOCK: usize = 48;

/// The left side, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Lhs<'a> {
    /// Signed codes.
    I8(&'a [i8]),
    /// Unsigned codes.
    U8(&'a [u8]),
}

/// The right side, row-major `[N, D]`: the product is with its transpose.
pub type Rhs<'a> = &'a [i8];

/// The zero point of each row of an operand.
#[derive(Debug, Clone, Copy, Default)]
pub enum ZeroPoints<'a> {
    /// Symmetric: no correction.
    #[default]
    Zero,
    /// One for all rows.
    Uniform(i32),
    /// One a row.
    PerRow(&'a [i32]),
}

impl ZeroPoints<'_> {
    fn is_zero(&self) -> bool {
        match self {
            ZeroPoints::Zero | ZeroPoints::Uniform(0) => true,
            ZeroPoints::Uniform(_) => false,
            ZeroPoints::PerRow(zeros) => zeros.iter().all(|&zero| zero == 0),
        }
    }

    /// Whether there is one for each of `rows`, each within `allowed`.
    fn check(
        &self,
        rows: usize,
        tensor: &'static str,
        allowed: std::ops::RangeInclusive<i32>,
    ) -> Result<()> {
        let zeros = match self {
            ZeroPoints::Zero => &[],
            ZeroPoints::Uniform(zero) => std::slice::from_ref(zero),
            ZeroPoints::PerRow(zeros) => *zeros,
        };
        if matches!(self, ZeroPoints::PerRow(_)) && zeros.len() != rows {
            let expected = format!("one for each of {rows} rows");
            return Err(Error::shape("matmul_nt", tensor, &[zeros.len()], expected));
        }
        match zeros.iter().find(|zero| !allowed.contains(zero)) {
            Some(zero) => Err(Error::QuantParams(format!(
                "{tensor} holds {zero}, expected {}..={}",
                allowed.start(),
                allowed.end()
            ))),
            None => Ok(()),
        }
    }

    /// One for each of `rows`.
    fn expand(&self, rows: usize) -> Vec<i32> {
        match *self {
            ZeroPoints::Zero => vec![0; rows],
            ZeroPoints::Uniform(zero) => vec![zero; rows],
            ZeroPoints::PerRow(zeros) => zeros.to_vec(),
        }
    }
}

/// The largest depth whose sums fit an i32: 65793 for `sum a*b` alone (`D * 255 * 128`), 33025
/// with zero points (`D * 255 * 255`).
pub const fn max_depth(with_zero_points: bool) -> usize {
    let largest_product = if with_zero_points { 255 * 255 } else { 255 * 128 };
    i32::MAX as usize / largest_product
}

/// # Errors
/// [`Error::Depth`] beyond [`max_depth`].
pub(crate) fn check_depth(depth: usize, with_zero_points: bool) -> Result<()> {
    let limit = max_depth(with_zero_points);
    if depth > limit { Err(Error::Depth { depth, limit }) } else { Ok(()) }
}

/// `out[m, n] = sum_d (lhs[m, d] - lhs_zero[m]) * (rhs[n, d] - rhs_zero[n])`, exact, row-major
/// `[M, N]`, on rayon's global pool. `M`, `N` and `D` may be 0.
///
/// ```
/// use candle_int8_attention::product::{Lhs, ZeroPoints, matmul_nt};
/// // [[1, 2], [3, 4]] times the transpose of [[5, 6]], the left side shifted by 1.
/// let out = matmul_nt(
///     Lhs::U8(&[1, 2, 3, 4]),
///     ZeroPoints::Uniform(1),
///     &[5, 6],
///     ZeroPoints::Zero,
///     (2, 1, 2), // M, N, D
/// )?;
/// assert_eq!(out, [6, 28]);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] if a slice's length is not what `(M, N, D)` says, or `[M, D]`, `[N, D]` or the result
/// `[M, N]` is larger than the address space, [`Error::Depth`] beyond
/// [`max_depth`], [`Error::QuantParams`] for a zero point that is not a code of its side,
/// [`Error::Level`] if [`LEVEL_VARIABLE`](crate::cpu::LEVEL_VARIABLE) names a level that cannot be used.
pub fn matmul_nt(
    lhs: Lhs<'_>,
    lhs_zeros: ZeroPoints<'_>,
    rhs: Rhs<'_>,
    rhs_zeros: ZeroPoints<'_>,
    (m, n, depth): (usize, usize, usize),
) -> Result<Vec<i32>> {
    matmul_nt_with(Level::active()?, lhs, lhs_zeros, rhs, rhs_zeros, (m, n, depth))
}

pub(super) fn matmul_nt_with(
    level: Level,
    lhs: Lhs<'_>,
    lhs_zeros: ZeroPoints<'_>,
    rhs: Rhs<'_>,
    rhs_zeros: ZeroPoints<'_>,
    (m, n, depth): (usize, usize, usize),
) -> Result<Vec<i32>> {
    for (tensor, shape) in [("lhs", [m, depth]), ("rhs", [n, depth]), ("out", [m, n])] {
        check_size("matmul_nt", tensor, &shape)?;
    }
    let lhs_len = match lhs {
        Lhs::I8(lhs) => lhs.len(),
        Lhs::U8(lhs) => lhs.len(),
    };
    check_len("lhs", lhs_len, m, depth)?;
    check_len("rhs", rhs.len(), n, depth)?;
    check_depth(depth, !lhs_zeros.is_zero() || !rhs_zeros.is_zero())?;
    let of_lhs = if let Lhs::I8(_) = lhs { -128..=127 } else { 0..=255 };
    lhs_zeros.check(m, "lhs_zeros", of_lhs)?;
    rhs_zeros.check(n, "rhs_zeros", -128..=127)?;
    let len = m * n;
    if len == 0 {
        return Ok(Vec::new());
    }

    // Unsigned codes are signed ones shifted by 128, zero points included.
    let (signed, shift);
    let (lhs, lhs_zeros) = match lhs {
        Lhs::I8(lhs) => (lhs, lhs_zeros.expand(m)),
        Lhs::U8(lhs) => {
            shift = lhs_zeros.expand(m);
            signed = lhs.iter().map(|&a| (a ^ 0x80) as i8).collect::<Vec<_>>();
            (signed.as_slice(), shift.iter().map(|zero| zero - 128).collect())
        }
    };
    let rhs_zeros = rhs_zeros.expand(n);

    let corrected = lhs_zeros.iter().chain(&rhs_zeros).any(|&zero| zero != 0);
    let mut keys = PackedRhs::new(level, n, depth, corrected);
    keys.put(0, rhs, RowSums { sums: &row_sums(rhs, n, depth), zeros: &rhs_zeros });

    let block = |(index, out): (usize, &mut [MaybeUninit<i32>])| {
        let rows = index * ROW_BLOCK..(index * ROW_BLOCK + out.len() / n);
        let codes = &lhs[rows.start * depth..rows.end * depth];
        let mut packed = PackedLhs::new(level);
        let sums = row_sums(codes, rows.len(), depth);
        let zeros = RowSums { sums: &sums, zeros: &lhs_zeros[rows.clone()] };
        packed.put(codes, rows.len(), depth, corrected.then_some(zeros));
        int_tiles(&packed, &keys, out, n);
    };
    let work = Work { int8_macs: len.saturating_mul(depth), elements: len, ..Work::default() };
    let all = |out: &mut [MaybeUninit<i32>]| {
        work.for_each(out.chunks_mut(ROW_BLOCK * n).enumerate().collect(), block);
    };
    // SAFETY: `len` is M * N, checked not to overflow. The blocks of whole rows cover all of it, and
    // `int_tiles` writes every sum of a block.
    Ok(unsafe { written(len, all) })
}

fn check_len(tensor: &'static str, len: usize, rows: usize, depth: usize) -> Result<()> {
    if rows.checked_mul(depth) == Some(len) {
        return Ok(());
    }
    Err(Error::shape("matmul_nt", tensor, &[len], format!("{rows} rows of {depth}")))
}

fn row_sums(codes: &[i8], rows: usize, depth: usize) -> Vec<i32> {
    let sum = |row: usize| {
        let codes = &codes[row * depth..(row + 1) * depth];
        codes.iter().fold(0i32, |sum, &q| sum + i32::from(q))
    };
    (0..rows).map(sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;
    use crate::product::int_product;
    use proptest::prelude::*;

    struct Case {
        lhs: Vec<i16>,
        unsigned: bool,
        lhs_zeros: Vec<i32>,
        rhs: Vec<i8>,
        rhs_zeros: Vec<i32>,
        dims: (usize, usize, usize),
    }

    impl Case {
        fn run(&self, level: Level) -> Result<Vec<i32>> {
            let (as_u8, as_i8): (Vec<u8>, Vec<i8>) =
                self.lhs.iter().map(|&a| (a as u8, a as i8)).unzip();
            let lhs = if self.unsigned { Lhs::U8(&as_u8) } else { Lhs::I8(&as_i8) };
            let (za, zb) =
                (ZeroPoints::PerRow(&self.lhs_zeros), ZeroPoints::PerRow(&self.rhs_zeros));
            matmul_nt_with(level, lhs, za, &self.rhs, zb, self.dims)
        }

        /// Compares every level with the triple loop.
        fn check(&self) {
            let (m, n, depth) = self.dims;
            let (za, zb) = (|i: usize| self.lhs_zeros[i], |j: usize| self.rhs_zeros[j]);
            let expected = int_product(&self.lhs, &self.rhs, depth, (m, n), za, zb);
            for level in runnable() {
                let out = self.run(level).unwrap();
                let differs = out.iter().zip(&expected).position(|(&a, &b)| i64::from(a) != b);
                assert_eq!(out.len(), expected.len(), "{:?} {:?}", level, self.dims);
                assert_eq!(differs, None, "{:?} {:?} u8={}", level, self.dims, self.unsigned);
            }
        }
    }

    fn case(dims: (usize, usize, usize), unsigned: bool, affine: bool, seed: u64) -> Case {
        // A small generator keeps the whole range of codes, extremes included, in every case.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut byte = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            match state >> 60 {
                0 => 0u8,
                1 => 255,
                2 => 127,
                3 => 128,
                _ => (state >> 40) as u8,
            }
        };
        let (m, n, depth) = dims;
        let left = |byte: u8| if unsigned { i16::from(byte) } else { i16::from(byte as i8) };
        let lhs = (0..m * depth).map(|_| left(byte())).collect();
        let rhs = (0..n * depth).map(|_| byte() as i8).collect();
        let lhs_zeros = (0..m).map(|_| if affine { i32::from(left(byte())) } else { 0 }).collect();
        let rhs_zeros = (0..n).map(|_| if affine { i32::from(byte() as i8) } else { 0 }).collect();
        Case { lhs, unsigned, lhs_zeros, rhs, rhs_zeros, dims }
    }

    /// Zero points at both ends, with codes at both ends, where what is subtracted takes one group of pairs, two
    /// and three.
    #[test]
    fn zero_points_are_exact_at_every_depth() {
        let ends = [i8::MIN, i8::MAX];
        let cases = ends.into_iter().flat_map(|a| ends.into_iter().map(move |b| (a, b)));
        for depth in [1usize, 127, 128, 129, 255, 256, 257, 4096, 32894, 32895, 33025] {
            for (a, za) in cases.clone() {
                for (b, zb) in cases.clone() {
                    let (lhs, rhs) = (vec![a; depth], vec![b; depth]);
                    let zeros = [za, zb].map(|zero| ZeroPoints::Uniform(i32::from(zero)));
                    let less = |code: i8, zero: i8| i64::from(code) - i64::from(zero);
                    let expected = depth as i64 * less(a, za) * less(b, zb);
                    for level in runnable() {
                        let shape = (1, 1, depth);
                        let out =
                            matmul_nt_with(level, Lhs::I8(&lhs), zeros[0], &rhs, zeros[1], shape);
                        let at = (level, depth, a, za, b, zb);
                        assert_eq!(
                            out.unwrap().into_iter().map(i64::from).collect::<Vec<_>>(),
                            [expected],
                            "{at:?}"
                        );
                    }
                }
            }
        }
        // Unsigned codes without zero points, whose signed form has some.
        let depth = max_depth(false);
        for level in runnable() {
            let (lhs, rhs, zero) = (vec![255u8; depth], vec![i8::MIN; depth], ZeroPoints::Zero);
            let out = matmul_nt_with(level, Lhs::U8(&lhs), zero, &rhs, zero, (1, 1, depth));
            assert_eq!(out.unwrap(), [-128 * 255 * depth as i32], "{level:?}");
        }
    }

    proptest! {
        #[test]
        fn every_level_equals_the_triple_loop(
            dims in (0usize..70, 0usize..150, 0usize..150),
            unsigned: bool,
            affine: bool,
            seed: u64,
        ) {
            case(dims, unsigned, affine, seed).check();
        }
    }

    #[test]
    fn every_level_on_both_sides_of_every_edge() {
        let mut cases = 0;
        for level in runnable() {
            let geometry = level.int8_product().geometry;
            let around = |edge: usize| [0, 1, edge - 1, edge, edge + 1];
            for m in around(geometry.mr).into_iter().chain(around(ROW_BLOCK)) {
                for n in around(geometry.nr) {
                    for depth in around(geometry.group).into_iter().chain([63, 64, 65]) {
                        case((m, n, depth), cases % 2 == 0, cases % 3 == 0, cases).check();
                        cases += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn extremes_do_not_saturate() {
        for (a, b) in [(255i16, -128i8), (255, 127), (0, -128), (0, 127), (128, -128)] {
            for depth in [1, 2, 3, 64, 257, 1024] {
                for zero in [0, 255] {
                    let (m, n) = (7, 65);
                    Case {
                        lhs: vec![a; m * depth],
                        unsigned: true,
                        lhs_zeros: vec![zero; m],
                        rhs: vec![b; n * depth],
                        rhs_zeros: vec![if zero == 0 { 0 } else { -128 }; n],
                        dims: (m, n, depth),
                    }
                    .check();
                }
            }
        }
    }

    #[test]
    fn the_deepest_product_is_exact_and_one_more_is_refused() {
        for with_zeros in [false, true] {
            let depth = max_depth(with_zeros);
            let (zero_a, zero_b) = if with_zeros { (0, 127) } else { (0, 0) };
            let at = |depth: usize| Case {
                lhs: vec![255; depth],
                unsigned: true,
                lhs_zeros: vec![zero_a],
                rhs: vec![-128; depth],
                rhs_zeros: vec![zero_b],
                dims: (1, 1, depth),
            };
            at(depth).check();
            let error = at(depth + 1).run(runnable()[0]).unwrap_err();
            assert!(matches!(error, Error::Depth { limit, .. } if limit == depth), "{error}");
        }
        assert_eq!(max_depth(false), 65_793);
    }

    #[test]
    fn any_number_of_threads_gives_the_same() {
        let case = case((200, 130, 96), false, true, 7);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.run(runnable()[0]).unwrap())
        };
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }

    #[test]
    fn wrong_lengths_and_zero_points_are_named() {
        let error =
            matmul_nt(Lhs::I8(&[1; 5]), ZeroPoints::Zero, &[1; 6], ZeroPoints::Zero, (2, 2, 3));
        assert!(error.unwrap_err().to_string().contains("2 rows of 3"));
        let zeros = ZeroPoints::PerRow(&[1, 2, 3]);
        let error = matmul_nt(Lhs::I8(&[1; 6]), zeros, &[1; 6], ZeroPoints::Zero, (2, 2, 3));
        assert!(error.unwrap_err().to_string().contains("each of 2 rows"));
        let huge = (1 << 40, 1 << 40, 0);
        let error = matmul_nt(Lhs::I8(&[]), ZeroPoints::Zero, &[], ZeroPoints::Zero, huge);
        assert!(error.unwrap_err().to_string().contains("out has shape [1099511627776, "));
        let zeros = ZeroPoints::Uniform(-1);
        let error = matmul_nt(Lhs::U8(&[1; 6]), zeros, &[1; 6], ZeroPoints::Zero, (2, 2, 3));
        assert!(error.unwrap_err().to_string().contains("0..=255"));
    }
}
