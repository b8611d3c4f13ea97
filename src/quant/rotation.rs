//! Rotation: spread the outliers of a row over its neighbours before quantizing.
//!
//! With an orthogonal matrix `R`,
//!
//! ```text
//! x·w = (x R)·(w R)
//! ```
//!
//! and where `x` has a few large elements, which cost all others the bits of a common scale, `x R` has
//! none: each of its elements is a sum of all of them with random signs. QuaRot (Ashkboos et al. 2024,
//! arXiv:2404.00456) takes a Hadamard matrix, whose product is additions alone.

use crate::cpu::Level;
use crate::{Error, Result};

/// Multiplies rows of `depth` elements by a symmetric orthogonal matrix `R`, so that `R R = 1`: rotating
/// both sides of a dot product changes nothing but its rounding, and rotating twice gives a row back.
///
/// ```text
/// R = diag(R_n1, R_n2, ..)      blocks of 128, then the powers of two that add up to what is left:
///                               384 = 128 + 128 + 128, 80 = 64 + 16, 50 = 32 + 16 + 2
/// R_n[i, j] = (-1)^popcount(i & j) / sqrt(n)        Sylvester's Hadamard matrix, orthonormal
/// ```
///
/// A block of `n` takes `n log2 n` additions (the fast Walsh-Hadamard transform, Fino and Algazi 1976).
/// They come in the same order on every instruction level: all give the same bits.
///
/// NaN and infinity spread over their block, and over no other row. Finite rows stay finite while no
/// element is beyond `f32::MAX / sqrt(128)`.
///
/// ```
/// use candle_int8_attention::quant::Rotation;
/// let mut row = [8.0, 0.0, 0.0, 0.0];
/// Rotation::new(4).apply(&mut row)?;
/// assert_eq!(row, [4.0; 4]);
/// Rotation::new(4).apply(&mut row)?;
/// assert_eq!(row, [8.0, 0.0, 0.0, 0.0]);
/// # Ok::<(), candle_int8_attention::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    depth: usize,
}

impl Rotation {
    /// For rows of `depth` elements; none is fine.
    pub const fn new(depth: usize) -> Self {
        Self { depth }
    }

    /// Elements of a row.
    pub const fn depth(&self) -> usize {
        self.depth
    }

    /// Rotates each of the rows `[rows, depth]` in place.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless they are whole rows; [`Error::Level`] where a level is forced that does
    /// not exist here.
    pub fn apply(&self, rows: &mut [f32]) -> Result<()> {
        if rows.len().checked_rem(self.depth).unwrap_or(rows.len()) != 0 {
            let problem = format!("{} elements in rows of {}", rows.len(), self.depth);
            return Err(Error::Mismatch(problem));
        }
        if rows.is_empty() {
            return Ok(());
        }
        self.apply_on(Level::active()?, rows);
        Ok(())
    }

    /// [`Rotation::apply`] to rows that are known to be whole.
    pub(crate) fn apply_whole(&self, rows: &mut [f32]) {
        // Whatever forces a level that cannot be used is told by who computes with the result.
        let portable = || Level::all().last().expect("the portable level is always available");
        self.apply_on(Level::active().unwrap_or_else(|_| portable()), rows);
    }

    /// [`Rotation::apply_whole`] with the kernel of a level.
    pub(crate) fn apply_on(&self, level: Level, rows: &mut [f32]) {
        level.rotate(self.depth, rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::runnable;

    /// Numbers in -1..1 with an outlier.
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            ((state >> 40) as f32 / (1u32 << 24) as f32) * 2.0 - 1.0
        };
        let mut x: Vec<f32> = (0..len).map(|_| next()).collect();
        x.iter_mut().skip(len / 2).take(1).for_each(|x| *x = 40.0);
        x
    }

    /// Start and length of each block.
    fn blocks(depth: usize) -> Vec<(usize, usize)> {
        let (mut start, mut found) = (0, Vec::new());
        for n in (0..8).rev().map(|power| 1 << power) {
            while start + n <= depth {
                found.push((start, n));
                start += n;
            }
        }
        found
    }

    /// By the definition, in f64.
    fn exact(row: &[f32]) -> Vec<f64> {
        let block = |(start, n): (usize, usize)| {
            (0..n).map(move |i| {
                let term = |j: usize| match (i & j).count_ones() % 2 {
                    0 => f64::from(row[start + j]),
                    _ => -f64::from(row[start + j]),
                };
                (0..n).map(term).sum::<f64>() / (n as f64).sqrt()
            })
        };
        blocks(row.len()).into_iter().flat_map(block).collect()
    }

    const DEPTHS: [usize; 18] =
        [0, 1, 2, 3, 7, 15, 16, 17, 32, 50, 64, 80, 127, 128, 129, 255, 384, 1000];

    #[test]
    fn rows_are_multiplied_by_the_matrix_of_the_definition() {
        for depth in DEPTHS {
            let rows = noise(3 * depth, depth as u64);
            let mut rotated = rows.clone();
            Rotation::new(depth).apply(&mut rotated).unwrap();
            for (row, rotated) in rows.chunks(depth.max(1)).zip(rotated.chunks(depth.max(1))) {
                for (found, expected) in rotated.iter().zip(exact(row)) {
                    let off = (f64::from(*found) - expected).abs();
                    assert!(off < 1e-5, "{depth}: {found}, expected {expected}");
                }
            }
            Rotation::new(depth).apply(&mut rotated).unwrap();
            for (found, expected) in rotated.iter().zip(&rows) {
                assert!((found - expected).abs() < 1e-5, "{depth}: {found}, expected {expected}");
            }
        }
    }

    #[test]
    fn all_levels_give_the_same_bits() {
        let levels = runnable();
        for depth in DEPTHS.into_iter().filter(|&depth| depth > 0) {
            let on = |level: Level| {
                let mut rows = noise(2 * depth, 7);
                rows[0] = -0.0;
                Rotation::new(depth).apply_on(level, &mut rows);
                rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let portable = on(*levels.last().unwrap());
            for &level in &levels {
                assert_eq!(on(level), portable, "{level:?} {depth}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_in_its_block() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut rows = noise(2 * 200, 3);
            let mut clean = rows.clone();
            rows[200 + 130] = bad;
            Rotation::new(200).apply(&mut rows).unwrap();
            Rotation::new(200).apply(&mut clean).unwrap();
            // The second row's second block, of 64.
            let (from, to) = (200 + 128, 200 + 192);
            assert!(rows[from..to].iter().all(|x| !x.is_finite()), "{bad}");
            assert_eq!((&rows[..from], &rows[to..]), (&clean[..from], &clean[to..]), "{bad}");
        }
        let mut large = [f32::MAX / 12.0; 128];
        Rotation::new(128).apply(&mut large).unwrap();
        assert!(large.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn parts_of_rows_are_refused() {
        for (depth, len) in [(3, 7), (0, 1), (usize::MAX, 1)] {
            let error = Rotation::new(depth).apply(&mut vec![1.0; len]).unwrap_err();
            let expected = format!("{len} elements in rows of {depth}");
            assert!(error.to_string().contains(&expected), "{error}");
        }
        Rotation::new(0).apply(&mut []).unwrap();
        Rotation::new(3).apply(&mut []).unwrap();
    }
}
